"""Planning where a model is split in four ways, simulated in one process: `python -m benchmarks.split`.

Pipeline stages × data parallel shards × tensor parallel, or expert parallel, shards. Each stage has leaves, plain
values and optimizer groups that no other has. One rank of each stage plans in a thread of its own; what the other ranks
would tell is made up beforehand.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.scale import Crowd
from ckptengine.layout.holdings import holdings_of
from ckptengine.layout.survey import by_path, encode_boxes, survey_of, table_of
from ckptengine.save.planner import Planner, Taken
from ckptengine.save.reading import Reading, structure_of
from ckptengine.save.replicas import ReplicaCheck
from ckptengine.save.values import stored_values
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import ArrayLeaf, HostMemory, Part, Placement
from ckptengine.schema.path import Path
from ckptengine.state.asked import Asked
from ckptengine.state.tree import flatten_traced

TARGET_SECONDS = 1.0

_Cut = Callable[[int, int, int, int], Box]
"""From the rank's place among the data parallel and among the tensor parallel ranks, and the numbers of these."""


def _rows(first: int, last: int, rest: tuple[int, ...]) -> Box:
    return Box((first, *(0 for _ in rest)), (last - first, *rest))


KINDS: list[tuple[str, Callable[[int, int], tuple[int, ...]], _Cut]] = [
    ("norm", lambda d, t: (2 * d,), lambda i, j, d, t: _rows(2 * i, 2 * i + 2, ())),
    ("column", lambda d, t: (2 * d * t, 8), lambda i, j, d, t: _rows(2 * (j * d + i), 2 * (j * d + i) + 2, (8,))),
    ("row", lambda d, t: (3 * d, 4 * t), lambda i, j, d, t: Box((3 * i, 4 * j), (3, 4))),
    ("experts", lambda d, t: (t, 2 * d, 4), lambda i, j, d, t: Box((j, 2 * i, 0), (1, 2, 4))),
    ("fused", lambda d, t: (4 * d, 2 * t), lambda i, j, d, t: Box((4 * i, 2 * j), (4, 2))),
]
"""Leaves as in a transformer: their shapes, and which part of them a rank has."""


