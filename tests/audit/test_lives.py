"""`ckptengine audit` over several lives: new beginnings, prefetchers, other steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audited import findings_of, moved, report_of, train
from cli_run import Call
from launch import environment

import ckptengine as ce
from ckptengine.audit import audit
from ckptengine.errors import CheckpointNotFoundError


def life(run: Path, sampler: ce.ElasticSampler, upto: int, *, name: str = "data", **restore: Any) -> None:
    """One life of a job on one rank that saves every step, up to a global batch."""
    state = {"model": np.zeros(3), name: sampler}
    with ce.Checkpointer(run, every=1, preemption=None) as ckpt:
        ckpt.restore(state, **restore)
        while sampler.global_batches < upto:
            for _ in sampler.batches():
                ckpt.step(sampler.global_batches, state)
                if sampler.global_batches >= upto:
                    break


@pytest.mark.parametrize(("length", "data"), [(32, "the same data"), (40, "other data")])
def test_a_run_that_goes_on_with_a_cursor_from_the_start_is_two_stretches_and_clean(
    tmp_path: Path, call: Call, length: int, data: str
) -> None:
    """As `restore(only=[...])` without the cursor gives it, and a restart of that."""
    life(tmp_path, ce.ElasticSampler(32, 8), 5)
    life(tmp_path, ce.ElasticSampler(length, 8), 7, only=["model"])
    life(tmp_path, ce.ElasticSampler(length, 8), 11)
    before, after = report_of(call, tmp_path, 0)["cursors"]
    assert (before["batches"], after["batches"]) == (5, 11)
    assert before["order"]["length"] == 32
    assert after["order"]["length"] == length
    assert [len(before["lives"]), len(after["lives"])] == [1, 2]
    assert before["notes"] == []
    [note] = after["notes"]
    assert f"has a cursor of {data} that was not loaded when step 5 of generation 1" in note
    # Its beginning is known as one also where retention has deleted all of its life.
    for manifest in tmp_path.glob("step-*/manifest-0002.json"):
        manifest.unlink()
    before, after = report_of(call, tmp_path, 0)["cursors"]
    assert (before["batches"], after["batches"]) == (5, 11)
    assert after["lives"][0]["generation"] is None


def test_a_job_that_saves_before_it_takes_a_batch_counts_no_life_and_is_clean(tmp_path: Path, call: Call) -> None:
    life(tmp_path, ce.ElasticSampler(32, 8), 5)
    for step in (6, 7):  # two jobs that save at once and end
        sampler = ce.ElasticSampler(32, 8)
        with ce.Checkpointer(tmp_path, preemption=None) as ckpt:
            ckpt.restore({"model": np.zeros(3), "data": sampler})
            ckpt.save(step, {"model": np.zeros(3), "data": sampler})
    life(tmp_path, ce.ElasticSampler(32, 8), 9)
    [cursor] = report_of(call, tmp_path, 0)["cursors"]
    assert [(one["generation"], one["steps"]) for one in cursor["lives"]] == [(1, [1, 5]), (4, [6, 9])]
    assert cursor["batches"] == 9
    for step in (6, 7):  # what tells of the idle jobs
        for manifest in tmp_path.glob(f"step-0000000{step}/manifest-000[23].json"):
            manifest.unlink()
    [cursor] = report_of(call, tmp_path, 0)["cursors"]
    assert cursor["batches"] == 9


def test_a_repeat_is_found_in_the_stretch_before_a_new_beginning(tmp_path: Path, call: Call) -> None:
    train(tmp_path, ranks=2, upto=25, meddle=moved(-5))
    life(tmp_path, ce.ElasticSampler(40, 8), 4, only=["model"])
    [(kind, between, _)] = findings_of(call, tmp_path)
    assert (kind, between) == ("repeat", [15, 20])


def test_a_cursor_that_has_gone_from_the_state_is_found(tmp_path: Path, call: Call) -> None:
    life(tmp_path, ce.ElasticSampler(32, 8), 3)
    state = {"model": np.zeros(3)}
    with ce.Checkpointer(tmp_path, every=1, preemption=None) as ckpt:
        ckpt.restore(state, strict=False)
        for step in range(4, 7):
            ckpt.step(step, state)
    [(kind, between, message)] = findings_of(call, tmp_path)
    assert (kind, between) == ("cursor", [3, 4])
    assert message.startswith("step 4 has no such cursor any more, step 3 has")


def test_a_cursor_that_another_one_replaces_at_a_restart_is_noted(tmp_path: Path, call: Call) -> None:
    life(tmp_path, ce.ElasticSampler(32, 8), 3)
    life(tmp_path, ce.ElasticSampler(40, 8), 6, name="tuning", only=["model"])
    first, second = report_of(call, tmp_path, 0)["cursors"]
    assert (first["name"], second["name"]) == ("data", "tuning")
    assert first["notes"] == ["it ends with step 3: from step 1 on, after a restart, the state has tuning in its place"]


def ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Take each batch while the one before is used, as a prefetcher to a device does."""
    following = next(batches, None)
    while following is not None:
        batch, following = following, next(batches, None)
        yield batch


