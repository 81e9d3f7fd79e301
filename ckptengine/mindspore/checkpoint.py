"""`save_checkpoint`, `load_checkpoint` and `load_param_into_net` with MindSpore's signatures, over this engine."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mindspore as ms
from mindspore import Generator, Tensor, nn

from ckptengine.catalog.listing import committed, read_manifest
from ckptengine.comm.single import SingleProcess
from ckptengine.errors import CheckpointNotFoundError
from ckptengine.load.loader import LoadOptions, load_arrays
from ckptengine.mindspore.files import find_checkpoint
from ckptengine.mindspore.parameters import (
    ExactNames,
    LoadedParameters,
    StoredArray,
    optimizers_of,
    optimizers_own,
    parameters_of,
    refuse_split,
    state_of,
)
from ckptengine.save.handle import SaveHandle
from ckptengine.save.saver import DEFAULT_TIMEOUT, Saver
from ckptengine.save.single import single_checkpoint
from ckptengine.storage.open import local_path, open_storage

__all__ = [
    "SLICES",
    "SUFFIXES",
    "check_appended",
    "load_checkpoint",
    "load_param_into_net",
    "progress_of",
    "refuse_encryption",
    "save_checkpoint",
    "settle",
    "start_save",
    "wait_for_save",
]

SUFFIXES = ("ckpt", "safetensors")
SLICES = "; or give integrated_save=False, and each rank a name of its own, which saves its slices"
_lock = threading.Lock()
_saver: Saver | None = None
# Where the training was from which an optimizer's state came.
_progress: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()


def save_checkpoint(
    save_obj: Any,
    ckpt_file_name: str,
    integrated_save: bool = True,
    async_save: bool | str = False,
    append_dict: Mapping[str, Any] | None = None,
    enc_key: bytes | None = None,
    enc_mode: str = "AES-GCM",
    choice_func: Callable[[str], bool] | None = None,
    crc_check: bool = False,
    format: str = "ckpt",
    **kwargs: Any,
) -> None:
    """Save a cell, or a list or dict of parameters, as a ckptengine checkpoint, by this process alone.

    - `save_obj`: an `nn.Cell`, a list of parameters or of `{"name": str, "data": Tensor}`, or a dict.
    - `ckpt_file_name`: becomes a directory. A checkpoint there is replaced after the new one is committed.
    - `async_save`: True, `"thread"` and `"process"` all return when the snapshot is taken, and failures are logged.
      Without it the checkpoint is durable when the call returns.
    - `append_dict`: further values to save: str to int, float, bool, str, Tensor, Parameter or Generator.
    - `choice_func`: says for each name whether it is saved.
    - `integrated_save`: parameters are never merged; a cell whose parameters are split over devices is refused unless
      this is False.
    - `format`: decides only the ending of the name. `crc_check`, `remove_redundancy`: checksums are always written, and
      nothing is written twice.

    Raises `ValueError` for encryption and incremental saving, `TypeError` for other values in `append_dict`,
    `StorageError` for a URL (`ckptengine.save` takes those), `StateError` for what can't be saved, and
    `SaveFailedError` or `StorageError` if the save failed; an earlier checkpoint is then unchanged.
    """
    refuse_encryption("save_checkpoint", enc_key)
    if kwargs.get("incremental"):
        raise ValueError("save_checkpoint: incremental=True is for MapParameter, which ckptengine does not save")
    if unknown := set(kwargs) - {"incremental", "global_step_num", "remove_redundancy"}:
        raise TypeError(f"save_checkpoint: unknown arguments {', '.join(sorted(unknown))}")
    if format not in SUFFIXES:
        raise ValueError(f"save_checkpoint: format={format!r}: 'ckpt' or 'safetensors'")
    if async_save not in (False, True, "thread", "process"):
        raise ValueError(f"save_checkpoint: async_save={async_save!r}: a bool, 'thread' or 'process'")
    if not isinstance(save_obj, (nn.Cell, list, dict)):
        raise TypeError(f"save_checkpoint: save_obj is {type(save_obj).__name__}, not a Cell, list or dict")
    if integrated_save:
        refuse_split("save_checkpoint", save_obj, SLICES)
    check_appended("save_checkpoint", append_dict)
    path = os.path.realpath(local_path(ckpt_file_name, "ckpt_file_name"))
    path = path if path.endswith(format) else f"{path}.{format}"
    handle = start_save(path, state_of(save_obj, append_dict, choice_func))
    if async_save is False:
        handle.durable.result()
        settle()


def load_checkpoint(
    ckpt_file_name: str,
    net: nn.Cell | None = None,
    strict_load: bool = False,
    filter_prefix: str | Sequence[str] | None = None,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: str | Sequence[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    crc_check: bool = False,
    remove_redundancy: bool = False,
    format: str = "ckpt",
) -> dict[str, Any]:
    """Return a dict of a checkpoint's parameters by name, with strings as they are; with `net`, also load them into it.

    `ckpt_file_name` is a ckptengine checkpoint or run (of a run the newest step is loaded), which is verified and read
    by this process alone, or one of MindSpore's own files, which MindSpore reads. `filter_prefix`, `specify_prefix` and
    `choice_func` select by name; the other arguments are MindSpore's.

    Raises `CheckpointNotFoundError`, `CheckpointDamagedError`, `FormatVersionError`, and `ValueError` for encryption
    and if nothing is left to load.
    """
    local_path(ckpt_file_name, "ckpt_file_name")
    if format not in SUFFIXES:
        raise ValueError(f"load_checkpoint: format={format!r}: 'ckpt' or 'safetensors'")
    specified, filtered = _prefixes(specify_prefix), _prefixes(filter_prefix)
    settle()
    where = find_checkpoint(ckpt_file_name)
    if where is None and os.path.isfile(ckpt_file_name):
        theirs: dict[str, Any] = ms.load_checkpoint(
            ckpt_file_name,
            net,
            strict_load,
            filter_prefix=filter_prefix,
            dec_key=dec_key,
            dec_mode=dec_mode,
            specify_prefix=specify_prefix,
            choice_func=choice_func,
            crc_check=crc_check,
            remove_redundancy=remove_redundancy,
            format=format,
        )
        return theirs
    if where is None:
        raise CheckpointNotFoundError(f"{ckpt_file_name}: neither a committed checkpoint nor a file of MindSpore's")
    refuse_encryption("load_checkpoint", dec_key)

    def wanted(name: str) -> bool:
        if specified or filtered:
            return (not specified or name.startswith(specified)) and not name.startswith(filtered)
        return choice_func is None or bool(choice_func(name))

    storage = open_storage(where)
    loaded = LoadedParameters(parameters_of(load_arrays(storage, LoadOptions(), convert=StoredArray), wanted))
    if not loaded:
        raise ValueError(
            f"load_checkpoint: {where} has nothing that filter_prefix, specify_prefix and choice_func let by"
        )
    metadata = read_manifest(storage, committed(storage)[-1]).metadata
    numbers = metadata.get("epoch_num"), metadata.get("step_num")
    if isinstance(numbers[0], int) and isinstance(numbers[1], int):
        loaded.progress = numbers[0], numbers[1]
    if net is not None:
        load_param_into_net(net, loaded, strict_load)
    return loaded


def load_param_into_net(
    net: nn.Cell, parameter_dict: dict[str, Any], strict_load: bool = False, remove_redundancy: bool = False
) -> tuple[list[str], list[str]]:
    """Load parameters into a network or an optimizer; return the names of either side that were not loaded.

    This is MindSpore's own function, with its rules for names and dtypes, except that a missing weight is never taken
    from an optimizer's own parameters, whose names end like the weights': it is returned as not loaded. It also records
    the epoch and step that an optimizer's state came from, so that `ModelCheckpoint` continues to count from there.
    """
    # What the dict holds belongs to this engine whole: there is no redundancy to bring back.
    removed = remove_redundancy and not isinstance(parameter_dict, LoadedParameters)
    given = parameter_dict
    if isinstance(net, nn.Cell) and isinstance(parameter_dict, dict) and not strict_load:
        given = ExactNames(parameter_dict, optimizers_own(net, parameter_dict))
    missing, unused = ms.load_param_into_net(net, given, strict_load, removed)
    if isinstance(parameter_dict, LoadedParameters) and parameter_dict.progress is not None:
        for optimizer in optimizers_of(net):
            own = {parameter.name for parameter in optimizer.get_parameters()} - {p.name for p in optimizer.parameters}
            if own and own.isdisjoint(missing):
                _progress[optimizer] = parameter_dict.progress
    return missing, unused


def progress_of(network: nn.Cell) -> tuple[int, int]:
    """Return the epochs and steps that lie behind a training network whose optimizer was loaded; zeros where not."""
    return max((_progress[one] for one in optimizers_of(network) if one in _progress), default=(0, 0))


def refuse_encryption(function: str, key: bytes | None) -> None:
    """Raise where a key is given."""
    if key is not None:
        raise ValueError(
            f"{function}: checkpoints of ckptengine are not encrypted; encrypt the file system or the bucket, or "
            "use MindSpore's own function for this one"
        )


def start_save(
    path: str,
    state: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    committed: Callable[[], Sequence[str]] | None = None,
) -> SaveHandle:
    """Start to save a state at a path, by this process alone; `committed` cleans up after the commit.

    `committed` is called in the background and returns what it could not do. Raises what the snapshot raises.
    """
    global _saver
    target = single_checkpoint(open_storage(path), metadata, committed)
    with _lock:
        if _saver is None:
            _saver = Saver(SingleProcess(), DEFAULT_TIMEOUT)
        return _saver.start(target, state)


def wait_for_save() -> None:
    """Wait until the last save is durable, whether it succeeds or not."""
    if _saver is not None:
        _saver.wait(DEFAULT_TIMEOUT)


def settle() -> None:
    """Wait for the save in flight and for the cleaning up after it."""
    if _saver is not None:
        _saver.settle(DEFAULT_TIMEOUT)


def check_appended(function: str, appended: Any) -> None:
    """Raise `TypeError` where further values are none that MindSpore takes: they would come back changed, or not."""
    if appended is not None and not isinstance(appended, dict):
        raise TypeError(f"{function}: append_dict is {type(appended).__name__}, not a dict")
    for name, value in (appended or {}).items():
        if not isinstance(name, str) or not isinstance(value, (int, float, bool, str, Tensor, Generator)):
            raise TypeError(
                f"{function}: append_dict[{name!r}] is {type(value).__name__}: names are strings, and values int, "
                "float, bool, str, Tensor, Parameter or Generator; ckptengine.save takes everything else"
            )


def _prefixes(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the prefixes; raises as MindSpore does where none is given, or an empty one."""
    if given is None:
        return ()
    if not isinstance(given, (str, list, tuple)):
        raise TypeError(
            f"load_checkpoint: specify_prefix and filter_prefix are strings or lists of them, not {given!r}"
        )
    prefixes = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise TypeError(
            f"load_checkpoint: specify_prefix and filter_prefix are strings or lists of them, not {given!r}"
        )
    if not prefixes or "" in prefixes:
        raise ValueError(
            f"load_checkpoint: {given!r} names no prefix; leave specify_prefix or filter_prefix out for all"
        )
    return prefixes
