"""DeepSpeed's ZeRO 1, 2 and 3: the master weights and moments of an engine as parts of the parameters they belong to.

ZeRO's optimizers cut flat buffers of master weights among the ranks; what a rank has of a parameter is a run of its
elements. Where that lies is what `deepspeed.utils.safe_get_local_fp32_param` and `safe_get_full_fp32_param` look up:
`_hp_mapping` of a parameter (ZeRO 1 and 2, `utils/tensor_fragment.py`), `grad_position` of the optimizer (ZeRO 3,
`runtime/zero/stage3.py`). Attributes as of DeepSpeed 0.19.
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
    module, values = engine.module, {}
    parts = {id(parameter): part for parameter, part in _parts(engine.optimizer)}
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
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    flats = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
    groups = zero.fp16_groups if stage3 else zero.bit16_groups
    for flat, params in zip(flats, groups, strict=True):
        parts = remember(flat, functools.partial(_cut, zero, flat, params, stage3))
        yield from zip(params, parts, strict=True)


def _cut(zero: Any, flat: Any, params: list[Any], stage3: bool) -> list[FlatPart]:
    return [_part(zero, flat, parameter, stage3) for parameter in params]


def _part(zero: Any, flat: Any, parameter: Any, stage3: bool) -> FlatPart:
    buffer = flat.detach()
    if stage3:
        _, offset, count = zero.grad_position[zero.get_param_id(parameter)]
        rank = zero._get_param_partition_rank(parameter)
        start = min(rank * count, parameter.ds_numel)
        run = buffer[offset : offset + min(count, parameter.ds_numel - start)]
        return FlatPart.of(run, parameter.ds_shape, start, buffer=buffer, owner=flat, pooled=True)
    mapping = parameter._hp_mapping
    if mapping is None:
        return FlatPart.of(buffer[:0], parameter.shape, 0, buffer=buffer, owner=flat, pooled=True)
    here = mapping.hp_fragment_address
    run = buffer[here.start : here.start + here.numel]
    start = mapping.lp_fragment_address.start
    return FlatPart.of(run, parameter.shape, start, buffer=buffer, owner=flat, pooled=True)


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

    Collective: every rank of the engine calls it.
    """
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        for number in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(number)
        return
    for number in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
