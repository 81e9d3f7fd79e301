"""Who writes what, and where in its file: planned together once, then reused."""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ckptengine import _native
from ckptengine.archive.image import BLOCK_NBYTES, Image, plan_image
from ckptengine.archive.names import archive_name
from ckptengine.comm.agree import agree
from ckptengine.comm.base import Communicator
from ckptengine.comm.distinct import gather_distinct
from ckptengine.layout.assign import Assigned, assign, assign_alone, check_own
from ckptengine.layout.holdings import Holding, holdings_of
from ckptengine.layout.rank_rows import RankRows
from ckptengine.layout.survey import Boxes, Table, by_path, decode_boxes, encode_boxes, survey_of, table_of
from ckptengine.save.reading import Reading, Structure
from ckptengine.save.values import StoredValues, compare_values
from ckptengine.snapshot.threads import copy_threads
from ckptengine.state.dtypes import DTYPES
from ckptengine.state.leaf import ArrayLeaf, HostMemory, Path, Placement

__all__ = ["Plan", "Planner", "replica_crcs"]

_PATHS_NBYTES = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rank writes of a state of one structure.

    `image` is its archive, `rows` say where in it each box lies. `alone` says that the other ranks don't know it.
    """

    structure: Structure
    holdings: tuple[Holding, ...]
    assigned: tuple[Assigned, ...]
    image: Image
    rows: RankRows
    alone: bool


class Planner:
    """Keeps the plan between saves; its `plan` is the only exchange between ranks that a save may need."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._plan: Plan | None = None
        self._together = True
        self._session = ""
        self._attempts = 0

    def next_attempt(self) -> str:
        """Return the next attempt's id, the same on all ranks: each exchange begins a new series under a new token."""
        self._attempts += 1
        return f"{self._session}-{self._attempts}"

    def changed(self, reading: Reading | None) -> bool:
        """Return whether a state has another structure than the plan."""
        if reading is None or self._plan is None:
            return True
        return reading.structure is not self._plan.structure and reading.structure != self._plan.structure

    def together_next(self) -> None:
        """Have all ranks plan together at the next save. Every rank learns this from the commit's result."""
        self._together = True

    def plan(
        self, reading: Reading | None, values: StoredValues | None, error: Exception | None, timeout: float
    ) -> tuple[Plan | None, Exception | None]:
        """Return this rank's plan of a state, or what keeps this rank from one; `error` is what kept it from leaves.

        Raises, on all ranks, what any of them has to say in an exchange. What concerns this rank alone is returned:
        the caller reports it in the background, as no other rank waits for it here.
        """
        previous = None if self._together else self._plan
        if previous is None:
            holdings, assigned = self._exchange(reading, values, error, timeout)
            self._together = False
        elif reading is None or error is not None or not self.changed(reading):
            return (None if error is not None else previous), error
        assert reading is not None
        try:
            if previous is not None:
                holdings = tuple(holdings_of(reading.leaves))
                assigned = assign_alone(previous.assigned, previous.holdings, holdings, self._comm.rank)
            self._plan = self._lay_out(reading.structure, holdings, assigned, alone=previous is not None)
        except Exception as problem:
            return None, problem
        return self._plan, None

    def _exchange(
        self, reading: Reading | None, values: StoredValues | None, error: Exception | None, timeout: float
    ) -> tuple[tuple[Holding, ...], list[Assigned]]:
        """Find out what all ranks hold; return what this one holds, by path, and what it is to write.

        Ranks whose leaves are spread in the same way say the same, so mostly digests travel, in one exchange. Raises
        the same on all ranks, from the same data, before anything is written.
        """
        rank, world_size = self._comm.rank, self._comm.world_size
        mine: tuple[Holding, ...] = ()
        said: list[bytes] = []
        if reading is not None and values is not None and error is None:
            try:
                mine = tuple(by_path(holdings_of(reading.leaves), rank))
                check_own(mine, rank)
                said = [_packed_values(values), table_of(mine, rank, world_size).encode()]
            except Exception as problem:
                error = problem
        agree(self._comm, error, timeout, "taking the state apart")
        token = secrets.token_hex(6).encode() if rank == 0 else b""
        tokens, (distinct_values, tables) = gather_distinct(self._comm, token, said, timeout)
        self._session, self._attempts = tokens[0].decode(), 0
        if len(distinct_values.documents) > 1:
            unpacked = [_unpacked_values(document) for document in distinct_values.documents]
            compare_values([unpacked[number] for number in distinct_values.of_rank])
        survey = survey_of([Table.decode(table) for table in tables.documents], np.asarray(tables.of_rank, np.int64))
        boxes: Mapping[int, Boxes] = {}
        if survey.told:
            boxes = decode_boxes(survey, self._comm.all_gather(encode_boxes(survey, mine), timeout))
        return mine, assign(survey, boxes, rank, mine)

    def _lay_out(
        self, structure: Structure, holdings: tuple[Holding, ...], assigned: list[Assigned], alone: bool
    ) -> Plan:
        rank = self._comm.rank
        image = plan_image(archive_name(rank), rank, assigned)
        return Plan(structure, holdings, tuple(assigned), image, rows_of(image, assigned, rank), alone)


def rows_of(image: Image, assigned: list[Assigned], rank: int) -> RankRows:
    """Return where in a rank's archive each box lies that it writes."""
    position = np.zeros(len(image.chunks), np.int64)
    for chunk in image.chunks:
        position[chunk.order] = chunk.position
    return RankRows.of(rank, assigned, position)


def replica_crcs(leaves: Iterable[ArrayLeaf]) -> tuple[tuple[Path, int], ...]:
    """Return path and the CRC32 of each replicated array, of its bytes in C order; reads every byte of them."""
    result = []
    for leaf in leaves:
        if leaf.placement is not Placement.REPLICATED or not leaf.parts:
            continue
        (part,) = leaf.parts
        memory = part.memory
        dtype = DTYPES[leaf.dtype]
        if not isinstance(memory, HostMemory):
            host = np.empty(part.box.shape, dtype.numpy)
            memory.copy_to_host(host)
            result.append((leaf.path, _native.crc32(np.ascontiguousarray(host).reshape(-1).view(np.uint8))))
            continue
        nbytes, shape = part.box.volume * dtype.itemsize, part.box.shape
        op = [0, nbytes, 0, dtype.itemsize, len(shape), memory.address, memory.low, memory.nbytes]
        table = np.array([*op, *shape, *shape, *memory.strides], np.int64)
        index = np.array([0, table.size], np.int64)
        pieces = np.zeros(-(-nbytes // BLOCK_NBYTES), np.uint32)
        _native.pack(0, nbytes, table, index, BLOCK_NBYTES, pieces, copy_threads())
        result.append((leaf.path, _native.crc32(pieces)))
    return tuple(result)


def _packed_values(values: StoredValues) -> bytes:
    """Return the paths of the plain values and their digests as one document."""
    paths = json.dumps([list(path) for path in values.paths]).encode()
    return _PATHS_NBYTES.pack(len(paths)) + paths + values.digests


def _unpacked_values(document: bytes) -> tuple[tuple[Path, ...], bytes]:
    end = _PATHS_NBYTES.size + _PATHS_NBYTES.unpack_from(document)[0]
    return tuple(tuple(path) for path in json.loads(document[_PATHS_NBYTES.size : end])), document[end:]
