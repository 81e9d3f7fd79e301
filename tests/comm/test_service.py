"""The process that serves the store of a job: how it starts, what it outlives, and how its end is seen."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from store_secret import SECRET

from ckptengine.comm import host as host_module
from ckptengine.comm import hosted as hosted_module
from ckptengine.comm.host import StoreHost
from ckptengine.comm.hosted import HostedStore
from ckptengine.comm.interfaces import listen
from ckptengine.errors import CheckpointError, RankFailedError


def stop(host):
    os.kill(host._service.number, signal.SIGSTOP)
    os.waitid(os.P_PID, host._service.number, os.WSTOPPED)


HOSTING = """
import ctypes, json, os, sys, time
from ckptengine.comm.host import StoreHost
from ckptengine.comm.interfaces import listen
host = StoreHost([listen("127.0.0.1")], bytes.fromhex(sys.argv[1]), 60)
if sys.argv[2] == "forks":
    child = os.fork()
    if child == 0:
        try:
            os.write(1, f"{host.get('a', 0.0)}\\n".encode())
        finally:
            time.sleep(600)
    os.write(1, f"{child}\\n".encode())  # in one piece: the child writes too
if sys.argv[2] == "forks in C" and ctypes.CDLL(None).fork() == 0:
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(600)
os.write(1, f"{json.dumps(host.addresses)}\\n".encode())
if sys.argv[2] == "holds the lock":
    ctypes.PyDLL(None).write(1, bytes(1 << 20), 1 << 20)
if sys.argv[2] != "ends":
    time.sleep(600)
host.get("wanted", 60.0)
host.set("word", b"the last one")
"""


def hosting(mode):
    program = [sys.executable, "-c", HOSTING, SECRET.hex(), mode]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_host_that_has_ended_is_an_error_at_once_that_names_rank_0(host, client):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, "never", 600)
        time.sleep(0.05)
        os.kill(host._service.number, signal.SIGKILL)
        with pytest.raises(RankFailedError, match=r"which rank 0 hosts, can't be reached .*Connection refused"):
            waiting.result(30)
    with pytest.raises(RankFailedError, match="rank 0 has ended, its process that serves the store was killed, or"):
        client.set("a", b"1")
    with pytest.raises(
        RankFailedError, match=f"process {host._service.number}, which .* killed by signal 9: .*restart"
    ):
        host.set("a", b"1")


def test_a_service_that_can_not_be_started_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CheckpointError, match="can't be started with '/nowhere/python': .*No such file"):
        StoreHost([listen("127.0.0.1")], SECRET, 10)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RankFailedError, match="has ended with exit code 1"):
        StoreHost([listen("127.0.0.1")], SECRET, 10)
    monkeypatch.setattr(sys, "executable", None)  # in a program that embeds Python
    with pytest.raises(CheckpointError, match="sys.executable does not name one to start"):
        StoreHost([listen("127.0.0.1")], SECRET, 10)
    monkeypatch.setattr(sys, "executable", "/opt/job/train")
    monkeypatch.setattr(sys, "frozen", True, raising=False)  # as PyInstaller does
    with pytest.raises(CheckpointError, match="'/opt/job/train': it is a program with Python inside"):
        StoreHost([listen("127.0.0.1")], SECRET, 10)


def test_a_service_whose_owner_gets_no_thread_is_an_error_and_leaves_no_process(monkeypatch):
    started: list[subprocess.Popen[bytes]] = []
    start = host_module._start
    monkeypatch.setattr(host_module, "_start", lambda *given: started.append(start(*given)) or started[0])

    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(CheckpointError, match="can't be started .*: can't start new thread"):
        StoreHost([listen("127.0.0.1")], SECRET, 10)
    assert started[0].returncode == 0


def test_signals_that_a_launcher_sends_to_all_processes_do_not_end_the_service(host, client):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 3):
        os.kill(host._service.number, number)
        assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    client.set("a", b"1")
    assert host.get("a", 0.0) == b"1"


def test_a_store_that_nobody_holds_any_more_takes_its_process_with_it():
    store = StoreHost([listen("127.0.0.1")], SECRET, 60)
    number = store._service.number
    del store
    assert not os.path.exists(f"/proc/{number}")


def test_a_service_that_a_handler_of_sigchld_has_reaped_is_known_to_have_ended(host):
    os.kill(host._service.number, signal.SIGKILL)
    os.waitpid(host._service.number, 0)
    with pytest.raises(RankFailedError, match=f"process {host._service.number}, which .* rank 0, has ended: "):
        host.set("a", b"1")


def test_a_service_that_does_not_answer_is_waited_for_once_by_a_caller_of_several_calls(host, client, monkeypatch):
    client._idle += [client._connect(30) for _ in range(2)]
    monkeypatch.setattr(hosted_module, "_CALL_SECONDS", 0.5)
    monkeypatch.setattr(hosted_module, "_GONE_SECONDS", 600.0)
    stop(host)
    try:
        for _ in range(100):
            with pytest.raises(RankFailedError, match="that process is stopped, or its machine is too busy"):
                client.set("a", b"1")
        assert len(client._idle) == 2
    finally:
        os.kill(host._service.number, signal.SIGCONT)


def test_the_store_answers_while_its_host_holds_the_interpreters_lock():
    with hosting("holds the lock") as process:
        try:
            places = [tuple(place) for place in json.loads(process.stdout.readline())]
            assert process.stdout.read(1) == "\0"  # it is in the one call that writes all: more than a pipe takes
            store = HostedStore(places, SECRET, 30)
            store.set("a", b"1")
            assert store.get("a", 0.0) == b"1"
            assert process.poll() is None
        finally:
            process.kill()


def test_a_killed_hosts_end_is_seen_though_a_process_that_it_forked_lives_on():
    process = hosting("forks")
    lines = sorted((process.stdout.readline().strip() for _ in range(3)), key=lambda line: (line[0], line))
    child = next(int(line) for line in lines if line.isdigit())
    try:
        assert "None" in lines
        places = [tuple(place) for place in json.loads(next(line for line in lines if line[0] == "["))]
        store = HostedStore(places, SECRET, 30)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.get, "never", 600)
            time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises(RankFailedError, match="rank 0 has ended"):
                waiting.result(60)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_killed_hosts_end_is_seen_though_a_process_that_a_library_forked_has_its_sockets():
    process = hosting("forks in C")
    lines = [process.stdout.readline() for _ in range(2)]
    child, places = (
        int(next(line for line in lines if line[0] != "[")),
        json.loads(next(x for x in lines if x[0] == "[")),
    )
    try:
        store = HostedStore([tuple(place) for place in places], SECRET, 30)
        process.kill()
        process.wait()
        with pytest.raises(RankFailedError, match="can't be reached .*Connection refused"):
            store.get("never", 60)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()


def test_a_job_whose_standard_streams_are_closed_has_a_store():
    program = """
