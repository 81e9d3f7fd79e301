"""A storage reader for torch's distributed checkpoint: its planner says what is wanted, this engine reads it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.futures import Future

import ckptengine._native as _native
from ckptengine.catalog.naming import open_checkpoint
from ckptengine.dcp.meshes import refuse_unordered
from ckptengine.dcp.metadata import Contents, contents_of
from ckptengine.errors import CheckpointError, CheckpointNotFoundError, LoadMismatchError
from ckptengine.frameworks.numpy import NumpyAdapter
from ckptengine.frameworks.registry import framework
from ckptengine.load.checkpoint import Checkpoint, Opened, naming
from ckptengine.load.choose import newest_or_foreign
from ckptengine.load.fill import plan_filling, read_ranges
from ckptengine.policy.arguments import checked_seconds
from ckptengine.save.saver import DEFAULT_TIMEOUT
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import ArrayLeaf, Part
from ckptengine.schema.path import Path, is_inside
from ckptengine.state.extents import extents, sharing
from ckptengine.state.tree import unflatten
from ckptengine.storage.within import within
from ckptengine.torch.tensor import dtype_name

__all__ = ["Reader"]

_NUMPY = NumpyAdapter()

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One tensor to fill: the item, its target, the leaf and box to read, and the memory that takes it.

    `memory` is the target's own where it can be. With `again` the target is filled by another item, too.
    """

    item: ReadItem
    target: torch.Tensor
    number: int
    box: Box
    memory: torch.Tensor
    again: bool = False


