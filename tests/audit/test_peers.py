"""Ranks that hand out the same samples, as tensor-parallel peers do: the audit counts each sample once."""

from __future__ import annotations

import functools
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from stages import StageJob

import ckptengine as ce
from ckptengine.audit import Finding, audit
from ckptengine.data.cursor import Cursor
from ckptengine.data.digest import digest_of
from ckptengine.data.order import Shuffled

ALONE, FOUR, TWO = [(0, 1)], [(n, 4) for n in range(4)], [(n, 2) for n in range(2)]
CONTIGUOUS, STRIDED = [(0, 2), (0, 2), (1, 2), (1, 2)], [(0, 2), (1, 2), (0, 2), (1, 2)]
PEERS = [(0, 1)] * 4


def cursor_of(place: tuple[int, int], ranks: int) -> Cursor:
    """Return a cursor as a sampler makes it; a place that is the rank's own in the job is not repeated."""
    return Cursor(Shuffled(50, 3), 8, rank=place[0], world_size=place[1], repeated=place[1] != ranks)


def use(cursor: Cursor, batches: int) -> None:
    for batch in islice(cursor.plan(), batches):
        for begin, end in cursor.lists_of(batch.size):
            cursor.count(batch, begin, cursor.samples_of(batch, begin, end))
        cursor.complete(batch)


def saved(job: StageJob, step: int, cursors: list[Cursor], rank: int) -> None:
    job.checkpointers[rank].save(step, {"data": cursors[rank]}).durable.result(20)


def life(run: Path, places: list[tuple[int, int]], saves: int = 2, again: bool = False) -> list[Cursor]:
    """One life of a job whose ranks have these places; it saves after every two batches."""
    cursors = [cursor_of(place, len(places)) for place in places]
    with StageJob(run, len(places)) as job:
        states = [{"data": cursor} for cursor in cursors]
        for _ in range(1 + again):
            job.restore(states)
        for _ in range(saves):
            for cursor in cursors:
                use(cursor, 2)
            job.each(functools.partial(saved, job, cursors[0].batches, cursors))
    return cursors


def found(run: Path) -> list[Finding]:
    return list(audit(run).findings)


@pytest.mark.parametrize(
    "lives",
    [
        [CONTIGUOUS],
        [CONTIGUOUS, CONTIGUOUS],
        [CONTIGUOUS, STRIDED, CONTIGUOUS],
        [FOUR, CONTIGUOUS, FOUR, FOUR, STRIDED],
        [PEERS, FOUR, TWO, CONTIGUOUS, ALONE, PEERS, TWO],
    ],
)
def test_a_job_with_peers_is_clean_over_any_restarts(tmp_path: Path, lives: list[list[tuple[int, int]]]) -> None:
    """Each peer's digest counted: the ranks seemed to have handed out samples that the ledger does not have."""
    for places in lives:
        life(tmp_path / "run", places)
    assert found(tmp_path / "run") == []


def test_a_restore_in_the_middle_of_a_job_with_peers_counts_nothing_twice(tmp_path: Path) -> None:
    life(tmp_path / "run", CONTIGUOUS)
    life(tmp_path / "run", CONTIGUOUS, again=True)
    assert found(tmp_path / "run") == []


@pytest.mark.parametrize("rank", range(4))
def test_a_sample_that_one_of_the_peers_was_handed_twice_is_found(tmp_path: Path, rank: int) -> None:
    cursors = [cursor_of(place, 4) for place in CONTIGUOUS]
    with StageJob(tmp_path / "run", 4) as job:
        for step in (2, 4):
            for cursor in cursors:
                use(cursor, 2)
            if step == 4:
                cursors[rank]._tally = cursors[rank]._tally.plus(digest_of(0, np.array([42])), True)
            job.each(functools.partial(saved, job, step, cursors))
    findings = found(tmp_path / "run")
    assert {(finding.kind, finding.between) for finding in findings} == {("digest", (2, 4))}
    text = " ".join(finding.message for finding in findings)
    assert f"rank {rank + (rank % 2 == 0)} handed other samples to training than the ranks that have the same" in text
    assert ("sample 42 of epoch 0 was handed out once more" in text) == (rank % 2 == 0)


def test_samplers_that_are_given_the_place_of_a_peer_say_so_in_their_state() -> None:
    """A job of one rank, whose place is another: as where a rank of eight gives its data-parallel rank."""
    texts = []
    for place in ({}, {"rank": 0, "world_size": 1}, {"rank": 1, "world_size": 2}):
        sampler = ce.ElasticSampler(8, 4, **place)  # type: ignore[arg-type]
        next(sampler.batches())
        texts.append(sampler.state_dict()["digest"].value)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 32
    assert texts[2].endswith("@1")


def test_samplers_of_peers_are_clean(tmp_path: Path) -> None:
    samplers = [ce.ElasticSampler(50, 8, rank=rank // 2, world_size=2) for rank in range(4)]
    with StageJob(tmp_path / "run", 4) as job:
        for _ in zip(*(sampler.batches() for sampler in samplers), strict=True):
            pass
        job.save({"data": sampler} for sampler in samplers)
    assert found(tmp_path / "run") == []