class Ahead:
    """The same around what a sampler's `batches` is given."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return ahead(iter(self.loader))


def numbered(run: Path, upto: int, batches: Callable[[ce.ElasticSampler], Iterator[Any]], each: int = 1) -> list[int]:
    """One life of a job that counts its steps itself, each of them `each` batches; return the samples it used."""
    sampler = ce.ElasticSampler(40, 4, shuffle=False)
    state = {"model": np.zeros(3), "data": sampler}
    used: list[int] = []
    with ce.Checkpointer(run, every=1, preemption=None) as ckpt:
        step = ckpt.restore(state) or 0
        while step < upto:
            for number, samples in enumerate(batches(sampler), start=1):
                used += samples
                if number % each == 0:
                    step += 1
                    ckpt.step(step, state)
                    if step >= upto:
                        break
    return used


def test_a_prefetcher_around_the_batches_loses_some_at_a_restart_and_is_found(tmp_path: Path, call: Call) -> None:
    used = [sample for upto in (14, 27) for sample in numbered(tmp_path, upto, lambda s: ahead(s.batches()))]
    assert len(used) == 27 * 4
    [(kind, between, message)] = findings_of(call, tmp_path)
    assert (kind, between) == ("step", [14, 15])
    assert message.startswith("from step 14 to step 15 training used 2 global batches, over a restart; else it is 1")


def test_a_prefetcher_around_the_loader_loses_nothing(tmp_path: Path, call: Call) -> None:
    def batches(sampler: ce.ElasticSampler) -> Iterator[Any]:
        return sampler.batches(Ahead(sampler))

    used = [sample for upto in (14, 20) for sample in numbered(tmp_path, upto, batches)]
    assert used == [*range(40), *range(40)]
    [cursor] = report_of(call, tmp_path, 0)["cursors"]
    assert cursor["notes"] == []


def test_several_global_batches_in_each_step_are_noted_once_and_no_finding(tmp_path: Path, call: Call) -> None:
    for upto in (7, 12):
        numbered(tmp_path, upto, lambda sampler: sampler.batches(), each=2)
    [cursor] = report_of(call, tmp_path, 0)["cursors"]
    assert cursor["notes"] == ["each step used 2 global batches"]


def test_batches_that_are_drawn_and_not_used_within_a_life_are_noted(tmp_path: Path, call: Call) -> None:
    """`zip` draws a batch more before it sees that the range is over."""
    numbered(tmp_path, 6, lambda sampler: (samples for samples, _ in zip(sampler.batches(), range(3), strict=False)))
    [cursor] = report_of(call, tmp_path, 0)["cursors"]
    assert cursor["notes"] == ["from step 3 to step 4 training used 2 global batches"]


JOB = """
import sys, time
import numpy as np, ckptengine as ce
sampler = ce.ElasticSampler(300, 1)
state = {"model": np.zeros(1000), "data": sampler}
with ce.Checkpointer(sys.argv[1], every=1, keep_last=1, preemption=None) as ckpt:
    for _ in sampler.batches():
        ckpt.step(sampler.global_batches, state)
        time.sleep(0.005)
"""


def test_a_run_that_goes_on_is_clean_though_its_checkpoints_are_deleted_meanwhile(tmp_path: Path) -> None:
    job = subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path)], env=environment())
    audits = 0
    try:
        while job.poll() is None:
            try:
                report = audit(tmp_path)
            except CheckpointNotFoundError:
                assert not audits  # before its first checkpoint
                continue
            assert report.clean, report.findings
            audits += 1
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 0
    assert audits > 10
    assert audit(tmp_path).cursors[0].batches == 300
