"""The end of a process whose threads of torch's gloo still hold tensors."""

from __future__ import annotations

import functools
import glob
import time

from ckptengine.lifecycle import at_last

__all__ = ["settle_at_exit"]

_THREADS = "pt_gloo_runloop"
_LONGEST = 1.0
_PAUSE = 0.01


@functools.cache
def settle_at_exit() -> None:
    """Have the interpreter end only when torch's gloo threads are idle, a second later at most.

    They let go of a collective's tensors after the training thread has gone on. Where the interpreter shuts down just
    then, C++ aborts a process that has finished (torch 2.13, pytorch/pytorch#179291), and the launcher starts a job
    again that was done. `destroy_process_group` ends the threads, but not where FSDP2 or DDP still hold the group.
    """
    at_last(_settle)


def _settle() -> None:
    deadline = time.monotonic() + _LONGEST
    while _states():
        time.sleep(_PAUSE)  # without the interpreter's lock, for which such a thread may wait
        if _states() <= {"S"} or time.monotonic() > deadline:
            return


def _states() -> set[str]:
    """Return the states of torch's gloo threads as the kernel names them: "S" is one that waits, "R" one that runs."""
    states = set()
    for path in glob.glob("/proc/self/task/*/stat"):
        try:
            with open(path) as file:
                name, rest = file.read().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue  # the thread has ended
        if name == _THREADS:
            states.add(rest.split()[0])
    return states
