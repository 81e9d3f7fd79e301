"""Trainers that are killed: `kill_runs.py random RUN KILLS SEED` or `kill_runs.py sweep FOLDER`.

This process forks one trainer after the other, so that Python's start is paid once, kills it (or has it kill
itself at a chosen disk operation), and after each death checks that the newest committed state comes back.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from trained import ELEMENTS, age, committed_steps, fill, same, state_at

import ckptengine as ce
from ckptengine.storage.disk import Disk

OPERATIONS = (
    "make_directory", "create", "write", "write_memory", "sync", "sync_directory", "rename", "publish", "unlink",
    "remove_tree", "remove_directory",
)  # fmt: skip
DIVISIBLE = ("write", "write_memory", "publish", "remove_tree")
"""Those that are several steps for the kernel; after any other one is before the next."""


def train(run: Path, log: Path, steps: int, notice: int = -1, elements: int = ELEMENTS) -> None:
    """Restore, compare, and train; a step is logged once its checkpoint is durable.

    To the descriptor `notice` goes a byte before each save.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    in_flight: deque[tuple[int, Any]] = deque()

    def note() -> None:
        while in_flight and in_flight[0][1].durable.done():
            step, handle = in_flight.popleft()
            handle.durable.result(0)
            os.write(descriptor, f"{step}\n".encode())
            os.fsync(descriptor)

    with ce.Checkpointer(run, every=1, keep_last=3, on_error="raise", timeout=60) as checkpointer:
        state = state_at(0, elements)
        start = checkpointer.restore(state) or 0
        assert same(state, state_at(start, elements)), f"step {start} did not come back as it was"
        for step in range(start + 1, start + 1 + steps):
            fill(state, step)
            if notice >= 0:
                os.write(notice, b".")
            in_flight.append((step, checkpointer.step(step, state)))
            note()
        checkpointer.wait()
        note()


def forked(work: Callable[[], None]) -> int:
    """Run something in a child and return its process id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return process


def check(run: Path, log: Path, known: Container[int] = ()) -> list[int]:
    """Compare what is listed with what was logged; return the steps that are listed, whole unless `known` to be."""
    steps = committed_steps(run, known)
    logged = [int(line) for line in log.read_text().split()] if log.exists() else []
    newest = max(logged, default=0)
    assert (steps[-1] if steps else 0) >= newest, f"step {newest} was durable, there are {steps}"
    return steps


def kill_at_random(run: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill `kills` trainers: each in one of its first saves, at a moment within it that a seed chooses.

    How long a save takes here and now is measured all the time, so that a busy machine changes nothing.
    """
    chance, log = random.Random(seed), run.parent / "durable.log"
    newest, certain, each = [], 0, 0.1
    whole: set[int] = set()
    for _ in range(kills):
        saves = chance.randint(0, 5)
        ours, theirs = os.pipe()
        process = forked(lambda theirs=theirs: train(run, log, 10**6, theirs))
        os.close(theirs)
        for number in range(saves):
            began = time.monotonic()
            assert os.read(ours, 1), "the trainer ended by itself"
            if number:
                each += 0.2 * (time.monotonic() - began - each)
        time.sleep(chance.uniform(0.0, 1.2 * each))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(ours)
        assert os.WIFSIGNALED(status), "the trainer ended by itself"
        # A save begins when the one before is durable, except that the first two are told one after the other.
        certain += max(0, saves - 2)
        whole.update(steps := check(run, log, whole))
        newest.append(max(steps, default=0))
        assert newest == sorted(newest), newest
        assert newest[-1] >= certain, (newest, certain)
    check(run, log)  # all of them once more, after all that has happened since
    return {"newest": newest}


def die_at(number: int, half: bool) -> None:
    """Have this process killed at its `number`-th disk operation from now on: before it, or in the
    middle of one that is divisible.
    """
    count = 0

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Disk, name)

        def operation(disk: Disk, *arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count != number:
                return original(disk, *arguments)
            if half:
                do_half(name, disk, original, arguments)
            os.kill(os.getpid(), signal.SIGKILL)
            return time.sleep(60)

        return operation

    for name in DIVISIBLE if half else OPERATIONS:
        setattr(Disk, name, counted(name))


def do_half(name: str, disk: Disk, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Do the first part of a divisible operation."""
    if name == "write":
        fd, data = arguments
        os.write(fd, data[: len(data) // 2])
    elif name == "write_memory":
        fd, address, nbytes, position = arguments
        original(disk, fd, address, nbytes // 8192 * 4096, position)
    elif name == "publish":
        os.link(*arguments)
    else:
        for path in sorted(Path(arguments[0]).iterdir())[:1]:
            path.unlink()


def kill_at_every_operation(folder: Path) -> dict[str, Any]:
    """Kill a life with one save at each of its disk operations, every time from the same start."""
    start, log = folder / "start", folder / "durable.log"
    wait_for(forked(lambda: train(start, log, 4, elements=1000)))
    attempt = next((start / "step-00000004").glob("data-*"))
    shutil.copytree(attempt, start / "step-00000005" / "data-0123456789ab-1")  # what a dead attempt has left
    (start / "step-00000005" / ".tmp-layout.zarr.zip.0123456789ab").write_bytes(b"half")
    age(start)
    outcomes = []
    for half in (False, True):
        number = 0
        while True:
            number += 1
            run, own_log = folder / f"run-{number}-{half}", folder / f"{number}-{half}.log"
            shutil.copytree(start, run, copy_function=shutil.copy2)
            own_log.write_text("4\n")

            def live(run: Path = run, log: Path = own_log, number: int = number, half: bool = half) -> None:
                die_at(number, half)
                train(run, log, 1, elements=1000)

            _, status = os.waitpid(forked(live), 0)
            steps = check(run, own_log)
            outcomes.append(steps[-1])
            wait_for(forked(lambda run=run, log=own_log: train(run, log, 1, elements=1000)))
            after = check(run, own_log)
            assert after == list(range(steps[-1] - 1, steps[-1] + 2)), f"operation {number}: {after} after {steps}"
            shutil.rmtree(run)
            if not os.WIFSIGNALED(status):
                assert status == 0, f"operation {number}: the trainer failed"
                break
    return {"lives": len(outcomes), "newest": sorted(set(outcomes))}


def wait_for(process: int) -> None:
    """Wait for a child that must succeed."""
    _, status = os.waitpid(process, 0)
    assert status == 0, status


def main() -> None:
    kind, run, *rest = sys.argv[1:]
    result = kill_at_random(Path(run), *map(int, rest)) if kind == "random" else kill_at_every_operation(Path(run))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
