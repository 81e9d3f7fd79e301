"""Leases, of writers that live and of one that is killed."""

import json
import os
import signal
import subprocess
import sys

import pytest
from checkpoints import manifest_of, write_data

from ckptengine.catalog import lease as lease_module
from ckptengine.catalog.lease import LEASE_SECONDS, Lease, is_leased
from ckptengine.catalog.retention import remove_leftovers

DATA = "step-00000010/data-000000000001-10"


def age(storage, name, seconds):
    then = storage.now() - seconds
    os.utime(storage.location(name), (then, then))


def test_a_writer_holds_its_attempt_until_it_leaves(storage):
    with Lease(storage, DATA):
        assert is_leased(storage, DATA)
        assert storage.list(DATA) == ["lease.json"]
    assert storage.list(DATA) == []


def test_a_living_writer_on_this_machine_keeps_its_lease_whatever_its_age(storage):
    with Lease(storage, DATA):
        age(storage, f"{DATA}/lease.json", 100 * LEASE_SECONDS)
        assert is_leased(storage, DATA)


WRITER = """
import sys, time
from ckptengine.catalog.lease import Lease
from ckptengine.storage.local import LocalStorage
with Lease(LocalStorage(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_writer_loses_its_lease_at_once(storage):
    write_data(storage, manifest_of(10))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", WRITER, str(storage.root), DATA]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "held\n"
        assert is_leased(storage, DATA)
        assert remove_leftovers(storage) == []
        assert storage.exists(DATA)
        writer.send_signal(signal.SIGKILL)
    assert storage.exists(f"{DATA}/lease.json")
    assert not is_leased(storage, DATA)
    assert remove_leftovers(storage) == []
    assert not storage.exists(DATA)


def test_a_reused_process_number_is_not_the_writer(storage):
    with Lease(storage, DATA):
        holder = json.loads(storage.read_bytes(f"{DATA}/lease.json", 4096))
    storage.write_bytes(f"{DATA}/lease.json", json.dumps(holder | {"started": "1"}).encode())
    assert not is_leased(storage, DATA)


@pytest.mark.parametrize("holder", [b"", b"[]", b"[[[", b'{"host": "elsewhere", "boot": "x", "namespace": "y"}'])
def test_the_age_decides_on_other_machines_and_on_damaged_leases(storage, holder):
    storage.write_bytes(f"{DATA}/lease.json", holder)
    assert is_leased(storage, DATA)
    age(storage, f"{DATA}/lease.json", LEASE_SECONDS + 60)
    assert not is_leased(storage, DATA)


def test_without_a_lease_the_directorys_age_decides(storage):
    assert not is_leased(storage, DATA)
    storage.make_directory(DATA)
    assert is_leased(storage, DATA)
    age(storage, DATA, LEASE_SECONDS + 60)
    assert not is_leased(storage, DATA)


def test_a_lease_is_renewed_while_it_is_held(storage, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 0.2)
    name = f"{DATA}/lease.json"
    with Lease(storage, DATA):
        age(storage, name, 1000)
        before = storage.modified(name)
        for _ in range(1000):
            if storage.modified(name) > before + 500:
                break
            lease_module.threading.Event().wait(0.01)
        assert storage.modified(name) > before + 500