class Reader(StorageReader):
    """Read a checkpoint of this engine from within `torch.distributed.checkpoint.load`.

    Give it as `storage_reader=`. `path` is what the writer was given, or a run of `ckptengine.Checkpointer`, of which
    the newest checkpoint is taken or that of `step`; or what torch's own writer, Hugging Face or `torch.save` wrote
    (docs/foreign.md); or a URL, with fsspec's `storage_options`. Each rank reads what it needs, in whatever sharding,
    and every byte of our own checkpoints is verified. `timeout` bounds each wait for the storage, in seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint_id: str | os.PathLike[str] = path
        self.load_id = str(uuid.uuid4())
        self._step, self._options = step, storage_options
        self._timeout = checked_seconds("timeout", timeout)
        self._alone = False
        self._problem: CheckpointError | None = None
        self.problem: CheckpointError | None = None
        """Why the checkpoint could not be opened. Versions of torch before 2.13 do not pass it on."""
        self._found: tuple[Opened, Contents] | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take the next checkpoint's path."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self.load_id = str(uuid.uuid4())
        self.problem = self._problem = self._found = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the checkpoint holds; with `rank`, of what that rank has saved without collectives.

        Torch asks with `rank` when the first call has failed. Where a checkpoint of all ranks is there and could not be
        read, that is not an answer, but an older checkpoint: then the error is raised again.

        Raises `CheckpointNotFoundError`, `CheckpointDamagedError`, `FormatVersionError`, `StorageError`.
        """
        checkpoint, contents = self._open(kwargs.get("rank"))
        save_id = checkpoint.manifest.attempt if isinstance(checkpoint, Checkpoint) else None
        metadata = contents.metadata
        metadata.storage_meta = StorageMeta(checkpoint_id=self.checkpoint_id, save_id=save_id, load_id=self.load_id)
        return metadata

    def _open(self, rank: int | None) -> tuple[Opened, Contents]:
        self._alone = rank is not None
        if self._alone and self._problem is not None:
            raise self._problem
        self._problem = None
        try:
            self._found = self._read(rank)
        except CheckpointError as problem:
            self.problem = self.problem or problem
            if not self._alone and not isinstance(problem, CheckpointNotFoundError):
                self._problem = problem
            raise
        return self._found

    def _read(self, rank: int | None) -> tuple[Opened, Contents]:
        path = os.fspath(self.checkpoint_id)
        if rank is not None:
            path = f"{path.rstrip('/')}/rank-{rank}"
        storage = open_checkpoint(path, self._options, self._step, self._timeout)

        def look(checkpoint: Opened) -> tuple[Opened, Contents]:
            with naming(checkpoint.location):
                return checkpoint, contents_of(checkpoint)

        return within(self._timeout, f"reading {storage.location()}", lambda: newest_or_foreign(storage, look))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `read_metadata` has opened the checkpoint."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan with the checkpoint that this rank has opened."""
        return replace(plan, storage_data=None if self._alone else _identity(self._opened()[0]))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Raise `LoadMismatchError` where the ranks have opened different checkpoints; return the plans as they are."""
        attempts = [plan.storage_data for plan in plans]
        other = next((rank for rank, attempt in enumerate(attempts) if attempt != attempts[0]), None)
        if other is not None:
            raise LoadMismatchError(
                f"{self._opened()[0].location}: ranks 0 and {other} have opened different checkpoints: it was replaced "
                "meanwhile, or they don't see the same directory; load again"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors and give it the plain values; returns when all is there.

        A tensor of another dtype than the saved one is converted, as torch's own readers do, which is told at WARNING.
        Raises `LoadMismatchError` for what does not fit, `CheckpointDamagedError` naming the file.
        """
        refuse_unordered(planner)
        checkpoint, contents = self._opened()
        wanted = [
            self._wanted(item, planner, checkpoint, contents)
            for item in plan.items
            if item.type is LoadItemType.TENSOR and 0 not in item.lengths
        ]
        self._fill(checkpoint, _apart(wanted))
        for one in wanted:
            planner.commit_tensor(one.item, one.target)
        for item in plan.items:
            if item.type is not LoadItemType.BYTE_IO:
                continue
            buffer = io.BytesIO()
            torch.save(self._object(item.storage_index.fqn, checkpoint, contents), buffer)  # in memory: what it takes
            buffer.seek(0)
            planner.load_bytes(item, buffer)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this reader takes such an id: any path, and any URL."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    def _opened(self) -> tuple[Opened, Contents]:
        return self._found or self._open(None)

    def _wanted(self, item: ReadItem, planner: LoadPlanner, checkpoint: Opened, contents: Contents) -> _Wanted:
        name, offset = item.storage_index.fqn, item.storage_index.offset
        if name not in contents.tensors:
            raise LoadMismatchError(f"{checkpoint.location} has no tensor {name}")
        record = checkpoint.rows.leaves[contents.tensors[name]]
        start = [0] * len(record.shape) if offset is None else offset
        box = Box(tuple(a + b for a, b in zip(start, item.storage_offsets, strict=True)), tuple(item.lengths))
        target = planner.resolve_tensor(item).detach()
        if isinstance(target, DTensor):
            target = target.to_local()
        if tuple(target.shape) != box.shape:
            raise LoadMismatchError(f"{name}: a piece of shape {box.shape} does not fit a tensor of {target.shape}")
        memory = target
        if dtype_name(target.dtype) != record.dtype:
            memory = framework("torch").empty(record.dtype, box.shape)
        return _Wanted(item, target, contents.tensors[name], box, memory)

    def _read_leaves(self, checkpoint: Opened, reads: list[tuple[int, ArrayLeaf]]) -> None:
        """Read what leaves of the checkpoint, by their numbers, have for parts in this rank's memory."""
        with naming(checkpoint.location):
            doing = f"reading {checkpoint.location}"
            plan = functools.partial(plan_filling, checkpoint, reads, self._timeout)
            filling = within(self._timeout, doing, plan, _native.counters)
            with contextlib.closing(filling):
                read_ranges(filling, filling.needs, self._timeout)
                filling.finish()

    def _fill(self, checkpoint: Opened, wanted: list[_Wanted]) -> None:
        adapter = framework("torch")
        reads = []
        for one in wanted:
            record = checkpoint.rows.leaves[one.number]
            view = adapter.view(one.memory, record.path, target=True)
            parts = tuple(Part(one.box, part.memory) for part in view.parts)
            reads.append(
                (one.number, ArrayLeaf(record.path, record.dtype, record.shape, record.placement, parts, "torch"))
            )
        self._read_leaves(checkpoint, reads)
        cast = []
        for one in wanted:
            name = one.item.dest_index.fqn
            converted = one.memory
            if converted.dtype != one.target.dtype:
                cast.append(f"{name} ({converted.dtype} to {one.target.dtype})")
                converted = converted.to(one.target.dtype)
            if one.again:
                if not _same_bits(one.target, converted):
                    raise LoadMismatchError(
                        f"{name}: shares memory with another tensor of the state, and the checkpoint has different "
                        "values for the two; give each memory of its own"
                    )
            elif one.memory is not one.target:
                one.target.copy_(converted)
        if cast:
            more = f" and {len(cast) - 8} more" if len(cast) > 8 else ""
            _log.warning("%s: converted: %s%s", checkpoint.location, ", ".join(cast[:8]), more)

    def _object(self, name: str, checkpoint: Opened, contents: Contents) -> Any:
        """Return a plain value; tensors that lie inside it are read."""
        if name not in contents.objects:
            raise LoadMismatchError(f"{checkpoint.location} has no value {name}")
        where = contents.holding.get(name)
        if where is None:
            return contents.objects[name]
        saved = contents.saved
        inside = [path for path in (*saved.leaves, *saved.aliases) if is_inside(path, {where})]
        firsts = list(dict.fromkeys(saved.aliases.get(path, path) for path in inside))
        arrays, reads = {}, []
        for path in firsts:
            leaf = saved.leaves[path]
            adapter = _NUMPY if leaf.container == _NUMPY.name else framework("torch")
            arrays[path] = adapter.empty(leaf.dtype, leaf.shape)
            parts = adapter.view(arrays[path], path, target=True).parts
            target = ArrayLeaf(path, leaf.dtype, leaf.shape, leaf.placement, parts, adapter.name)
            reads.append((checkpoint.rows.index[path, None], target))
        self._read_leaves(checkpoint, reads)
        values = {path: value for path, value in saved.values.items() if is_inside(path, {where})}
        tensors = {path: arrays[saved.aliases.get(path, path)] for path in inside}
        found: Any = unflatten(values, tensors, _within(saved.containers, where), {})
        for key in where:
            found = found[key]
        return found


