"""The policy in one process: when it saves, what it keeps, what a failed save does."""

import json
import logging
import resource
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from launch import environment
from short_runs import blank, file_of, restored, save_steps, state_at, steps_in

import ckptengine as ce
from ckptengine.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    SaveFailedError,
    StateError,
)


@contextmanager
def no_room():
    """Make files of more than a page impossible: the system's own refusal. Snapshots in new memory fail too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# When it saves.


def test_every_n_steps_saves_at_the_multiples_and_a_last_step_that_is_not_saved_is_told(tmp_path, caplog):
    with ce.Checkpointer(tmp_path, every=3) as ckpt:
        saved = [step for step in range(1, 11) if ckpt.step(step, state_at(step)) is not None]
        ckpt.wait()
        assert saved == [3, 6, 9] == [stats.step for stats in ckpt.history]
    assert steps_in(tmp_path) == [3, 6, 9]
    assert restored(tmp_path) == 9
    (told,) = (record.getMessage() for record in caplog.records)
    assert told == (
        f"step 10 of {tmp_path} was trained but not saved (saves are due every 3 steps): call ckpt.save(step, "
        "state) after the loop to save it"
    )


def test_of_a_last_step_that_is_saved_or_unwanted_or_whose_training_failed_nothing_is_told(tmp_path, caplog):
    with ce.Checkpointer(tmp_path / "saved", every=3) as ckpt:
        for step in range(1, 5):
            ckpt.step(step, state_at(step))
        ckpt.save(step, state_at(step))
    with ce.Checkpointer(tmp_path / "unwanted") as ckpt:
        ckpt.step(1, state_at(1))
    with pytest.raises(ZeroDivisionError), ce.Checkpointer(tmp_path / "failed", every=3) as ckpt:
        for step in range(1, 5):
            ckpt.step(step, state_at(step))
        1 / 0  # noqa: B018
    assert steps_in(tmp_path / "saved") == [3, 4]
    assert steps_in(tmp_path / "failed") == [3]
    assert not caplog.records


@pytest.mark.parametrize("first", [1, 1_000_000])
def test_a_time_interval_is_kept_wherever_a_life_begins(first, tmp_path):
    with ce.Checkpointer(tmp_path, every="0.2s") as ckpt:
        deadline, saved = time.monotonic() + 60, 0
        while saved < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
            first += 1
            saved += ckpt.step(first, {"a": 1}) is not None
        assert saved == 3


def test_a_time_interval_is_kept_after_going_back(tmp_path):
    with ce.Checkpointer(tmp_path, every="0.1s") as ckpt:
        ckpt.save(5, state_at(5)).durable.result(20)
        for step in range(100_000, 100_003):
            ckpt.step(step, state_at(step))
        assert ckpt.restore(blank(), step=5) == 5
        for step in range(6, 200):
            time.sleep(0.01)
            if ckpt.step(step, state_at(step)) is not None:
                return
    pytest.fail("no save fell due")


def test_without_an_interval_only_save_saves(tmp_path):
    with ce.Checkpointer(tmp_path) as ckpt:
        assert all(ckpt.step(step, state_at(step)) is None for step in range(10))
        ckpt.save(7, state_at(7))
    assert steps_in(tmp_path) == [7]


def test_the_same_step_is_saved_once_in_a_life(tmp_path):
    with ce.Checkpointer(tmp_path, every=5) as ckpt:
        first = ckpt.step(5, state_at(5))
        assert ckpt.save(5, state_at(5)) is first
        ckpt.wait()
        assert len(ckpt.history) == 1


@pytest.mark.parametrize("every", [0, -1, True, "10", "0s", "ten s", 1.5])
def test_an_interval_that_makes_no_sense_is_refused(every, tmp_path):
    with pytest.raises(ValueError, match="every="):
        ce.Checkpointer(tmp_path, every=every)


# What it keeps.


def test_keep_last_keeps_the_newest(tmp_path):
    save_steps(tmp_path, range(1, 8), keep_last=2)
    assert steps_in(tmp_path) == [6, 7]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000006", "step-00000007"]
    assert restored(tmp_path) == 7


def test_keep_every_keeps_multiples_too(tmp_path):
    save_steps(tmp_path, range(1, 12), keep_last=2, keep_every=4)
    assert steps_in(tmp_path) == [4, 8, 10, 11]


def test_keep_last_counts_along_the_line_that_led_to_the_newest(tmp_path):
    save_steps(tmp_path, [70, 80, 90, 100, 110])
    with ce.Checkpointer(tmp_path, keep_last=3) as ckpt:
        assert ckpt.restore(blank(), step=90) == 90
        ckpt.save(91, state_at(91))
    assert steps_in(tmp_path) == [80, 90, 91]


# What a failed save does.


def test_a_failed_save_is_a_warning_and_the_next_one_works(tmp_path, caplog):
    with ce.Checkpointer(tmp_path, every=1, timeout=20) as ckpt, caplog.at_level(logging.ERROR, "ckptengine"):
        ckpt.step(1, state_at(1))
        ckpt.wait()
        with no_room():
            handle = ckpt.step(2, state_at(2))
            with pytest.raises(CheckpointError, match="step-00000002.*File too large"):
                handle.durable.result(20)
            ckpt.wait()
        assert "step-00000002 was NOT saved" in caplog.text
        assert steps_in(tmp_path) == [1]
        ckpt.step(3, state_at(3)).durable.result(20)
        ckpt.wait()
        assert [stats.step for stats in ckpt.history] == [1, 3]
    assert restored(tmp_path) == 3


def test_failures_in_a_row_raise_in_the_end(tmp_path):
    for first in (1, 0):  # failing in the background, and in the call
        run = tmp_path / str(first)
        with pytest.raises(SaveFailedError, match=r"2 failure\(s\) in a row.*not affected"):  # noqa: SIM117
            with ce.Checkpointer(run, every=1, max_failures=2) as ckpt:
                for step in range(1, first + 1):
                    ckpt.step(step, state_at(step)).durable.result(20)
                with no_room():
                    for step in range(first + 1, 9):
                        ckpt.step(step, state_at(step))
        assert step <= first + 3
        # The call that raises has started its own save, which may find room again.
        assert [done for done in steps_in(run) if done != step] == list(range(1, first + 1))


def test_on_error_raise_raises_at_the_next_call_which_saves_all_the_same(tmp_path):
    with ce.Checkpointer(tmp_path, every=1, on_error="raise") as ckpt:
        ckpt.step(1, state_at(1)).durable.result(20)
        with no_room():
            handle = ckpt.step(2, state_at(2))
            assert handle.durable.wait(20)
        with pytest.raises(SaveFailedError, match="step-00000002 was not saved"):
            ckpt.step(3, state_at(3))
    assert steps_in(tmp_path) == [1, 3]


def test_a_state_that_can_not_be_saved_raises_at_once(tmp_path):
    with ce.Checkpointer(tmp_path, every=1) as ckpt:
        for _ in range(2):
            with pytest.raises(StateError, match="thing.inner"):
                ckpt.step(1, {"thing": {"inner": object()}})
        ckpt.step(2, state_at(2))
    assert steps_in(tmp_path) == [2]


def test_metadata_that_is_not_json_raises_before_anything_is_written(tmp_path):
    with pytest.raises(StateError, match="metadata"):
        ce.save(tmp_path / "single", {"a": 1}, metadata={"thing": object()})
    with pytest.raises(StateError, match="metadata"):  # noqa: SIM117
        with ce.Checkpointer(tmp_path / "run", every=1, metadata={"thing": object()}) as ckpt:
            ckpt.step(1, {"a": 1})
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("data-", "manifest-"))]
    ce.save(tmp_path / "single", {"a": 1}, metadata={"names": ["x", 1, None]})
    (manifest,) = (tmp_path / "single").glob("manifest-*")
    assert json.loads(manifest.read_text())["metadata"] == {"names": ["x", 1, None]}


def test_an_error_of_the_training_is_not_replaced_by_one_of_the_save(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with ce.Checkpointer(tmp_path, every=1, on_error="raise") as ckpt:
            ckpt.step(1, state_at(1)).durable.result(20)
            with no_room():
                ckpt.step(2, state_at(2)).durable.wait(20)
            1 / 0  # noqa: B018
    assert "was not saved" in caplog.text


# Single checkpoints, and the handle.


def test_a_checkpoint_that_is_saved_over_is_there_until_the_new_one_is(tmp_path):
    ce.save(tmp_path, state_at(1))
    with no_room(), pytest.raises(CheckpointError, match="File too large"):
        ce.save(tmp_path, state_at(2))
    assert ce.load(tmp_path)["step"] == 1
    ce.save(tmp_path, state_at(3))
    assert ce.load(tmp_path)["step"] == 3
    assert len(list(tmp_path.glob("manifest-*"))) == len(list(tmp_path.glob("data-*"))) == 1


def test_what_changes_after_staged_does_not_change_the_checkpoint(tmp_path):
    array = np.arange(2_000_000.0)
    values = {"list": [1, 2]}
    handle = ce.async_save(tmp_path, {"array": array, "values": values})
    assert handle.staged.done()
    assert handle.staged.result() is None
    array[:] = -1
    values["list"].append(3)
    stats = handle.durable.result(60)
    assert handle.durable.done()
    assert (stats.step, stats.path) == (None, str(tmp_path))
    assert stats.nbytes > array.nbytes
    assert 0 < stats.stall_seconds <= stats.durable_seconds
    loaded = ce.load(tmp_path)
    assert np.array_equal(loaded["array"], np.arange(2_000_000.0))
    assert loaded["values"] == {"list": [1, 2]}


def test_saves_of_one_group_follow_each_other(tmp_path):
    array = np.zeros(1_000_000)
    handles = []
    for number in range(4):
        array[:] = number
        handles.append(ce.async_save(tmp_path / str(number), {"array": array}))
    for number, handle in enumerate(handles):
        handle.durable.result(60)
        assert (ce.load(tmp_path / str(number))["array"] == number).all()


SCRIPT = """
import sys
import numpy as np
import ckptengine as ce

