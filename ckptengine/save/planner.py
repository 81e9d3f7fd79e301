"""Who writes what, and where in its file: planned together once, then reused."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ckptengine.archive.image import Image, plan_image
from ckptengine.archive.names import archive_name
from ckptengine.comm.agree import agree
from ckptengine.comm.base import Communicator
from ckptengine.comm.distinct import gather_distinct
from ckptengine.layout.assign import Assigned, assign, assign_alone, check_own
from ckptengine.layout.holdings import Holding, holdings_of
from ckptengine.layout.rank_rows import RankRows
from ckptengine.layout.survey import Boxes, Table, by_path, decode_boxes, encode_boxes, survey_of, table_of
from ckptengine.save.copies import compare_copies, copies_in
from ckptengine.save.reading import Reading, Structure
from ckptengine.save.replicas import (
    Crcs,
    ReplicaCheck,
    compare_replicas,
    decode_crcs,
    encode_crcs,
    replica_crcs,
    with_aliases,
)
from ckptengine.save.shares import Shares, decode_said, encode_said, share_out
from ckptengine.save.some_ranks import check_nesting, objects_in_part, on_some_ranks
from ckptengine.save.undeclared import note_of, tell_differing, undeclared_crcs
from ckptengine.save.values import StoredValues
from ckptengine.schema.path import Path, is_inside

__all__ = ["Plan", "Planner"]

_TOKEN_NBYTES = 12

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rank writes of a state of one structure.

    `image` is its archive, `rows` say where in it each box lies, `shares` which shared values it stores. `copies` are
    the paths of sharded arrays of which several ranks hold the same box. `alone` says that the other ranks don't know
    it.
    """

    structure: Structure
    holdings: tuple[Holding, ...]
    assigned: tuple[Assigned, ...]
    image: Image
    rows: RankRows
    shares: Shares
    copies: frozenset[Path]
    alone: bool


