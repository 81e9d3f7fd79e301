"""The end of a process whose threads of torch's gloo still hold tensors."""

from __future__ import annotations

import functools
import glob
import re
import time

from ckptengine.lifecycle import at_last

__all__ = ["settle_at_exit"]

_THREADS = b"pt_gloo_runloop"
_LONGEST = 1.0
_PAUSE = 0.02
"""Four times as long as a thread waits for the interpreter's lock before it asks again (`sys.setswitchinterval`)."""
_STATUS = re.compile(rb"^State:\s+(\S).*^voluntary_ctxt_switches:\s+(\d+)", re.MULTILINE | re.DOTALL)


@functools.cache
def settle_at_exit() -> None:
    """Have the interpreter end only when torch's gloo threads are idle, a second later at most.

    They let go of a collective's tensors after the training thread has gone on. Where the interpreter shuts down just
    then, C++ aborts a process that has finished (torch 2.13; pytorch/pytorch#190489), and the launcher starts a job
    again that was done. `destroy_process_group` ends the threads, but not where FSDP2 or DDP still hold the group.
    A thread that waits for a late rank looks idle, too.
    """
    at_last(_settle)


def _settle() -> None:
    deadline = time.monotonic() + _LONGEST
    before, now = None, _threads()
    while now and time.monotonic() < deadline:
        if now == before and all(state == b"S" for state, _ in now.values()):
            return
        time.sleep(_PAUSE)  # without the interpreter's lock, for which such a thread may wait
        before, now = now, _threads()


def _threads() -> dict[str, tuple[bytes, bytes]]:
    """Return of each of torch's gloo threads its state, "S" where it waits, and how often it has waited so far.

    One that waits for the interpreter's lock wakes every few milliseconds, an idle one does not.
    """
    found = {}
    for path in glob.glob("/proc/self/task/*/status"):
        try:
            with open(path, "rb") as file:
                text = file.read()
        except OSError:
            continue  # the thread has ended
        status = _STATUS.search(text)
        if status is not None and text.startswith(b"Name:\t" + _THREADS + b"\n"):
            found[path] = status[1], status[2]
    return found
