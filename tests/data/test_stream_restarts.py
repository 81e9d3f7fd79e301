from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from launch import environment
from ranks import run_ranks

import ckptengine as ce

JOB = Path(__file__).with_name("stream_job.py")
COUNTS = [60, 131, 0, 88, 97, 45, 80]
LIVES = [(3, "0", "11"), (2, "1", "26"), (4,)]
STEPS_PER_EPOCH = 21  # 501 records by 24; the last 21 are one more global batch


def live(folder: Path, life: int, ranks: int, *kill: str) -> None:
    job = run_ranks(ranks, JOB, folder, life, *kill)
    assert job.returncode == (-signal.SIGKILL if kill else 0), job.stdout[-8000:]


def test_a_job_killed_twice_that_goes_on_with_two_and_then_four_ranks_uses_each_record_once_and_audits_clean(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    for number, count in enumerate(COUNTS):
        lines = "".join(f"{1000 * number + n}\n" for n in range(count))
        (tmp_path / "data" / f"shard-{number}.jsonl").write_text(lines)
    starts: list[int] = []
    steps: dict[int, list[dict]] = {}
    for life, (ranks, *kill) in enumerate(LIVES):
        live(tmp_path, life, ranks, *kill)
        logs = [
            [json.loads(line) for line in (tmp_path / f"life-{life}-rank-{rank}.jsonl").read_text().splitlines()]
            for rank in range(ranks)
        ]
        starts.append(logs[0][0]["start"])
        # What came after the checkpoint that this life went on from is undone.
        steps = {step: entries for step, entries in steps.items() if step <= starts[-1]}
        for entry in (entry for log in logs for entry in log):
            steps.setdefault(entry["step"], []).append(entry)
    assert starts[0] == 0
    assert starts[1] in (4, 8)
    assert 20 <= starts[2] <= 24
    assert sorted(steps) == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    every = Counter(1000 * number + n for number, count in enumerate(COUNTS) for n in range(count))
    for epoch in range(2):
        entries = [entry for all_ranks in steps.values() for entry in all_ranks if entry["epoch"] == epoch]
        assert Counter(record for entry in entries for record in entry["ids"]) == every
    assert all(sum(len(entry["ids"]) for entry in steps[step]) == 24 for step in steps if step % 21)
    audit = [sys.executable, "-m", "ckptengine", "audit", str(tmp_path / "run"), "--json"]
    audited = subprocess.run(audit, env=environment(), capture_output=True, text=True, timeout=60)
    assert audited.returncode == 0, audited.stdout + audited.stderr
    (cursor,) = json.loads(audited.stdout)["report"]["cursors"]
    assert cursor["order"]["kind"] == "lanes"
    assert [life["world_size"] for life in cursor["lives"]] == [3, 2, 4]
    position = ce.load(tmp_path / "run")["data"]
    assert (position["epoch"], position["consumed"], position["batches"]) == (2, 0, 42)