class Planner:
    """Keeps the plan between saves; its `plan` is the only exchange between ranks that a save may need."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._plan: Plan | None = None
        self._together = True
        self._shares: Shares | None = None
        self._told: str = ""
        self._session = ""
        self._attempts = 0
        self._copies: frozenset[Path] = frozenset()
        self.compared = False
        """Whether the last call of `plan` has compared the contents of replicated arrays."""
        self.again = False
        """Whether the save after the last exchange compares them once more."""

    def next_attempt(self) -> str:
        """Return the next attempt's id, the same on all ranks: each exchange begins a new series under a new token."""
        attempt = self.coming_attempt
        self._attempts += 1
        return attempt

    @property
    def coming_attempt(self) -> str:
        """The id that the next attempt has, unless the ranks exchange plans before."""
        return f"{self._session}-{self._attempts + 1}"

    def changed(self, reading: Reading | None) -> bool:
        """Return whether a state has another structure than the plan."""
        if reading is None or self._plan is None:
            return True
        return reading.structure is not self._plan.structure and reading.structure != self._plan.structure

    @property
    def together(self) -> bool:
        """Whether all ranks plan together at the next save."""
        return self._together

    def together_next(self) -> None:
        """Have all ranks plan together at the next save. Every rank learns this from the commit's result."""
        self._together = True

    def plan(
        self,
        reading: Reading | None,
        values: StoredValues | None,
        error: Exception | None,
        timeout: float,
        check: ReplicaCheck = ReplicaCheck.FIRST,
    ) -> tuple[Plan | None, Exception | None]:
        """Return this rank's plan of a state, or what keeps this rank from one; `error` is what kept it from leaves.

        Where the ranks exchange plans, they compare their replicated arrays too, unless `check` says never.
        Raises, on all ranks, what any of them has to say in an exchange. What concerns this rank alone is returned:
        the caller reports it in the background, as no other rank waits for it here.
        """
        previous = None if self._together else self._plan
        self.compared = False
        if previous is None:
            compare = check is not ReplicaCheck.NEVER and self._comm.world_size > 1
            holdings, assigned = self._exchange(reading, values, error, timeout, compare)
            self._together, self.compared = False, compare
            # A tensor that nobody has declared may be all zeros at the first save, and so the same on all ranks. So may
            # learning rates that stages warm up from 0.
            self.again = (
                compare
                and reading is not None
                and (any(leaf.by_hand for leaf in reading.leaves) or _has_tensors_in_groups(reading))
            )
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
        self,
        reading: Reading | None,
        values: StoredValues | None,
        error: Exception | None,
        timeout: float,
        compare: bool,
    ) -> tuple[tuple[Holding, ...], list[Assigned]]:
        """Find out what all ranks hold; return what this one holds, by path, and what it is to write.

        Ranks whose leaves are spread in the same way say the same, so mostly digests travel, in one exchange. Raises
        the same on all ranks, from the same data, before anything is written.
        """
        rank, world_size = self._comm.rank, self._comm.world_size
        mine: tuple[Holding, ...] = ()
        said: list[bytes] = []
        buffers: Crcs = ()
        if reading is not None and values is not None and error is None:
            try:
                mine = tuple(by_path(holdings_of(reading.leaves), rank))
                check_own(mine, rank)
                crcs = b""
                if compare:
                    crcs = encode_crcs(with_aliases(replica_crcs(reading.leaves), reading.plain.aliases))
                    buffers = undeclared_crcs(reading.leaves)
                said = [encode_said(values), table_of(mine, rank, world_size).encode(), crcs]
            except Exception as problem:
                error = problem
        agree(self._comm, error, timeout, "taking the state apart")
        token = secrets.token_hex(_TOKEN_NBYTES // 2).encode() if rank == 0 else b""
        notes, (words, tables, replicas) = gather_distinct(self._comm, token + note_of(buffers), said, timeout)
        self._session, self._attempts = notes[0][:_TOKEN_NBYTES].decode(), 0
        tell_differing(buffers, [notes[0][_TOKEN_NBYTES:], *notes[1:]], rank)
        assert values is not None
        said_of = [decode_said(document) for document in words.documents] if len(words.documents) > 1 else []
        self._shares = share_out(rank, values, said_of, words.of_rank)
        survey = survey_of([Table.decode(table) for table in tables.documents], np.asarray(tables.of_rank, np.int64))
        if said_of or any(group.holders.size < world_size for group in survey.groups):
            paths_of = [one.paths for one in said_of] or [values.paths]
            check_nesting({head.path for head, _ in survey.leaves}, paths_of)
            forms = self._shares.forms or (values.form,)  # rank 0 sees later which ones of other ranks are new
            objects = (one.path for form in forms for one in form.outline.containers if one.kind == "object")
            self._shares.in_part = objects_in_part(objects, survey, paths_of, self._shares.aliases)
            self._tell(on_some_ranks(survey, paths_of, words.of_rank) if rank == 0 else None)
        boxes: Mapping[int, Boxes] = {}
        if survey.told:
            survey, boxes = decode_boxes(survey, self._comm.all_gather(encode_boxes(survey, mine, rank), timeout))
        if len(replicas.documents) > 1:
            ranks_of = [np.flatnonzero(np.asarray(replicas.of_rank) == n) for n in range(len(replicas.documents))]
            crcs_of = map(decode_crcs, replicas.documents)
            compare_replicas([(ranks.tolist(), own) for ranks, own in zip(ranks_of, crcs_of, strict=True)])
        assigned = assign(survey, boxes, rank, mine)
        copies = copies_in(survey, boxes)
        self._copies = frozenset(head.path for head, number in survey.leaves if number in copies)
        if compare and reading is not None:
            compare_copies(self._comm, survey, copies, reading.leaves, timeout)
        return mine, assigned

    def _lay_out(
        self, structure: Structure, holdings: tuple[Holding, ...], assigned: list[Assigned], alone: bool
    ) -> Plan:
        rank = self._comm.rank
        image = plan_image(archive_name(rank), rank, assigned)
        assert self._shares is not None
        return Plan(
            structure,
            holdings,
            tuple(assigned),
            image,
            rows_of(image, assigned, rank),
            self._shares,
            self._copies,
            alone,
        )

    def _tell(self, found: tuple[int, str] | None) -> None:
        """Log once what only some ranks have."""
        if found is not None and found[1] != self._told:
            self._told = found[1]
            _log.log(*found)


def rows_of(image: Image, assigned: list[Assigned], rank: int) -> RankRows:
    """Return where in a rank's archive each box lies that it writes."""
    position = np.zeros(len(image.chunks), np.int64)
    for chunk in image.chunks:
        position[chunk.order] = chunk.position
    return RankRows.of(rank, assigned, position)


def _has_tensors_in_groups(reading: Reading) -> bool:
    """Whether groups of optimizers hold tensors, as a learning rate under `capturable`."""
    groups = frozenset(reading.plain.groups)
    return any(is_inside(leaf.path, groups) for leaf in reading.leaves) or any(
        is_inside(path, groups) for path in reading.plain.aliases
    )