ce.async_save(sys.argv[1] + "/single", {"a": np.arange(3_000_000)})
ckpt = ce.Checkpointer(sys.argv[1] + "/run", every=1)
ckpt.step(7, {"a": np.arange(3_000_000)})
"""


def test_a_process_that_ends_waits_for_its_saves(tmp_path):
    job = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (job.returncode, job.stderr) == (0, "")
    assert np.array_equal(ce.load(tmp_path / "single")["a"], np.arange(3_000_000))
    assert steps_in(tmp_path / "run") == [7]


def test_nothing_partial_is_listed(tmp_path):
    # As a process leaves it that is killed before the commit.
    save_steps(tmp_path, [1, 2])
    file_of(tmp_path, 2, "manifest-0001.json").unlink()
    assert ce.load(tmp_path)["step"] == 1
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        ce.load(tmp_path / "step-00000002")
    assert restored(tmp_path) == 1
    file_of(tmp_path, 1, "manifest-0001.json").unlink()
    with ce.Checkpointer(tmp_path) as ckpt:
        assert ckpt.restore(blank()) is None
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        ce.load(tmp_path)
    assert save_steps(tmp_path, [2]) == [2]
    assert restored(tmp_path) == 2


def test_a_life_that_was_taken_over_can_not_commit_any_more(tmp_path):
    old = ce.Checkpointer(tmp_path, every=1)
    old.step(1, state_at(1))
    old.wait()
    with ce.Checkpointer(tmp_path, every=1) as new:
        assert new.restore(blank()) == 1
        new.step(2, state_at(2))
    with pytest.raises(SaveFailedError, match="taken over by generation 2"):
        old.step(3, state_at(3)).durable.result(20)
    with pytest.raises(SaveFailedError, match="the last save of this job failed.*taken over by generation 2"):
        old.close()
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("step", [10**18, 10**30])
def test_a_step_that_no_listing_would_find_is_refused(tmp_path, step):
    with ce.Checkpointer(tmp_path / "run", preemption=None) as ckpt:
        with pytest.raises(ValueError, match=r"steps count from 0 to 10\*\*18 - 1"):
            ckpt.save(step, {"w": np.zeros(3)})
        ckpt.save(10**18 - 1, {"w": np.ones(3)}).durable.result()
    state = {"w": np.zeros(3)}
    with ce.Checkpointer(tmp_path / "run", preemption=None) as again:
        assert again.restore(state) == 10**18 - 1
    assert state["w"][0] == 1


def test_a_step_below_one_that_was_saved_is_refused_unless_the_training_goes_back_by_restore(tmp_path):
    state = {"w": np.zeros(3)}
    with ce.Checkpointer(tmp_path / "run", keep_last=1, preemption=None) as ckpt:
        for step in (5, 10):
            ckpt.save(step, state).durable.result()
        with pytest.raises(ValueError, match=r"has saved step 10 already.*restore\(state, step=7\)"):
            ckpt.save(7, state)
        assert ckpt.save(10, state).durable.result().step == 10
        assert ckpt.restore(state, step=10) == 10
        ckpt.save(7, state).durable.result()
    with ce.Checkpointer(tmp_path / "run", preemption=None) as again:
        assert again.restore(state) == 7
