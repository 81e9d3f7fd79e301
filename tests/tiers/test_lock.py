"""One holds a lock, the others wait; the dead hold nothing."""

import errno
import signal
import subprocess
import sys
import threading

import pytest

from ckptengine.errors import DeadlineError, StorageError
from ckptengine.tiers.lock import locked

HOLD = """
import sys, time
from ckptengine.tiers.lock import locked
with locked(sys.argv[1], 10, print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_waits_gets_it_when_the_other_lets_go(tmp_path):
    path, order, told = str(tmp_path / "lock"), [], []
    taken = threading.Event()

    def wait() -> None:
        taken.wait()
        with locked(path, 30, told.append):
            order.append("second")

    other = threading.Thread(target=wait)
    other.start()
    with locked(path, 1, told.append):
        taken.set()
        while not told:
            pass
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]
    assert len(told) == 1


def test_a_killed_process_holds_nothing(tmp_path):
    path, told = str(tmp_path / "lock"), []
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    late = pytest.raises(DeadlineError, match=f"process {holder.pid} on .* has held this lock for 0.2 s")
    with late, locked(path, 0.2, told.append):
        raise AssertionError
    assert told[0].startswith(f"process {holder.pid} on ")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(path, 10, told.append):
        pass


def test_a_lock_that_can_not_be_made_is_named(tmp_path):
    path = str(tmp_path / "nowhere/lock")
    with pytest.raises(StorageError, match="cannot open .*/nowhere/lock") as caught, locked(path, 1, print):
        raise AssertionError
    assert caught.value.errno == errno.ENOENT
