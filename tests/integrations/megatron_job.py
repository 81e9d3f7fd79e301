"""Saves, or loads, a GPT of Megatron-Core's with its optimizer on the CPU, at a tensor and a pipeline parallel size.

Every element of every sharded tensor is a number that its key and its place in the whole array give, so that each rank
can say, whatever the sizes were, whether what it has been given belongs there. Megatron-Core is made for GPUs: what it
asks of CUDA is answered for the CPU here.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    apply_factories,
)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

import ckptengine as ce
from ckptengine.integrations import megatron

LAYERS, WIDTH, VOCAB = 4, 32, 64


class OnCPU(TorchFunctionMode):
    """Has what is asked for on CUDA lie on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if "cuda" in str(named.get("device")):
            named["device"] = "cpu"
        return func(*args, **named)


def pretend_cuda() -> None:
    """Answer for the CPU what Megatron asks of CUDA; its optimizer takes tensors of the type `torch.cuda.…` only."""
    own_type = torch.Tensor.type

    def type_of(self: torch.Tensor, *args: Any, **named: Any) -> Any:
        told = own_type(self, *args, **named)
        return told if args or named or "cuda" in told else told.replace("torch.", "torch.cuda.", 1)

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.Tensor.cuda = lambda self, *args, **named: self  # type: ignore[method-assign]
    torch.Tensor.type = type_of  # type: ignore[method-assign, assignment]
    OnCPU().__enter__()


def made(tensor: int, pipeline: int, distributed: bool, *, step: bool = True) -> tuple[Any, Any]:
    """Return a model and its optimizer after one step, without which the optimizer has no state.

    Without `step`, return the model in Megatron's DistributedDataParallel, to be trained, and the optimizer.
    """
    parallel_state.initialize_model_parallel(tensor, pipeline)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=8, num_query_groups=4, use_cpu_initialization=True,
        gated_linear_unit=True, add_bias_linear=False, normalization="RMSNorm",
        activation_func=torch.nn.functional.silu, tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=16,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), model
    )
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=distributed)
    optimizer = get_megatron_optimizer(settings, [wrapped])
    if not step:
        return wrapped, optimizer
    for parameter in model.parameters():
        parameter.main_grad.normal_()
    optimizer.step()
    return model, optimizer


def state_dict(model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    own = optimizer.sharded_state_dict(model.sharded_state_dict(), is_loading=loading, metadata=metadata)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    rest = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    rng = {"python": (3, (1, 2)), "torch": torch.arange(5, dtype=torch.uint8), "numpy": np.arange(3), "stage": 0}
    ragged = VOCAB + 8 * parallel_state.get_tensor_model_parallel_world_size()  # padded as the size wants it
    return {
        "model": model.sharded_state_dict(),
        "optimizer": own,
        "iteration": 7,
        "here": LocalNonpersistentObject(f"rank {dist.get_rank()}"),
        "rng": ShardedObject("rng", rng, (1,), (0,), replica_id=(stage, *rest)),
        "padded": ShardedTensor.from_rank_offsets(
            "padded", torch.zeros(ragged), replica_id=(stage, *rest), allow_shape_mismatch=True
        ),
        "stages": stages,
    }  # fmt: skip


def tensors(value: Any) -> Iterator[ShardedTensor]:
    """Yield the sharded tensors of a dict, those that factories build included."""
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def belongs(one: ShardedTensor) -> torch.Tensor:
    """Return what a sharded tensor holds where everything is in its place."""
    ahead, shape = one.prepend_axis_num, one.global_shape
    place = np.zeros((*(1 for _ in range(ahead)), *one.local_shape), np.int64)
    step = 1
    for dim in reversed(range(len(shape))):
        length = place.shape[dim]
        index = (one.global_offset[dim] + np.arange(length)) * step
        place += index.reshape([length if d == dim else 1 for d in range(len(shape))])
        step *= shape[dim]
    first = zlib.crc32(one.key.encode()) % 97 * 1000
    return torch.from_numpy(place.reshape(one.local_shape) + first).to(one.dtype)


def main() -> None:
    options = json.loads(sys.argv[1])
    pretend_cuda()
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model, optimizer = made(options["tensor"], options["pipeline"], options["distributed"])
    sharded = state_dict(model, optimizer, loading=not options["save"])
    built = sharded if options["save"] else {**sharded, "model": dict(sharded["model"])}
    apply_factories(built)
    for one in tensors(built):
        one.data.detach().copy_(belongs(one) if options["save"] else torch.full_like(one.data, -1))
    if options["save"]:
        del sharded["stages"]
        megatron.save(sharded, options["path"])
    else:
        del sharded["stages"]
        loaded = megatron.load(sharded, options["path"])
        wrong = [
            f"{one.key} at {one.global_offset}"
            for one in tensors(built)
            if one.key != "padded" and not torch.equal(one.data, belongs(one))
        ]
        assert wrong == [], wrong
        padded, stored = loaded["padded"], options["stored"]
        kept = min(stored, len(padded))
        assert torch.equal(padded[:kept], belongs(sharded["padded"])[:kept])
        assert (padded[kept:] == 0).all()
        for name, parameter in model.named_parameters():  # fused ones are whole again
            assert torch.equal(loaded["model"][name], parameter), name
        assert loaded["iteration"] == 7
        assert loaded["here"] == f"rank {dist.get_rank()}"
        assert loaded["rng"]["python"] == (3, (1, 2))
        assert torch.equal(loaded["rng"]["torch"], torch.arange(5, dtype=torch.uint8))
        assert loaded["rng"]["numpy"].tolist() == [0, 1, 2]
        assert "stages" not in loaded
    dist.barrier()
    if options["save"] and dist.get_rank() == 0:
        whole = ce.load(options["path"])["tensors"]
        assert whole["decoder.layers.mlp.linear_fc1.weight"].shape == (LAYERS, 8 * WIDTH, WIDTH)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