import os, sys
from ckptengine.comm.host import StoreHost
from ckptengine.comm.interfaces import listen
said = os.dup(1)
for number in range(3):
    os.close(number)
host = StoreHost([listen("127.0.0.1")], bytes(32), 30)
host.set("a", b"1")
os.write(said, host.get("a", 0.0))
host.close()
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"1"


def test_as_many_clients_connect_as_the_hard_limit_of_open_files_allows():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        host = StoreHost([listen("127.0.0.1")], SECRET, 30)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    stores = [HostedStore(host.addresses, SECRET, 10) for _ in range(60)]
    assert [store.get("nothing", 0.0) for store in stores] == [None] * 60
    for store in stores:
        store.close()
    host.close()


def test_a_host_that_ends_well_waits_for_those_that_still_read():
    process = hosting("ends")
    places = [tuple(place) for place in json.loads(process.stdout.readline())]
    store = HostedStore(places, SECRET, 30)
    store.set("wanted", b"")
    assert store.get("word", 60) == b"the last one"
    time.sleep(0.5)  # it is ending
    assert process.poll() is None
    assert store.get("word", 0.0) == b"the last one"
    store.close()
    assert process.wait(60) == 0
    process.stdout.close()
    with pytest.raises(CheckpointError, match="this process is ending"):
        store.get("word", 0.0)


def test_a_host_that_is_busy_for_longer_than_it_takes_to_reconnect_is_not_taken_for_dead(host, client):
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(client.get, "never", 12)  # it has the only connection
        time.sleep(0.2)
        stop(host)
        another = pool.submit(client.get, "never", 0.0)
        time.sleep(hosted_module._RECONNECT_SECONDS + 1)
        os.kill(host._service.number, signal.SIGCONT)
        assert another.result(60) is None
        assert waiting.result(60) is None


def test_a_process_that_ends_lets_go_of_other_hosts_before_it_waits_for_its_own_clients(host):
    other = StoreHost([listen("127.0.0.1")], SECRET, 10)
    store = HostedStore(other.addresses, SECRET, 10)
    host_module._end(host)
    with pytest.raises(CheckpointError, match="this process is ending"):
        store.get("word", 0.0)
    other.close()
