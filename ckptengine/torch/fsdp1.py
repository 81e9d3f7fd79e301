"""FullyShardedDataParallel (FSDP1): its flat parameters as parts of the parameters that they were made of.

Nothing is gathered and nothing is copied: what a rank has of a parameter is a run of elements of its flat shard, which
`FlatPart` shows under the parameter's own name. What FSDP notes of its flat parameters is in
`torch/distributed/fsdp/_flat_param.py` (torch 2.13), in attributes that its own sharded state dicts are made of, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ckptengine.errors import StateError
from ckptengine.schema.path import Path, dotted
from ckptengine.torch.flat import FlatPart
from ckptengine.torch.parts import note, remember

__all__ = ["check_fsdp1", "check_whole", "fsdp1_values", "holds_fsdp1", "is_flattened"]

_INSTEAD = "or use `fully_shard` (FSDP2), which takes it"


def holds_fsdp1(module: torch.nn.Module) -> bool:
    """Whether a module is FullyShardedDataParallel, or has one inside.

    Each save asks: `module.modules()`, which builds a name for each submodule, would take several times as long.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    kind, seen, waiting = fsdp.FullyShardedDataParallel, {id(module)}, [module]
    while waiting:
        one = waiting.pop()
        if isinstance(one, kind):
            return True
        for part in one._modules.values():
            if part is not None and id(part) not in seen:
                seen.add(id(part))
                waiting.append(part)
    return False


def is_flattened(parameter: Any) -> bool:
    """Whether a parameter is one of FSDP1's: flat, or a view of a flat one."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def check_fsdp1(module: torch.nn.Module, path: Path) -> None:
    """Raise `StateError` where FSDP1 can't be looked into: in mid-step, over tensor parallelism, around modules with
    loading code of their own."""
    for name, part in module.named_modules():
        where = dotted((*path, *_clean(name).split("."))) if name else dotted(path)
        odd = _own_code(part)
        if odd is not None:
            raise StateError(
                f"{where}: {type(part).__name__} has a `{odd}` of its own, which FullyShardedDataParallel (FSDP1) "
                f"would call on gathered parameters; put what it adds into the state by itself, {_INSTEAD}"
            )
    for owner, handle in _handles(module):
        flat = handle.flat_param
        if any(extension is not None for extension in flat._param_extensions):
            raise StateError(
                f"{dotted(path)}: FullyShardedDataParallel (FSDP1) over tensor-parallel parameters; use `fully_shard` "
                "(FSDP2) over `parallelize_module`"
            )
        if {owner.training_state.name, handle._training_state.name} != {"IDLE"}:
            raise StateError(
                f"{dotted(path)}: FullyShardedDataParallel (FSDP1) is in the middle of forward or backward, or in "
                "`summon_full_params`; save and restore between two steps"
            )


def check_whole(module: torch.nn.Module, path: Path) -> None:
    """Raise `StateError` for a module inside of FSDP1: the wrapper around it has taken parameters out of it.

    They are in no `state_dict` of its own. Each walk looks anew: the wrapper may have been made since.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    flats: set[int] = set()
    views: set[tuple[int, str]] = set()
    for _, handle in _handles(module):
        flat = handle.flat_param
        flats.add(id(flat))
        views.update((id(holder), name) for name, holder, _ in flat._param_infos)
        views.update((id(holder), name) for name, holder, *_ in flat._shared_param_infos)
    for name, part in module.named_modules():
        if any(getattr(one, "_is_flat_param", False) and id(one) not in flats for one in part._parameters.values()):
            raise StateError(_inside(part, name, path))
        for key, value in vars(part).items():
            if isinstance(value, torch.Tensor) and (id(part), key) not in views and _is_taken(value):
                raise StateError(_inside(part, name, path))