@dataclass(frozen=True)
class Mesh:
    """Pipeline stages of `data` × `tensor` ranks each, the tensor parallel ones beside each other."""

    stages: int
    data: int
    tensor: int

    @property
    def per_stage(self) -> int:
        return self.data * self.tensor

    @property
    def ranks(self) -> int:
        return self.stages * self.per_stage

    def stage_of(self, rank: int) -> int:
        return rank // self.per_stage

    def leaves_of(self, rank: int, leaves: int, only: Container[Path] | None = None) -> tuple[ArrayLeaf, ...]:
        """Return a rank's leaves of `leaves` in the whole model, without memory: nothing here looks at a byte."""
        stage, place = divmod(rank, self.per_stage)
        i, j = divmod(place, self.tensor)
        result = []
        for number in range(stage * leaves // self.stages, (stage + 1) * leaves // self.stages):
            name, shape, cut = KINDS[number % len(KINDS)]
            path = ("model", f"layers.{number // len(KINDS)}.{name}")
            if only is None or path in only:
                part = Part(cut(i, j, self.data, self.tensor), HostMemory(0, (), 0, 0, None))
                whole = shape(self.data, self.tensor)
                result.append(ArrayLeaf(path, "bfloat16", whole, Placement.SHARDED, (part,), "torch"))
        return tuple(result)


@dataclass
class Party:
    """The ranks that plan, one of each stage, and what they hear of all others."""

    mesh: Mesh
    boxes: list[bytes]
    """What each rank tells of its boxes."""
    said: list[bytes] = field(default_factory=list)
    heard: list[bytes] = field(default_factory=list)
    exchanges: int = 0

    def __post_init__(self) -> None:
        self.said = [b""] * self.mesh.stages
        self._barrier = threading.Barrier(self.mesh.stages)

    def exchange(self, stage: int, value: bytes) -> list[bytes]:
        """Return what all ranks say: those of a stage the same, but for documents, which the first alone sends."""
        self.said[stage] = value
        if self._barrier.wait() == 0:
            self.exchanges += 1
            firsts = range(0, self.mesh.ranks, self.mesh.per_stage)
            if self.exchanges == 3:  # the documents, after a word that all is well, and the digests
                self.heard = [b""] * self.mesh.ranks
                for first, said in zip(firsts, self.said, strict=True):
                    self.heard[first] = said
            elif self.exchanges == 4:
                assert [self.boxes[first] for first in firsts] == self.said
                self.heard = self.boxes
            else:
                self.heard = [self.said[self.mesh.stage_of(rank)] for rank in range(self.mesh.ranks)]
        self._barrier.wait()
        heard = list(self.heard)
        self._barrier.wait()
        return heard

    def abort(self) -> None:
        """End the waits of the others: one of them has failed."""
        self._barrier.abort()


class Member(Crowd):
    """The first rank of a stage: the ranks of other stages say something else."""

    def __init__(self, party: Party, stage: int) -> None:
        super().__init__(stage * party.mesh.per_stage, party.mesh.ranks)
        self._party, self._stage = party, stage

    def all_gather(self, value: bytes, timeout: float) -> list[bytes]:
        heard = self._party.exchange(self._stage, value)
        self.received += sum(map(len, heard))
        return heard


def reading_of(mesh: Mesh, stage: int, leaves: int) -> Reading:
    """Return the state of the first rank of a stage."""
    arrays = mesh.leaves_of(stage * mesh.per_stage, leaves)
    groups = [{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": decay} for decay in (0.0, 0.1)]
    plain, trace = flatten_traced(
        {"step": 1, f"stage {stage}": {"groups": groups, "names": [a.path[1] for a in arrays]}}
    )
    flat = replace(plain, arrays=arrays)
    return Reading({}, plain, structure_of(flat), flat.arrays, None, trace, [], Asked(), {})


def told_by_all(mesh: Mesh, leaves: int) -> list[bytes]:
    """Return what each rank tells of its boxes."""
    firsts = [stage * mesh.per_stage for stage in range(mesh.stages)]
    tables = [table_of(by_path(holdings_of(mesh.leaves_of(rank, leaves)), rank), rank, mesh.ranks) for rank in firsts]
    survey = survey_of(tables, np.repeat(np.arange(mesh.stages), mesh.per_stage))
    heads = {survey.groups[number].head.path for number in survey.told}
    return [encode_boxes(survey, holdings_of(mesh.leaves_of(rank, leaves, heads)), rank) for rank in range(mesh.ranks)]


def run(mesh: Mesh, leaves: int) -> dict[str, Any]:
    """Return what planning takes a rank: seconds of its thread's CPU, the worst of the stages, and bytes received."""
    party = Party(mesh, told_by_all(mesh, leaves))
    seconds, received = [0.0] * mesh.stages, [0] * mesh.stages
    problems: list[BaseException] = []

    def plan(stage: int) -> None:
        member = Member(party, stage)
        reading = reading_of(mesh, stage, leaves)
        values = stored_values(reading.plain)
        began = time.thread_time()
        try:
            planned = Planner(member).plan(Taken(reading, values), 60.0, ReplicaCheck.NEVER)
            if isinstance(planned, Exception):
                raise planned
        except BaseException as problem:
            problems.append(problem)
            party.abort()
        seconds[stage], received[stage] = time.thread_time() - began, member.received

    threads = [threading.Thread(target=plan, args=(stage,)) for stage in range(mesh.stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return {
        "ranks": mesh.ranks,
        "leaves": leaves,
        "stages": mesh.stages,
        "first_plan_seconds": max(seconds),
        "first_plan_bytes": max(received),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=16)
    parser.add_argument("--data", type=int, default=128)
    parser.add_argument("--tensor", type=int, default=8)
    parser.add_argument("--leaves", type=int, default=2_000)
    options = parser.parse_args()
    result = run(Mesh(options.stages, options.data, options.tensor), options.leaves)
    print(json.dumps({**result, "target_seconds": TARGET_SECONDS}, indent=1))


if __name__ == "__main__":
    main()
