"""DeepSpeed's ZeRO 1, 2 and 3: the master weights and moments of an engine as parts of the parameters they belong to.

ZeRO's optimizers cut flat buffers of master weights among the ranks; what a rank has of a parameter is a run of its
elements. Where that lies tell `round_robin_bit16_offsets` (ZeRO 1 and 2, `runtime/zero/stage_1_and_2.py`) and
`grad_position` of the optimizer (ZeRO 3, `runtime/zero/stage3.py`). `_hp_mapping` of a parameter, which
`deepspeed.utils.safe_get_full_fp32_param` goes by, is wrong under `round_robin_gradients`. Attributes as of DeepSpeed
0.19.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from ckptengine.errors import StateError
from ckptengine.schema.path import Path, dotted
from ckptengine.torch.flat import FlatPart
from ckptengine.torch.parts import remember

__all__ = ["check_engine", "engine_values", "flats_by_group", "is_engine", "is_zero_optimizer", "refresh_weights"]

_WAY = "`ckptengine.integrations.deepspeed.state(engine)` gives a state that works"


def is_engine(module: Any) -> bool:
    """Whether a module is a DeepSpeedEngine."""
    return any(k.__name__ == "DeepSpeedEngine" and k.__module__.startswith("deepspeed.") for k in type(module).__mro__)


def is_zero_optimizer(value: Any) -> bool:
    """Whether a value is an optimizer that DeepSpeed has put around another one."""
    names = [k.__name__ for k in type(value).__mro__ if k.__module__.startswith("deepspeed.")]
    return "DeepSpeedOptimizer" in names or "ZeROOptimizer" in names


def check_engine(engine: Any, path: Path) -> None:
    """Raise `StateError` where an engine keeps its weights in a way that is not known."""
    where, zero = dotted(path), engine.optimizer
    kind = type(zero).__name__
    if kind not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"):
        raise StateError(
            f"{where}: a DeepSpeedEngine with {kind}, whose weights and moments are not known here; use ZeRO stage 1, "
            f"2 or 3, for which {_WAY}"
        )
    if any(
        getattr(engine, name)() for name in ("zero_offload_param", "zero_offload_optimizer") if _to_nvme(engine, name)
    ):
        raise StateError(f"{where}: a DeepSpeedEngine that offloads to NVMe; offload to the CPU, or not at all")
    if getattr(engine, "has_moe_layers", False) or engine.mp_world_size > 1:
        raise StateError(
            f"{where}: a DeepSpeedEngine with experts or model parallelism, of which ranks have different parameters; "
            "use its own `save_checkpoint`"
        )


def _to_nvme(engine: Any, name: str) -> bool:
    told = getattr(engine, name)()
    return told is not None and "nvme" in str(getattr(told, "device", ""))


def engine_values(engine: Any) -> dict[str, Any]:
    """Return the state of an engine by the names of the module in it: master weights, parameters that are not trained,
    and buffers."""
    module, zero, values = engine.module, engine.optimizer, {}
    parts = {id(parameter): part for parameter, part in _parts(zero)}
    parts |= {id(parameter): part for parameter, part in _untrained_parts(zero, module)}
    for name, holder in module.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for key, parameter in holder._parameters.items():
            if parameter is not None:
                values[prefix + key] = parts.get(id(parameter), parameter)
        for key, buffer in holder._buffers.items():
            if buffer is not None and key not in holder._non_persistent_buffers_set:
                values[prefix + key] = buffer
    return values


def _parts(zero: Any) -> Iterator[tuple[Any, FlatPart]]:
    stage3 = _is_stage3(zero)
    flats = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
    groups = zero.fp16_groups if stage3 else zero.round_robin_bit16_groups
    cut = _cut_stage3 if stage3 else _cut_flat
    for number, (flat, params) in enumerate(zip(flats, groups, strict=True)):
        parts = remember(flat, functools.partial(cut, zero, number, flat, params))
        yield from zip(params, parts, strict=True)


def _is_stage3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _cut_stage3(zero: Any, number: int, flat: Any, params: list[Any]) -> list[FlatPart]:
    """Cut the master weights of a subgroup, in which each parameter is shared out evenly over the ranks."""
    buffer, parts = flat.detach(), []
    for parameter in params:
        _, offset, count = zero.grad_position[zero.get_param_id(parameter)]
        start, held = _share(zero, parameter, count)
        run = buffer[offset : offset + held]
        parts.append(FlatPart.of(run, parameter.ds_shape, start, buffer=buffer, owner=flat, pooled=True))
    return parts


def _share(zero: Any, parameter: Any, count: int) -> tuple[int, int]:
    """Return where this rank's elements of a parameter begin, of `count` for each rank, and how many it has."""
    start = min(zero._get_param_partition_rank(parameter) * count, parameter.ds_numel)
    return start, min(count, parameter.ds_numel - start)


def _cut_flat(zero: Any, number: int, flat: Any, params: list[Any]) -> list[FlatPart]:
    """Cut the master weights of a group, in which parameters follow each other, and ranks have equal stretches."""
    from torch.distributed import get_rank

    buffer, size = flat.detach(), zero.partition_size[number]
    begin = get_rank(zero.real_dp_process_group[number]) * size
    parts = []
    for parameter, offset in zip(params, zero.round_robin_bit16_offsets[number], strict=True):
        first, last = max(offset, begin), min(offset + parameter.numel(), begin + size)
        held = first < last
        run = buffer[first - begin : last - begin] if held else buffer[:0]
        start = first - offset if held else 0
        parts.append(FlatPart.of(run, parameter.shape, start, buffer=buffer, owner=flat, pooled=True))
    return parts


def _untrained_parts(zero: Any, module: Any) -> Iterator[tuple[Any, FlatPart]]:
    """Yield the parameters that ZeRO 3 has cut and does not train, each with this rank's part of it."""
    for parameter in module.parameters() if _is_stage3(zero) else ():
        shard = None if parameter.requires_grad else getattr(parameter, "ds_tensor", None)
        if shard is None or hasattr(shard, "ds_quant_scale"):
            continue  # what is quantized is refused as a parameter of ZeRO 3
        yield parameter, remember(parameter, functools.partial(_cut_untrained, zero, parameter, shard), shard)[0]


def _cut_untrained(zero: Any, parameter: Any, shard: Any) -> list[FlatPart]:
    start, held = _share(zero, parameter, shard.ds_numel)
    buffer = shard.detach()
    return [FlatPart.of(buffer[:held], parameter.ds_shape, start, buffer=buffer, owner=parameter)]


def flats_by_group(zero: Any) -> list[list[Any]]:
    """Return the flat master weights of each of an optimizer's groups; ZeRO 3 has them there during a step only."""
    groups: list[list[Any]] = [[] for _ in zero.param_groups]
    flats = getattr(zero, "fp32_partitioned_groups_flat", None)
    if flats is None:
        return [list(group["params"]) for group in zero.param_groups]
    for number, flat in enumerate(flats):
        groups[zero.sub_group_to_group_id[number]].append(flat)
    return groups


def refresh_weights(zero: Any) -> None:
    """Make the weights that the model computes with from the master weights, as DeepSpeed does after each step.

    What ZeRO 3 has gathered, and its secondary parts, would still be the weights of before. Collective: every rank of
    the engine calls it.
    """
    if not _is_stage3(zero):
        zero.update_lp_params()
        for number in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(number)
        return
    zero.checkpoint_event_prologue()
    for number in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    for parameter in zero.module.parameters():
        parameter.ds_secondary_tensor = None
    zero.checkpoint_event_epilogue()
