"""Preemption of a single process: real signals at awkward moments."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from forkserver import fork
from policy_jobs import HERE, environment, steps_in

import ckptengine as ce
from ckptengine.errors import Preempted


class Process:
    """A job whose lines are read as they come."""

    def __init__(self, run: Path, options: dict[str, Any]) -> None:
        self.popen = fork(
            [str(HERE / "alone_job.py"), str(run), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        self.lines: list[str] = []

    def until(self, start: str) -> str:
        """Read up to the first line with such a start, and return it."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith(start):
                return self.lines[-1]
        raise AssertionError(f"no line {start!r} came:\n" + "\n".join(self.lines))

    def send(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.popen.send_signal(number)

    def code(self) -> int:
        rest, _ = self.popen.communicate(timeout=120)
        self.lines += rest.splitlines()
        return self.popen.returncode

    def last_step(self) -> int:
        return max(int(line.split()[1]) for line in self.lines if line.startswith("step "))

    def logged(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]


@contextmanager
def started(run: Path, **options: Any) -> Iterator[Process]:
    process = Process(run, options)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.communicate()


def test_a_signal_saves_the_step_and_exits_with_the_code_and_the_job_goes_on_from_it(tmp_path: Path) -> None:
    for number, code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 99)):
        with started(tmp_path, code=code) as job:
            start = int(job.until("resumed").split()[1])
            job.until(f"step {start + 3}")
            job.send(number)
            assert job.code() == code
            assert steps_in(tmp_path)[-1] == job.last_step() > start
            assert len(job.logged(f"{number.name} on rank 0")) == 2  # what will be done, and that it is
            assert job.logged(f"step {job.last_step()} is saved; exiting with code {code}")
    assert len(steps_in(tmp_path)) == 2


def test_a_signal_during_a_save_waits_for_it_and_saves_the_step_that_has_come_since(tmp_path: Path) -> None:
    with started(tmp_path, at_steps=[5], slow={"create_archive": 0.5}) as job:
        job.until("create_archive")
        job.send()
        assert job.code() == 75
        assert steps_in(tmp_path) == [5, job.last_step()]


def test_before_the_first_step_a_signal_acts_as_it_would_without_us_and_harms_nothing(tmp_path: Path) -> None:
    with started(tmp_path, steps=3, every=3) as job:
        assert job.code() == 0
    with started(tmp_path, slow={"read_bytes": 60}) as job:
        job.until("read_bytes")  # in the middle of the restore
        job.send()
        assert job.code() == -signal.SIGTERM
        assert not job.logged("resumed")
    with started(tmp_path, before=60, file=str(tmp_path / "stop")) as job:
        job.until("resumed")  # an evaluation, or a loader that takes its time
        (tmp_path / "stop").touch()
        time.sleep(1.5)
        assert job.popen.poll() is None
        job.send(signal.SIGUSR1)
        assert job.code() == -signal.SIGUSR1
    assert steps_in(tmp_path) == [3]


