"""The life of an export: open, plan, write each file, and the index last."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ckptengine.comm.agree import on_all
from ckptengine.comm.base import Communicator
from ckptengine.errors import CheckpointNotFoundError, StorageError
from ckptengine.export.contents import Contents, contents_of
from ckptengine.export.dcp import plan_dcp
from ckptengine.export.mindspore import plan_mindspore
from ckptengine.export.safetensors import INDEX, index_of, plan_safetensors, shards_of
from ckptengine.export.stream import FilePlan, write_file
from ckptengine.export.torch_file import plan_torch_file
from ckptengine.export.zarr import plan_zarr
from ckptengine.load.checkpoint import Checkpoint, naming
from ckptengine.load.choose import Chooser
from ckptengine.state.rename import Rename
from ckptengine.storage.base import Storage

__all__ = ["FORMATS", "ExportOptions", "ExportReport", "export_checkpoint", "shard_nbytes", "target_of"]

FORMATS = ("safetensors", "torch", "dcp", "zarr", "mindspore")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def shard_nbytes(size: int | str) -> int:
    """Return the bytes of a size as Hugging Face writes it: `5GB` is 5 × 10⁹, `5GiB` 5 × 2³⁰; raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(size), re.IGNORECASE)
    if (
        found is None
        or found[2].upper() not in _UNITS
        or (nbytes := int(float(found[1]) * _UNITS[found[2].upper()])) < 1
    ):
        raise ValueError(f"max_shard_size={size!r}: give a number of bytes, or a text such as '5GB'")
    return nbytes


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is exported, and how; `ckptengine.export` explains them."""

    format: str
    only: tuple[str, ...] | None = None
    rename: Rename | None = None
    dtype: str | None = None
    max_shard_nbytes: int = 5 * 10**9

    @classmethod
    def of(
        cls, to: str, only: Iterable[str] | None, rename: Rename | None, dtype: str | None, max_shard_size: int | str
    ) -> ExportOptions:
        """Return the options as users give them; raises `ValueError` for a format that is none."""
        if to not in FORMATS:
            raise ValueError(f"to={to!r}: one of {', '.join(FORMATS)}")
        only = None if only is None else ((only,) if isinstance(only, str) else tuple(only))
        return cls(
            to, only, rename, None if dtype is None else str(dtype).removeprefix("torch."), shard_nbytes(max_shard_size)
        )

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments that all ranks must give alike, by name: they decide who writes which file."""
        return {
            "to": self.format,
            "only": None if self.only is None else sorted(set(map(str, self.only))),  # it may be a set
            "rename": _rules_of(self.rename),
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_nbytes,
        }


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written: the step (None: a single checkpoint, or another library's), the files by name, their bytes, the
    number of arrays, and what the format can't hold: names of plain values, names of arrays that are others again
    (tied), and how many arrays are ranks' own."""

    source: str
    target: str
    format: str
    step: int | None
    files: tuple[str, ...]
    nbytes: int
    arrays: int
    left_out_values: tuple[str, ...] = ()
    left_out_tied: tuple[str, ...] = ()
    left_out_own: int = 0


@dataclass(frozen=True, slots=True)
class _Plan:
    """The large files, each written by one rank; the small ones, written last and in order by rank 0."""

    large: list[FilePlan]
    small: list[tuple[str, bytes]]
    values: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()


def export_checkpoint(
    source: Storage,
    target: Storage,
    name: str | None,
    options: ExportOptions,
    comm: Communicator,
    timeout: float,
    progress: Callable[[int, int], None] | None = None,
    *,
    finish: bool = False,
    attempt: str = "",
) -> ExportReport:
    """Write a checkpoint in another format; all ranks call it, and share the files.

    `name` is the file in `target` that is meant, None where `target` is a directory to be filled. With `finish`, the
    files of the same export that was cut off before its index are written anew. `attempt` is which save of a step is
    meant, where it may have been saved twice: `CheckpointNotFoundError` where another is there. Raises what opening
    the checkpoint does, `StorageError` (EEXIST) for files that are there already, `ForeignFormatError` naming what the
    format can't hold. After an error the index, which is written last, is not there.
    """
    chooser = Chooser([source], comm, timeout, "export", options.arguments)
    checkpoint = chooser.newest()
    if attempt and not (isinstance(checkpoint, Checkpoint) and checkpoint.manifest.attempt == attempt):
        raise CheckpointNotFoundError(
            f"{checkpoint.location}: the step was saved again, so the checkpoint to export is gone"
        )
    doing = f"exporting {checkpoint.location}"

    def look() -> tuple[Contents, _Plan]:
        with naming(checkpoint.location):
            contents = contents_of(checkpoint, options.only, options.rename, options.dtype)
        plan = _plan(contents, options, name)
        if comm.rank == 0:
            _check_absent(target, plan, finish)
            target.create()
        return contents, plan

    contents, plan = on_all(comm, look, timeout, doing)
    mine = _mine(plan.large, comm)
    total = sum(plan.large[number].nbytes for number in mine)
    lock, done = threading.Lock(), 0

    def tell(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    def write() -> None:
        with naming(checkpoint.location):
            for number in mine:
                write_file(plan.large[number], checkpoint, target, timeout, tell)

    on_all(comm, write, timeout, doing)

    def close() -> None:
        if comm.rank == 0:
            for small, data in plan.small:
                target.write_bytes(small, data)

    on_all(comm, close, timeout, doing)
    files = (*(one.name for one in plan.large), *(small for small, _ in plan.small))
    return ExportReport(
        checkpoint.location,
        target.location() if name is None else target.location(name),
        options.format,
        checkpoint.step,
        files,
        sum(one.nbytes for one in plan.large) + sum(len(data) for _, data in plan.small),
        len(contents.items),
        plan.values,
        plan.tied,
        contents.own,
    )


def target_of(storage: Storage, to: str) -> tuple[Storage, str | None]:
    """Return the directory to write to, and the name of the file where one is meant, for the place that a user gave."""
    suffixes = {"safetensors": (".safetensors",), "zarr": (".zip",), "dcp": ()}.get(to)
    beside = storage.beside()
    if beside is not None and (suffixes is None or beside[1].endswith(suffixes)):
        return beside
    if suffixes is None:
        raise ValueError(f"{storage.location()}: name a file to export to")
    return storage, None


def _rules_of(rename: Rename | None) -> object:
    if isinstance(rename, Mapping):
        return sorted(f"{getattr(old, 'pattern', old)!r}: {_named(new)}" for old, new in rename.items())
    return _named(rename)


def _named(value: object) -> str | None:
    """Return what is the same of a value in all processes: of a function, which has an address, that it is one."""
    return None if value is None else "a function" if callable(value) else f"{value!r}"


def _mine(plans: list[FilePlan], comm: Communicator) -> list[int]:
    """Return the files that this rank writes: the largest first, each to the rank that has the least."""
    load = [0] * comm.world_size
    mine = []
    for number in sorted(range(len(plans)), key=lambda number: (-plans[number].nbytes, number)):
        rank = min(range(comm.world_size), key=lambda rank: (load[rank], rank))
        load[rank] += plans[number].nbytes
        if rank == comm.rank:
            mine.append(number)
    return sorted(mine)


def _plan(contents: Contents, options: ExportOptions, name: str | None) -> _Plan:
    if options.format == "torch":
        return _Plan([plan_torch_file(name or "model.pt", contents)], [])
    if options.format == "dcp":
        file, metadata = plan_dcp(contents)
        return _Plan([file], [metadata])
    if options.format == "zarr":
        return _Plan(*plan_zarr(name, contents))
    values = tuple(sorted(".".join(map(str, path)) for path in contents.values))
    tied = tuple(sorted(".".join(map(str, path)) for path in contents.aliases))
    if options.format == "mindspore":
        return _Plan([plan_mindspore(name or "model.ckpt", contents)], [], values, tied)
    if name is not None:
        return _Plan([plan_safetensors(name, contents.items)], [], values, tied)
    plans = shards_of(contents, options.max_shard_nbytes)
    small = [(INDEX, index_of(plans))] if len(plans) > 1 else []
    return _Plan(plans, small, values, tied)


def _check_absent(target: Storage, plan: _Plan, finish: bool) -> None:
    """Raise where a file is there already: an export replaces nothing, and leaves no mixture of two."""
    names = [*(one.name for one in plan.large), *(small for small, _ in plan.small)]
    there = [name for name in names if target.size(name) is not None]
    if finish and plan.small and plan.small[-1][0] not in there:
        there = []
    if any(name.endswith((".safetensors", INDEX)) for name in names) and len(names) > 1:
        others = (name for name in target.list() if name not in names)
        there += [name for name in others if name.endswith((".safetensors", ".safetensors.index.json"))]
    if there:
        raise StorageError(
            errno.EEXIST,
            f"{target.location(there[0])} exists already: export to a new place, or delete it first",
        )