def _is_taken(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a view of one of FSDP1's flat parameters in a parameter's place, gathered or emptied.

    Between two steps its memory is taken away; after a forward pass alone, and without sharding, it is there.
    """
    if type(tensor) is not torch.Tensor or tensor.is_meta or tensor.layout is not torch.strided:
        return False
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        return True
    return tensor._is_view() and bool(getattr(tensor._base, "_is_flat_param", False))


def _inside(part: torch.nn.Module, name: str, path: Path) -> str:
    where = dotted((*path, *_clean(name).split("."))) if name else dotted(path)
    return (
        f"{where}: parameters of this {type(part).__name__} are in a flat parameter of a FullyShardedDataParallel "
        "(FSDP1) around it, and nothing of them would be saved or loaded; put the outermost FullyShardedDataParallel "
        "module itself into the state, not `.module` or a part of it"
    )


def fsdp1_values(module: torch.nn.Module) -> dict[str, Any]:
    """Return the state of a module that has FSDP1 inside, by its own keys, with `FlatPart`s for flattened parameters.

    Before, parameters that were left gathered (by an evaluation) go back to their shards, as the next forward pass
    would have it: else it would go on with gathered values that a restore has not changed.
    """
    by_module = _parts_by_module(module)
    values: dict[str, Any] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        own: Mapping[str, Any] = by_module.get(id(part), {})
        for key, parameter in part._parameters.items():
            if parameter is not None and not getattr(parameter, "_is_flat_param", False):
                values[prefix + key] = own.get(key, parameter)
        values.update({prefix + key: one for key, one in own.items() if prefix + key not in values})
        for key, buffer in part._buffers.items():
            if buffer is not None and key not in part._non_persistent_buffers_set:
                values[prefix + key] = buffer
    return values


def _handles(module: torch.nn.Module) -> Iterator[tuple[Any, Any]]:
    fsdp = sys.modules["torch.distributed.fsdp"]
    for part in module.modules():
        if isinstance(part, fsdp.FullyShardedDataParallel) and getattr(part, "_handle", None) is not None:
            yield part, part._handle


def _parts_by_module(module: torch.nn.Module) -> dict[int, dict[str, FlatPart]]:
    """Return the parts by the `id` of the submodule whose parameter it is, and the parameter's name in that."""
    found: dict[int, dict[str, FlatPart]] = {}
    for owner, handle in _handles(module):
        _settle(owner, handle)
        flat, parts = handle.flat_param, _parts_in(handle)
        by_place = {}
        for part, (name, holder, _) in zip(parts, flat._param_infos, strict=True):
            by_place[id(holder), name] = found.setdefault(id(holder), {})[name] = part
        for name, holder, _, first, first_holder, _ in flat._shared_param_infos:
            found.setdefault(id(holder), {})[name] = by_place[id(first_holder), first]
    return found


def _settle(owner: Any, handle: Any) -> None:
    """Have parameters point to their shards, and buffers have the dtype in which they are computed with.

    torch does the latter before the first forward pass, and before its own state dicts (`_lazy_init`).
    """
    if owner._is_root is None and owner.mixed_precision.buffer_dtype is not None:
        from torch.distributed.fsdp._runtime_utils import _lazy_init

        _lazy_init(owner, owner)
    flat = handle.flat_param
    if handle.uses_sharded_strategy and (not handle.is_sharded(flat) or _is_gathered(flat)):
        from torch.distributed.fsdp._runtime_utils import _reshard

        _reshard(owner, handle, True)
        for name in ("_full_param_padded", "_full_prec_full_param_padded"):
            if (whole := getattr(flat, name, None)) is not None:
                whole.untyped_storage().resize_(0)
    if not handle._use_orig_params:
        return
    detached = [
        (number, parameter)
        for number, parameter in enumerate(flat._params)
        if parameter.numel() and parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()
    ]
    if detached:  # `parameter.data = …`: the next forward pass writes it back, too
        shard = _local_shard(flat)
        for number, parameter in detached:
            _, offset, count, _, _ = flat._shard_param_infos[number]
            with torch.no_grad():
                shard[offset : offset + count].copy_(parameter.detach().reshape(-1))
        handle._use_sharded_views()


def _is_gathered(flat: Any) -> bool:
    """Whether the whole of a flat parameter is still in memory, as the root's is after a forward pass without a
    backward one: the next forward pass would compute with that."""
    whole = [getattr(flat, name, None) for name in ("_full_param_padded", "_full_prec_full_param_padded")]
    return any(one is not None and one.untyped_storage().nbytes() > 0 for one in whole)


def _local_shard(flat: Any) -> torch.Tensor:
    shard = getattr(flat, "_local_shard", None)  # there from the first forward pass on
    local: torch.Tensor = flat.data if shard is None else shard
    return local


def _parts_in(handle: Any) -> list[FlatPart]:
    """Return the parts of a flat parameter, and note by which parameters an optimizer knows them."""
    flat = handle.flat_param
    shard = _local_shard(flat).view(-1)
    parts = remember(flat, lambda: list(_cut(handle, flat, shard)), shard)
    if handle._use_orig_params:
        for part, parameter in zip(parts, flat._params, strict=True):
            part.known_as(parameter)
            note(parameter, [part])
    return parts


def _cut(handle: Any, flat: Any, shard: torch.Tensor) -> Iterator[FlatPart]:
    rows = zip(flat._shard_param_infos, flat._shapes, flat._strides, flat._contiguities, strict=True)
    for (inside, offset, count, start, _), shape, strides, contiguous in rows:
        run = shard[offset : offset + count] if inside else shard[:0]
        order = None if contiguous else sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim))
        about = {"whole": not handle.uses_sharded_strategy, "owner": flat, "pooled": not handle._use_orig_params}
        yield FlatPart.of(run, shape, start if inside else 0, order=order, buffer=shard, **about)


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")


def _own_code(part: torch.nn.Module) -> str | None:
    """Return the name of the call or hook by which a module's state is more than its parameters and buffers."""
    kind: Any = type(part)
    for name in ("state_dict", "_save_to_state_dict", "load_state_dict", "_load_from_state_dict"):
        if not getattr(kind, name).__module__.startswith(("torch.nn.", "torch.distributed.")):
            return name
    if kind.get_extra_state is not torch.nn.Module.get_extra_state:
        return "get_extra_state"
    for name in ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
                 "_load_state_dict_post_hooks"):  # fmt: skip
        hooks = getattr(part, name, {})
        if not all(_is_torchs(hook) for hook in hooks.values()):
            return name.removeprefix("_").removesuffix("s")
    return None


def _is_torchs(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "func", hook)
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return str(where).startswith(("torch.nn.", "torch.distributed."))