def test_a_signal_saves_what_trains_whatever_other_checkpointers_the_process_has_or_had(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(tmp_path / "run-teacher", steps=2, every=2) as job:
        assert job.code() == 0
    with started(run, others=True) as job:
        job.until("step 3")
        job.send()
        assert job.code() == 75
    assert steps_in(run) == [job.last_step()]
    assert steps_in(tmp_path / "run-teacher") == [2]


def test_who_does_not_train_on_is_waited_for_as_long_as_the_timeout_and_the_log_says_so(tmp_path: Path) -> None:
    with started(tmp_path, every=2, idle_at=2, timeout=2, tell=0.5) as job:
        job.until("idle")
        job.send()
        assert job.code() == 128 + signal.SIGTERM
        told = "waiting for the training's next call of step or save since {} s; the process is ended in {} s"
        assert any(job.logged(told.format(since, left)) for since in range(3) for left in range(3))
        assert job.logged("the training did not come to its next step in time; step 2 is the last one committed")


def test_where_the_save_misses_the_deadline_the_process_is_gone_and_the_checkpoint_before_stands(
    tmp_path: Path,
) -> None:
    with started(tmp_path, every=2, steps=2) as job:
        assert job.code() == 0
    with started(tmp_path, grace=2, slow={"create_archive": 60}) as job:
        job.until("step 5")
        job.send()
        sent = time.monotonic()
        assert job.code() == 75
        assert time.monotonic() - sent < 30  # the write alone takes 60 s
        assert job.logged("was not durable in time; step 2 is the last one committed; rank 0 ends with code 75")
    assert steps_in(tmp_path) == [2]


def test_a_save_that_is_known_to_take_too_long_is_not_begun(tmp_path: Path) -> None:
    with started(tmp_path, at_steps=[3], wait_at=3, grace=2, pace=0.3, slow={"create_archive": 2.5}) as job:
        job.until("waited")
        job.send()
        assert job.code() == 75
        (told,) = job.logged("was not saved: that takes")
        assert "step 3 is the last one committed; exiting with code 75" in told
        assert len(job.logged("create_archive")) == 1
    assert steps_in(tmp_path) == [3]


def test_a_step_that_hangs_in_c_code_does_not_keep_the_process_beyond_the_deadline(tmp_path: Path) -> None:
    with started(tmp_path, grace=1, hang_at=3) as job:
        job.until("hanging")
        time.sleep(0.2)
        job.send()
        assert job.code() == 75
        assert job.logged("the training did not come to its next step in time; nothing is committed yet")
        assert not job.logged("step 3")


def test_a_second_signal_ends_the_process_at_once_but_not_the_launchers_echo_of_the_first(tmp_path: Path) -> None:
    with started(tmp_path, hang_at=3) as job:
        job.until("hanging")
        job.send()
        job.until("SIGTERM on rank 0")  # it has come
        job.send()  # the echo
        time.sleep(3.2)
        assert job.popen.poll() is None
        job.send()
        assert job.code() == 128 + signal.SIGTERM
        assert job.logged("SIGTERM came again")


def test_a_users_own_handler_is_called_too_and_gets_the_signal_back(tmp_path: Path) -> None:
    with started(tmp_path, own_handler=True, faulthandler=True) as job:
        job.until("step 3")
        job.send(signal.SIGUSR1)  # what a handler in C code does, it goes on doing
        job.until("Current thread")
        job.send()
        assert job.code() == 75
        assert job.logged("own handler 15")
        assert job.logged("SIGUSR1 has a handler in C code and is left alone")
    with started(tmp_path, own_handler=True, ignored=True, steps=2) as job:
        assert job.code() == 0
        assert job.logged("SIGTERM <function main")
        assert job.logged("SIGUSR1 1")  # it was ignored before, and was left so
        assert job.logged("SIGUSR1 is ignored in this process and is left alone")


def test_a_signal_to_a_forked_process_is_no_word_to_the_job(tmp_path: Path) -> None:
    with started(tmp_path, fork_at=2, steps=4) as job:
        child = int(job.until("child").split()[1])
        os.kill(child, signal.SIGUSR1)  # what SLURM sends to every process of a job
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)  # how a parent ends its workers
        assert job.until("child ended") == "child ended -15"
        assert job.code() == 0
        assert not job.logged("on rank 0")