def _identity(checkpoint: Opened) -> str:
    """Return what tells a checkpoint from every other one."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.manifest.attempt
    return hashlib.sha256(checkpoint.description.encode()).hexdigest()


def _within(containers: Mapping[Path, Any], where: Path) -> dict[Path, Any]:
    return {path: form for path, form in containers.items() if is_inside(path, {where})}


def _apart(wanted: list[_Wanted]) -> list[_Wanted]:
    """Give those that share memory with one before them memory of their own: two reads never fill one place."""
    places = []
    adapter = framework("torch")
    for one in wanted:
        view = adapter.view(one.target, (), target=True)
        leaf = ArrayLeaf((), view.dtype, view.shape, view.placement, view.parts, "torch")
        places.append(extents(leaf))
    later = {number for group in sharing(places) for number in group[1:]}
    return [
        replace(one, memory=_apart_from(one), again=True) if number in later else one
        for number, one in enumerate(wanted)
    ]


def _apart_from(one: _Wanted) -> torch.Tensor:
    if one.memory is not one.target:
        return one.memory
    return torch.empty_like(one.target, memory_format=torch.contiguous_format)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape are equal bit for bit."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.element_size())
    if bits is None:
        return torch.equal(torch.view_as_real(one), torch.view_as_real(other))
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits).to(one.device))
