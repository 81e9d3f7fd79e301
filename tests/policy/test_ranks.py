"""Preemption of several ranks, under torchrun and without it: one step, one checkpoint, one exit code."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from policy_jobs import Job, steps_in

import ckptengine as ce


def under_way(job: Job, life: int, steps: int = 3) -> bool:
    """Return whether all ranks have made some steps in a life."""
    begun = zip(job.told("began", life), job.told("resumed", life), strict=True)
    return all(began is not None and began >= (resumed or 0) + steps for began, resumed in begun)


def check_stopped(job: Job, life: int) -> int:
    """Return the step that all ranks have saved at the end of a life, after it is shown that they have."""
    job.wait_for(lambda: None not in job.told("code", life), f"all ranks have left life {life}")
    assert set(job.told("code", life)) == {75}
    (step,) = set(job.told("preempted", life))
    # The call of `step` in which they stopped has not returned on any rank, and the one before has on all.
    assert job.told("began", life) == [step] * job.ranks
    assert job.told("did", life) == [step - 1] * job.ranks
    assert steps_in(job.run)[-1] == step
    return step


@pytest.mark.long
@pytest.mark.timeout(600)  # three starts of torchrun's ranks, which a busy machine makes long
def test_torchrun_starts_a_preempted_job_again_and_it_goes_on_from_the_agreed_step(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    with Job(tmp_path, 2, 10_000, restarts=3, every=10_000, file=str(file), slow_write=0.3) as job:

        def wait_for_life(life: int) -> None:
            job.wait_for(lambda: under_way(job, life), f"life {life} trains")

        wait_for_life(0)
        os.kill(job.pid(1), signal.SIGTERM)  # in the middle of a step: it is slow, rank 0 waits for it
        stopped = [check_stopped(job, 0)]
        wait_for_life(1)
        assert job.told("resumed", 1) == [stopped[0]] * 2
        file.touch()
        stopped.append(check_stopped(job, 1))
        wait_for_life(2)
        assert job.told("resumed", 2) == [stopped[1]] * 2
        job.processes[0].send_signal(signal.SIGTERM)  # the agent passes it on, waits for the ranks, and ends
        job.codes()
        stopped.append(check_stopped(job, 2))
        printed = job.output.read_text()
        assert printed.count("exiting with code 75") == 3  # by rank 0 alone, once in each life
        for reason in ("SIGTERM on rank 1", f"the file {file}", "SIGTERM on rank "):
            assert f"{reason}" in printed
    assert steps_in(tmp_path / "run") == stopped


def test_ranks_all_exit_with_the_code_also_when_a_save_is_in_flight_and_one_answers_late(tmp_path: Path) -> None:
    with Job(tmp_path, 3, 10_000, restarts=None, every=5, slow_write=0.5) as job:
        job.wait_for(lambda: under_way(job, 0, 6), "the first save is in flight")
        # It answers as late as a rank would whose C code keeps Python's threads from running.
        job.processes[1].send_signal(signal.SIGSTOP)
        os.kill(job.pid(2), signal.SIGTERM)
        time.sleep(8)
        job.processes[1].send_signal(signal.SIGCONT)
        assert job.codes() == [75, 75, 75], job.printed()
        step = check_stopped(job, 0)
    assert [saved for saved in steps_in(job.run) if saved % 5] == [step] * (step % 5 > 0)


def test_a_grace_period_that_is_too_short_leaves_the_last_committed_step_and_no_process(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(3, {"weights": np.full(1000, 3, np.float32), "epoch": 0})
    with Job(tmp_path, 2, 10_000, restarts=None, every=10_000, slow_write=60, grace=3) as job:
        job.wait_for(lambda: under_way(job, 0), "it trains")
        os.kill(job.pid(1), signal.SIGUSR1)
        sent = time.monotonic()
        assert job.codes() == [75, 75], job.printed()
        assert time.monotonic() - sent < 40
        assert "was not durable in time; step 3 is the last one committed" in job.printed()
    assert steps_in(tmp_path / "run") == [3]


def test_where_a_rank_is_dead_the_others_do_not_wait_for_it(tmp_path: Path) -> None:
    # Without collectives, by which the others would notice it at their next step.
    with Job(tmp_path, 3, 10_000, restarts=None, every=10_000, pace=0.2, apart=True) as job:
        job.wait_for(lambda: under_way(job, 0, 2), "it trains")
        job.processes[1].kill()
        os.kill(job.pid(2), signal.SIGTERM)
        assert [job.codes()[rank] for rank in (0, 2)] == [75, 75], job.printed()
        # Not that it did not answer: that would take the whole time for answers.
        assert "the ranks could not agree on a step: rank 1 ended without a word; nothing" in job.printed()


@pytest.mark.long
def test_a_job_with_epochs_that_loses_a_node_ends_after_the_planned_epochs(tmp_path: Path) -> None:
    epochs, batches = 3, 12
    with Job(tmp_path, 1, epochs, restarts=3, nodes=2, script="epochs_job.py", pace=0.1) as job:
        killed_in = batches + batches // 2 + 1  # in the second epoch
        job.wait_for(lambda: min(step or 0 for step in job.told("did")) >= killed_in, "the second epoch")
        assert {entry["ranks"] for entry in job.log(0)} == {2}
        parents = [int(Path(f"/proc/{job.pid(rank)}/stat").read_text().split()[3]) for rank in range(2)]
        lost = parents.index(job.processes[1].pid)
        job.processes[1].kill()
        os.kill(job.pid(lost), signal.SIGKILL)
        assert job.processes[0].wait(120) == 0, job.printed()
        entries = job.log(0)
    first = next(place for place, entry in enumerate(entries) if entry["ranks"] == 1)
    before, after = entries[:first], entries[first:]
    resumed = after[0]["resumed"]
    assert resumed % 5 == 0
    assert batches < resumed <= before[-1].get("did", 0)
    # Only what was left of the planned epochs, and in the end each sample was used once in each.
    assert [entry["did"] for entry in after if "did" in entry] == list(range(resumed + 1, epochs * batches + 1))
    assert set(after[-1]["ended"]) == {epochs}
    assert steps_in(job.run)[-1] == epochs * batches // 5 * 5
