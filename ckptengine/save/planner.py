"""Who writes what, and where in its file: planned together once, then reused."""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckptengine.archive.image import Image, plan_image
from ckptengine.archive.names import archive_name
from ckptengine.comm.agree import on_all
from ckptengine.comm.alike import in_words
from ckptengine.comm.base import Communicator
from ckptengine.comm.distinct import gather_distinct
from ckptengine.errors import StateError
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

__all__ = ["Plan", "Planned", "Planner", "Taken"]

_TOKEN_NBYTES = 12
_COMPARES, _NEVER = b"+", b"-"
"""What a rank says that compares replicas, and one that does not."""

_log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True)
class Taken:
    """A state that was taken apart: its leaves, and its values as they are stored."""

    reading: Reading
    values: StoredValues


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


@dataclass(frozen=True, slots=True)
class Planned:
    """A state that was taken apart, and what this rank writes of it."""

    taken: Taken
    plan: Plan


class Planner:
    """Keeps the plan between saves; its `plan` is the only exchange between ranks that a save may need."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._plan: Plan | None = None
        self._together = True
        self._told: str = ""
        self._session = ""
        self._attempts = 0
        self._compared = False  # whether the last call of `plan` has compared the contents of replicated arrays
        self._again = False  # whether the save after the last exchange compares them once more

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

    def take_comparison(self, plan: Plan, check: ReplicaCheck) -> bool:
        """Return whether this save compares replicated arrays as it copies them, and note that it does; once a save."""
        # A plan that was made alone has not been compared; the coordinator does it with the receipts.
        first = check is ReplicaCheck.FIRST and (plan.alone or self._again)
        wanted = check is ReplicaCheck.ALWAYS or first
        compares = wanted and not self._compared and self._comm.world_size > 1
        self._again = self._again and not compares
        return compares

    def plan(
        self, taken: Taken | Exception, timeout: float, check: ReplicaCheck = ReplicaCheck.FIRST
    ) -> Planned | Exception:
        """Return this rank's plan of a state, or what keeps this rank from one, such as what kept it from the state.

        Where the ranks exchange plans, they compare their replicated arrays too, unless `check` says never.
        Raises, on all ranks, what any of them has to say in an exchange. What concerns this rank alone is returned:
        the caller reports it in the background, as no other rank waits for it here.
        """
        self._compared = False
        if self._together or self._plan is None:
            return self._plan_together(taken, timeout, check)
        if isinstance(taken, Exception):
            return taken
        if not self.changed(taken.reading):
            return Planned(taken, self._plan)
        previous, reading = self._plan, taken.reading
        try:
            holdings = tuple(holdings_of(reading.leaves))
            assigned = assign_alone(previous.assigned, previous.holdings, holdings, self._comm.rank)
            self._plan = self._lay_out(reading, holdings, assigned, previous.shares, previous.copies, alone=True)
        except Exception as problem:
            return problem
        return Planned(taken, self._plan)

    def _plan_together(self, taken: Taken | Exception, timeout: float, check: ReplicaCheck) -> Planned | Exception:
        compare = check is not ReplicaCheck.NEVER and self._comm.world_size > 1
        said = on_all(self._comm, functools.partial(self._say, taken, compare), timeout, "taking the state apart")
        shares, assigned, copies = self._exchange(said, timeout, compare)
        self._together, self._compared = False, compare
        reading = said.taken.reading
        # A tensor that nobody has declared may be all zeros at the first save, and so the same on all ranks. So may
        # learning rates that stages warm up from 0.
        split = any(leaf.by_hand for leaf in reading.leaves)
        self._again = compare and (split or _has_tensors_in_groups(reading))
        try:
            self._plan = self._lay_out(reading, said.holdings, assigned, shares, copies, alone=False)
        except Exception as problem:
            return problem
        return Planned(said.taken, self._plan)

    def _say(self, taken: Taken | Exception, compare: bool) -> _Said:
        """Return what this rank tells the others; raises what kept it from the state."""
        if isinstance(taken, Exception):
            raise taken
        rank, leaves = self._comm.rank, taken.reading.leaves
        mine = tuple(by_path(holdings_of(leaves), rank))
        check_own(mine, rank)
        crcs = b""
        buffers: Crcs = ()
        if compare:
            crcs = encode_crcs(with_aliases(replica_crcs(leaves), taken.reading.plain.aliases))
            buffers = undeclared_crcs(leaves)
        said = [encode_said(taken.values), table_of(mine, rank, self._comm.world_size).encode(), crcs]
        return _Said(taken, mine, said, buffers)

    def _exchange(self, mine: _Said, timeout: float, compare: bool) -> tuple[Shares, list[Assigned], frozenset[Path]]:
        """Find out what all ranks hold; return who stores what of the values, what this rank is to write, and copies.

        Ranks whose leaves are spread in the same way say the same, so mostly digests travel, in one exchange. Raises
        the same on all ranks, from the same data, before anything is written.
        """
        rank, world_size, values = self._comm.rank, self._comm.world_size, mine.taken.values
        token = secrets.token_hex(_TOKEN_NBYTES // 2).encode() if rank == 0 else b""
        note = (_COMPARES if compare else _NEVER) + token + note_of(mine.buffers)
        notes, (words, tables, replicas) = gather_distinct(self._comm, note, mine.said, timeout)
        _check_comparing([one[:1] == _COMPARES for one in notes])
        first, *others = (one[1:] for one in notes)
        self._session, self._attempts = first[:_TOKEN_NBYTES].decode(), 0
        tell_differing(mine.buffers, [first[_TOKEN_NBYTES:], *others], rank)
        said_of = [decode_said(document) for document in words.documents] if len(words.documents) > 1 else []
        shares = share_out(rank, values, said_of, words.of_rank)
        survey = survey_of([Table.decode(table) for table in tables.documents], np.asarray(tables.of_rank, np.int64))
        if said_of or any(group.holders.size < world_size for group in survey.groups):
            paths_of = [one.paths for one in said_of] or [values.paths]
            check_nesting({head.path for head, _ in survey.leaves}, paths_of)
            forms = shares.forms or (values.form,)  # rank 0 sees later which ones of other ranks are new
            objects = (one.path for form in forms for one in form.outline.containers if one.kind == "object")
            shares.in_part = objects_in_part(objects, survey, paths_of, shares.aliases)
            self._tell(on_some_ranks(survey, paths_of, words.of_rank) if rank == 0 else None)
        boxes: Mapping[int, Boxes] = {}
        if survey.told:
            own = encode_boxes(survey, mine.holdings, rank)
            survey, boxes = decode_boxes(survey, self._comm.all_gather(own, timeout))
        if len(replicas.documents) > 1:
            ranks_of = [np.flatnonzero(np.asarray(replicas.of_rank) == n) for n in range(len(replicas.documents))]
            crcs_of = map(decode_crcs, replicas.documents)
            compare_replicas([(ranks.tolist(), own) for ranks, own in zip(ranks_of, crcs_of, strict=True)])
        assigned = assign(survey, boxes, rank, mine.holdings)
        copies = copies_in(survey, boxes)
        if compare:
            compare_copies(self._comm, survey, copies, mine.taken.reading.leaves, timeout)
        return shares, assigned, frozenset(head.path for head, number in survey.leaves if number in copies)

    def _lay_out(
        self,
        reading: Reading,
        holdings: tuple[Holding, ...],
        assigned: list[Assigned],
        shares: Shares,
        copies: frozenset[Path],
        *,
        alone: bool,
    ) -> Plan:
        rank = self._comm.rank
        image = plan_image(archive_name(rank), rank, assigned)
        rows = rows_of(image, assigned, rank)
        return Plan(reading.structure, holdings, tuple(assigned), image, rows, shares, copies, alone)

    def _tell(self, found: tuple[int, str] | None) -> None:
        """Log once what only some ranks have."""
        if found is not None and found[1] != self._told:
            self._told = found[1]
            _log.log(*found)


@dataclass(frozen=True, slots=True)
class _Said:
    """What a rank holds by path, and what it tells the others: `said` by digests where they say the same.

    `buffers` are the CRCs of what nobody has declared.
    """

    taken: Taken
    holdings: tuple[Holding, ...]
    said: list[bytes]
    buffers: Crcs


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


def _check_comparing(compares: Sequence[bool]) -> None:
    """Raise `StateError` where some ranks are to compare replicas and others not: that takes all of them."""
    if len(set(compares)) > 1:
        raise StateError(in_words("check_replicas", ["first or always" if one else "never" for one in compares]))
