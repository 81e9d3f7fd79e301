"""A process without any framework that trains alone, or with others who find each other through files.

`alone_job.py RUN OPTIONS`; it prints what it does, line by line.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import ckptengine as ce
from ckptengine.comm.exchange import connect
from ckptengine.policy import watch
from ckptengine.storage.local import LocalStorage

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from file_store import FileStore

OPTIONS = json.loads(sys.argv[2])


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def slowed(name: str, seconds: float) -> None:
    """Make an operation of the storage slow, each time."""
    operation = getattr(LocalStorage, name)

    def slow(*arguments: Any, **more: Any) -> Any:
        say(name)
        time.sleep(seconds)
        return operation(*arguments, **more)

    setattr(LocalStorage, name, slow)


def main() -> None:
    if OPTIONS.get("own_handler"):
        signal.signal(signal.SIGTERM, lambda number, frame: say(f"own handler {number}"))
    if OPTIONS.get("ignored"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if OPTIONS.get("faulthandler"):
        faulthandler.register(signal.SIGUSR1)
    for name, seconds in OPTIONS.get("slow", {}).items():
        slowed(name, seconds)
    preemption = ce.Preemption(grace=OPTIONS.get("grace"), file=OPTIONS.get("file"), exit_code=OPTIONS.get("code", 75))
    comm, rank = None, OPTIONS.get("rank", 0)
    if "ranks" in OPTIONS:
        # No store for the background, as under MPI: its messages go through the run's directory.
        comm = connect(FileStore(OPTIONS["meet"]), rank, OPTIONS["ranks"], 60)
    timeout = OPTIONS.get("timeout", 60)
    due = ce.AtSteps(OPTIONS["at_steps"]) if "at_steps" in OPTIONS else ce.Every(OPTIONS.get("every", 1000))
    watch._TELL_SECONDS = OPTIONS.get("tell", watch._TELL_SECONDS)
    state = {"a": np.zeros(1000), "step": 0}
    if OPTIONS.get("others"):
        teacher = ce.Checkpointer(sys.argv[1] + "-teacher", every=1)
        assert teacher.restore({"a": np.zeros(1000), "step": 0}) == 2
        finished = ce.Checkpointer(sys.argv[1] + "-finished", every=1)
        finished.step(1, state)
        rebound = ce.Checkpointer(sys.argv[1], policy=ce.Policy(due))
        rebound = ce.Checkpointer(sys.argv[1], policy=ce.Policy(due))
        finished.close()
        rebound.close()
    policy = ce.Policy(due)
    with ce.Checkpointer(sys.argv[1], policy=policy, preemption=preemption, timeout=timeout, comm=comm) as ckpt:
        start = ckpt.restore(state) or 0
        assert (state["a"] == start).all()
        say(f"resumed {start}")
        time.sleep(OPTIONS.get("before", 0))
        for step in range(start + 1, start + 1 + OPTIONS.get("steps", 10**6)):
            state["a"] += 1
            state["step"] = step
            if step - start == OPTIONS.get("fork_at"):
                child = os.fork()
                if child == 0:
                    say(f"child {os.getpid()}")
                    time.sleep(60)
                    os._exit(0)
                say(f"child ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
            if step - start == OPTIONS.get("hang_at"):
                say("hanging")
                # For ever, in C code that no signal interrupts, as a collective does: no handler of Python's runs.
                mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
                library.pthread_mutex_lock(mutex)
                library.pthread_mutex_lock(mutex)
            if step - start == OPTIONS.get("fail_at"):
                raise ValueError("the training fails")
            say(f"step {step}")
            ckpt.step(step, state)
            if step - start == OPTIONS.get("wait_at"):
                ckpt.wait()
                say("waited")
            if step - start == OPTIONS.get("idle_at"):
                say("idle")
                time.sleep(60)
            time.sleep(OPTIONS.get("pace", 0.02))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        say(f"{number.name} {signal.getsignal(number)}")


main()
