"""Forks and threads: what they share with the process or the thread beside them, and what they must not."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import ckptengine as ce
from ckptengine.errors import SaveFailedError

SIZE = 1 << 20


def state(number):
    return {"a": np.full(SIZE, number, np.float64), "number": number}


def check(path, number):
    loaded = ce.load(path)
    assert loaded["number"] == number
    assert (loaded["a"] == number).all()


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


FORKS = """
import os, sys
import numpy as np
import ckptengine as ce
folder = sys.argv[1]
state = lambda number: {"a": np.full(1 << 20, number, np.float64), "number": number}
ce.save(f"{folder}/0", state(0))
children = []
for child in (1, 2):
    pid = os.fork()
    if pid == 0:
        for save in range(6):
            ce.save(f"{folder}/{child}{save}", state(10 * child + save))
        sys.exit(0)
    children.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
"""


def test_forked_processes_that_save_at_once_do_not_share_their_snapshots(tmp_path):
    done = run(FORKS, tmp_path)
    assert done.returncode == 0, done.stderr
    for child in (1, 2):
        for save in range(6):
            check(tmp_path / f"{child}{save}", 10 * child + save)


FORK_IN_FLIGHT = """
import os, sys, threading
import numpy as np
import ckptengine as ce
from ckptengine.storage.local import LocalStorage
go, write = threading.Event(), LocalStorage.create_archive
LocalStorage.create_archive = lambda *arguments, **more: (go.wait(), write(*arguments, **more))[1]
handle = ce.async_save(sys.argv[1], {"a": np.arange(9.0)})
pid = os.fork()
if pid == 0:
    assert handle.durable.done()
    sys.exit(0)
status = os.waitpid(pid, 0)[1]
go.set()
handle.durable.result()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_child_forked_during_a_save_exits_at_once_and_the_save_goes_on(tmp_path):
    done = run(FORK_IN_FLIGHT, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert ce.load(tmp_path / "a")["a"].tolist() == list(range(9))


def test_threads_that_save_at_once_do_not_mix_their_snapshots(tmp_path):
    errors = []

    def save_all(thread):
        try:
            for save in range(8):
                ce.save(tmp_path / f"{thread}{save}", state(10 * thread + save))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save_all, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number in (1, 2):
        for save in range(8):
            check(tmp_path / f"{number}{save}", 10 * number + save)


def test_a_thread_that_does_not_start_fails_one_save_and_not_those_after_it(tmp_path, monkeypatch):
    ce.save(tmp_path / "a", state(1))

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(SaveFailedError, match="can't start new thread"):
            ce.async_save(tmp_path / "b", state(2))
    ce.save(tmp_path / "c", state(3))
    check(tmp_path / "a", 1)
    check(tmp_path / "c", 3)
    assert not os.path.exists(tmp_path / "b" / "manifest-0001.json")


FAILS_UNSEEN = """
import sys
import numpy as np
import ckptengine as ce
from ckptengine.errors import StorageError
from ckptengine.storage.local import LocalStorage

def fail(*arguments, **more):
    raise StorageError(5, "the disk is gone")

LocalStorage.create_archive = fail
ce.async_save(sys.argv[1], {"a": np.arange(9.0)})
"""


def test_a_failed_save_that_nobody_asked_after_is_reported_at_exit(tmp_path):
    done = run(FAILS_UNSEEN, tmp_path / "a")
    assert "was NOT saved" in done.stderr
    assert "the disk is gone" in done.stderr
