"""Real jobs that are killed in mid-epoch and started again, with what they used noted by the jobs themselves."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

from ranks import run_ranks
from sampler_job import LENGTH

from ckptengine.audit import AuditReport, audit

JOB = Path(__file__).parent / "sampler_job.py"


def run_job(folder: Path, ranks: int, kill_at: int, *, workers: int, batch: int, micro: int, last: str) -> None:
    job = run_ranks(ranks, JOB, folder, 2, kill_at, workers, batch, micro, last)
    assert job.returncode == (-signal.SIGKILL if kill_at else 0), job.stdout[-8000:]


def used_by(folder: Path, ranks: list[int]) -> Counter[tuple[int, int]]:
    """Return (epoch, sample) of what training used; what a life used after its last save was undone by the next."""
    lives = [[(folder / f"life-{life}-{rank}.txt").read_text().splitlines() for rank in range(n)]
             for life, n in enumerate(ranks)]  # fmt: skip
    starts = [int(logs[0][0]) for logs in lives]
    used: Counter[tuple[int, int]] = Counter()
    for life, logs in enumerate(lives):
        upto = starts[life + 1] if life + 1 < len(lives) else 1 << 60
        for line in (line for log in logs for line in log[1:]):
            step, epoch, *samples = map(int, line.split())
            if step <= upto:
                used.update((epoch, sample) for sample in samples)
    return used


def audited(folder: Path) -> AuditReport:
    report = audit(folder / "run")
    assert report.clean, report.findings
    return report


WHOLE = Counter((epoch, sample) for epoch in range(2) for sample in range(LENGTH))


def test_a_killed_loader_with_workers_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Two workers, three lists ahead each; killed in each epoch, once where the last save is two batches old."""
    for kill_at in (5, 13, 0):  # restored from 0 → 3, 12; 75 samples are 9 batches of 8 and one of 3
        run_job(tmp_path, 1, kill_at, workers=2, batch=8, micro=0, last="ragged")
    assert used_by(tmp_path, [1, 1, 1]) == WHOLE
    [cursor] = audited(tmp_path).cursors
    assert [life.batches for life in cursor.lives] == [(0, 2), (3, 11), (12, 19)]
    assert (cursor.epoch, cursor.consumed, cursor.batches) == (2, 0, 20)


def test_three_ranks_killed_and_two_that_go_on_use_each_sample_once(tmp_path: Path) -> None:
    """Five micro-batches: 1, 2, 2 on three ranks, 2, 3 on two; padded at each epoch's end.

    After the first one rank 0 is done with its global batch, the others are not: a save then fails on all.
    """
    for ranks, kill_at in ((3, 5), (2, 0)):
        run_job(tmp_path, ranks, kill_at, workers=0, batch=20, micro=4, last="pad")
    refused = [(tmp_path / f"refused-{rank}.txt").read_text() for rank in range(3)]
    assert refused[0].startswith("StateError: taking the state apart failed on rank(s) 1, 2: rank 1: data.cursor: ")
    for text in refused:
        assert "data.cursor: global batch 0 is half used (this rank has handed 1 of its 2 micro-batches" in text
    used = used_by(tmp_path, [3, 2])
    assert set(used) == set(WHOLE)
    [cursor] = audited(tmp_path).cursors
    assert [(life.world_size, life.batches, life.padding) for life in cursor.lives] == [(3, (0, 2), 0), (2, (3, 7), 10)]
    assert sum(used.values()) == 2 * LENGTH + 10
    assert json.loads(json.dumps(cursor.order)) == {"kind": "shuffled", "length": LENGTH, "seed": 9}