def test_a_file_that_appears_ends_the_job_and_one_that_was_there_before_does_not(tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "stop"
    with started(run, file=str(file)) as job:
        job.until("step 3")
        file.touch()
        assert job.code() == 75
        assert job.logged(f"the file {file}: step {job.last_step()} is saved")
    with started(run, file=str(file)) as job:
        job.until("resumed")
        for _ in range(100):
            job.until("step")
        assert job.logged("exists already")
        file.write_text("again")
        assert job.code() == 75
    assert len(steps_in(run)) == 2


def test_ranks_of_different_speed_without_a_store_stop_at_the_step_that_the_fastest_has_come_to(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def rank(number: int, **options: Any) -> AbstractContextManager[Process]:
        return started(run, rank=number, ranks=2, meet=str(tmp_path / "meet"), pace=0.1 + 0.1 * number, **options)

    for name in ("preemption-living", "preemption-left"):
        (run / name).mkdir(parents=True)
    os.utime(run / "preemption-left", (time.time() - 600,) * 2)
    with rank(0) as fast, rank(1, before=3) as slow:
        fast.until("step 5")
        fast.send()  # the other is behind by some steps: it has not taken its first one
        assert [fast.code(), slow.code()] == [75, 75]
        assert steps_in(run) == [fast.last_step()] == [slow.last_step()]
    # Another job that has opened the run may be alive, and about to end as well.
    assert [path.name for path in run.glob("preemption-*")] == ["preemption-living"]
    shutil.rmtree(tmp_path / "meet")
    with rank(0) as sound, rank(1, fail_at=3) as failing:
        assert failing.code() == 1
        sound.until("step")
        sound.send()
        assert sound.code() == 75
        assert sound.logged("rank 1 ended with an error; step")


def test_in_another_thread_than_the_main_one_signals_are_left_alone_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def use() -> None:
        preemption = ce.Preemption(file=tmp_path / "stop")
        with ce.Checkpointer(tmp_path / "run", every=1, preemption=preemption) as ckpt:
            ckpt.step(1, {"a": 1})
            assert signal.getsignal(signal.SIGTERM) == before
            (tmp_path / "stop").touch()
            for step in range(2, 1000):
                ckpt.step(step, {"a": 1})
                time.sleep(0.02)

    with ThreadPoolExecutor(1, "trainer") as pool, pytest.raises(Preempted):
        pool.submit(use).result()
    text = caplog.text
    assert "trained in the thread trainer_0: SIGTERM, SIGUSR1 can be handled in the main thread only" in text
    assert "Preempted is raised in the thread trainer_0 and ends that thread only" in text


def test_signals_are_left_alone_without_preemption_and_given_back_by_the_last_who_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, wakeup = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with ce.Checkpointer(tmp_path / "none", every=5, preemption=None) as ckpt:
        ckpt.step(1, {"a": 1})
        assert signal.getsignal(signal.SIGTERM) == before
    first, second = (ce.Checkpointer(tmp_path / name, every=5) for name in ("first", "second"))
    assert signal.getsignal(signal.SIGTERM) == before
    first.step(1, {"a": 1})
    second.step(1, {"a": 1})
    assert f"{tmp_path}/first and {tmp_path}/second train in one process" in caplog.text
    first.close()  # not the last one that came
    assert signal.getsignal(signal.SIGTERM) != before
    second.close()
    assert signal.getsignal(signal.SIGTERM) == before
    forgotten = ce.Checkpointer(tmp_path / "forgotten", every=5)
    forgotten.step(1, {"a": 1})
    del forgotten
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(wakeup) == -1


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_a_checkpointer_that_ends_in_another_thread_leaves_no_signal_that_writes_into_files(
    how: str, tmp_path: Path
) -> None:
    ckpt = ce.Checkpointer(tmp_path / "run", every=5)
    ckpt.step(1, {"a": 1})
    with ThreadPoolExecutor(1) as pool:
        if how == "closed":
            pool.submit(ckpt.close).result()
        else:
            cycle: list[Any] = [ckpt]
            cycle.append(cycle)
            del ckpt, cycle
            pool.submit(gc.collect).result()
    files = [(tmp_path / f"file-{number}").open("wb", buffering=0) for number in range(16)]
    before = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    os.kill(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, before)
    for file in files:
        file.close()
        assert Path(file.name).read_bytes() == b""
    # The next one that ends in the main thread gives all back.
    with ce.Checkpointer(tmp_path / "run", every=1) as ckpt:
        ckpt.step(2, {"a": 1})
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signals": ("SIGNOTHING",)}, "SIGNOTHING"),
        ({"signals": ("SIGKILL",)}, "SIGKILL"),
        ({"signals": "SIGTERM"}, "tuple of names"),
        ({"grace": 0}, "grace=0"),
        ({"exit_code": 0}, "exit_code=0"),
        ({"exit_code": 256}, "exit_code=256"),
    ],
)
def test_a_preemption_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ce.Preemption(**arguments)
