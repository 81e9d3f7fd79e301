"""The store that rank 0 of a job under msrun hosts, with a connection that breaks."""

import subprocess
import sys
from pathlib import Path

import pytest
from launch import environment
from ports import free_port

pytest.importorskip("mindspore")
from ckptengine.comm.mindspore import MindSporeStore

pytestmark = pytest.mark.long


def pair():
    """Return a store that this process hosts, and another client of it."""
    port = free_port()
    return MindSporeStore(0, 2, "127.0.0.1", port), MindSporeStore(1, 2, "127.0.0.1", port)


class Broken:
    """A client whose connection was reset: every call fails."""

    def __getattr__(self, name):
        raise RuntimeError("Broken pipe")


def test_a_client_whose_connection_breaks_is_replaced_on_the_host_and_on_others():
    host, other = pair()
    for number, store in enumerate((host, other, host)):
        store._store = Broken()
        claims = [store.claim(f"claimed {number}", b"first"), other.claim(f"claimed {number}", b"second")]
        assert claims == [b"first"] * 2
        store._store = Broken()
        store.set("key", b"1")
        store._store = Broken()
        assert store.get("key", 0) == b"1"
        store._store = Broken()
        store.delete("key")
        assert other.get("key", 0) is None


class Deaf:
    """A client whose connection breaks when a call has come to the host, and before the answer is here."""

    def __init__(self, client, calls):
        self._client, self._calls = client, calls

    def __getattr__(self, name):
        def call(*arguments):
            found = getattr(self._client, name)(*arguments)
            self._calls -= 1
            if self._calls == 0:
                raise RuntimeError("Broken pipe")
            return found

        return call


def test_a_claim_whose_answer_is_lost_is_still_the_one_that_counts():
    host, other = pair()
    for calls in range(1, 6):
        host._store = Deaf(host._store, calls)
        claims = [host.claim(f"claimed {calls}", b"first"), other.claim(f"claimed {calls}", b"second")]
        assert claims == [b"first"] * 2


MANY = """
from test_store import test_a_client_whose_connection_breaks_is_replaced_on_the_host_and_on_others as replace
for _ in range(100):
    replace()
"""


def test_clients_that_are_replaced_and_let_go_of_never_crash_the_process():
    job = subprocess.run(
        [sys.executable, "-c", MANY],
        cwd=Path(__file__).parent,
        env={
            **environment(),
            "PYTHONPATH": f"{environment()['PYTHONPATH']}:{Path(__file__).parents[1] / 'engine'}:"
            f"{Path(__file__).parents[1] / 'support'}",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert job.returncode == 0, job.stderr[-2000:]
