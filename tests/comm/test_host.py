"""The store that one rank hosts for the others over TCP."""

import contextlib
import json
import os
import resource
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptengine.catalog.receipt import Channel, Outcome, Receipt, collect
from ckptengine.comm import exchange as exchange_module
from ckptengine.comm import host as host_module
from ckptengine.comm import hosted as hosted_module
from ckptengine.comm import service as service_module
from ckptengine.comm.exchange import StoreCommunicator, connect
from ckptengine.comm.host import StoreHost
from ckptengine.comm.hosted import HostedStore
from ckptengine.comm.interfaces import addresses, listen
from ckptengine.comm.keyvalue import get_large, put_large
from ckptengine.comm.wire import HELLO_NBYTES, MAGIC, NONCE_NBYTES, PROOF_NBYTES, REQUEST, proof
from ckptengine.errors import CheckpointError, DeadlineError, RankFailedError

SECRET = secrets.token_bytes(32)


@pytest.fixture
def host():
    store = StoreHost([listen("127.0.0.1")], SECRET, 60)
    yield store
    store.close()


@pytest.fixture
def client(host):
    store = HostedStore(host.addresses, SECRET, 10)
    yield store
    store.close()


@pytest.fixture
def places():
    """Where a store is that a thread of this process serves."""
    server, (own, its) = listen("127.0.0.1"), socket.socketpair()
    place = server.getsockname()
    thread = threading.Thread(target=service_module.Service(its, [server], SECRET).run)
    thread.start()
    yield [place]
    own.close()
    thread.join()


def greeted(host):
    """Return a connection that has shown that it knows the secret, for what no client would send."""
    peer = socket.create_connection(host.addresses[0], 10)
    greeting = peer.recv(len(MAGIC) + NONCE_NBYTES, socket.MSG_WAITALL)
    own = secrets.token_bytes(NONCE_NBYTES)
    peer.sendall(own + proof(SECRET, b"rank", greeting[len(MAGIC) :], own))
    assert len(peer.recv(PROOF_NBYTES, socket.MSG_WAITALL)) == PROOF_NBYTES
    return peer


def is_closed(peer):
    peer.settimeout(20)
    with contextlib.suppress(ConnectionResetError):
        while peer.recv(1 << 16):
            pass
    return True


def test_what_either_side_stores_the_other_reads_and_deletes(host, client):
    client.set("a", b"")
    host.set("b", bytes(range(256)))
    assert (host.get("a", 0.0), client.get("b", 0.0)) == (b"", bytes(range(256)))
    client.delete("b")
    client.delete("b")
    assert (host.get("b", 0.0), client.get("b", 0.0)) == (None, None)
    value = os.urandom(5 << 20)
    put_large(client, "large", value)
    assert get_large(host, "large", 0.0) == get_large(client, "large", 0.0) == value


def test_of_those_who_claim_a_key_one_gets_it_and_all_hear_what_it_is(host, client):
    with ThreadPoolExecutor(8) as pool:
        claims = pool.map(lambda number: (client, host)[number % 2].claim("a", b"%d" % number), range(40))
        standing = set(claims)
        waiting = pool.submit(client.get, "b", 60)
        assert host.claim("b", b"for who waits") == waiting.result(30) == b"for who waits"
    assert standing == {host.get("a", 0.0)}


def test_many_keys_are_stored_read_and_deleted_at_once(host, client):
    values = {f"key {number}": b"%d" % number for number in range(1000)} | {"large": os.urandom(3 << 20), "": b""}
    client.set_each(values)
    keys = [*reversed(values), "none"]
    assert host.get_each(keys) == client.get_each(keys) == [*reversed(values.values()), None]
    client.delete_each([*keys, "none"])
    assert host.get_each(keys) == [None] * len(keys)
    assert client.get_each([]) == []


def test_rank_0_asks_for_what_many_ranks_have_put_in_few_messages(host, client, monkeypatch):
    ranks, messages = 600, []
    for rank in range(1, ranks):
        call = exchange_module._Call("all-gather", b"%d" % rank, None, 1.0, 1.0, "")
        put_large(client, f"life/0/in/{rank}", call.encode())
        Channel(client, "attempt", rank, ranks).send(Receipt(rank, None))
    ask = HostedStore._ask
    monkeypatch.setattr(HostedStore, "_ask", lambda *given: messages.append(given) or ask(*given))
    found = StoreCommunicator(host, 0, ranks, "life").all_gather(b"0", 60)
    assert found == [b"%d" % rank for rank in range(ranks)]
    channel = Channel(host, "attempt", 0, ranks)
    assert len(collect(channel, Receipt(0, None), time.monotonic() + 60)) == ranks
    assert not channel.announce(Outcome())
    assert len(messages) < 60


def test_a_get_waits_for_the_value_and_for_no_longer_than_its_time(host, client):
    began = time.monotonic()
    assert client.get("late", 0.2) is None
    assert time.monotonic() - began >= 0.2
    for storing in (host, client):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.get, f"key {storing is host}", 60)
            time.sleep(0.05)
            storing.set(f"key {storing is host}", b"x")
            assert waiting.result(30) == b"x"


def test_64_ranks_meet_and_none_is_missed(host):
    def run(rank):
        store = host if rank == 0 else HostedStore(host.addresses, SECRET, 60)
        comm = connect(store, rank, 64, 60)
        found = [comm.all_gather(b"%d" % (rank + turn), 60) for turn in range(3)]
        comm.barrier(60)
        return found

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(run, range(64)))
    assert found == [[[b"%d" % (rank + turn) for rank in range(64)] for turn in range(3)]] * 64


def test_a_late_rank_is_named(host, client):
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(connect, store, rank, 3, 1) for rank, store in enumerate((host, client))]
        for rank in ranks:
            with pytest.raises(DeadlineError, match="rank 2 did not come within 1 s"):
                rank.result()


def test_who_does_not_know_the_secret_reads_and_writes_nothing(host, client, caplog):
    client.set("own", b"1")
    with pytest.raises(RankFailedError, match="refused the secret of this job"):
        HostedStore(host.addresses, secrets.token_bytes(32), 10)
    deadline = time.monotonic() + 30  # the service says it before it closes the connection, and a thread logs it
    while "refused a connection from 127.0.0.1 to the store of the job" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Without the proof, a request is taken for one, and is none.
    peer = socket.create_connection(host.addresses[0], 10)
    peer.sendall(REQUEST.pack(1, 0.0, 3, 60) + b"own" + bytes(60))
    assert is_closed(peer)
    assert client.get("own", 0.0) == b"1"


def test_a_proof_that_was_heard_serves_no_second_time(host):
    heard = []
    with listen("127.0.0.1") as between:
        between.setblocking(True)

        def relay():
            near, _ = between.accept()
            far = socket.create_connection(host.addresses[0], 10)
            near.sendall(far.recv(len(MAGIC) + NONCE_NBYTES, socket.MSG_WAITALL))
            heard.append(near.recv(HELLO_NBYTES, socket.MSG_WAITALL))
            near.close()
            far.close()

        thread = threading.Thread(target=relay)
        thread.start()
        with pytest.raises(RankFailedError):
            HostedStore([between.getsockname()], SECRET, 1)
        thread.join()
    peer = socket.create_connection(host.addresses[0], 10)
    peer.sendall(heard[0])
    assert is_closed(peer)


def test_a_host_that_does_not_know_the_secret_is_told_nothing():
    with listen("127.0.0.1") as server:
        server.setblocking(True)

        def pretend():
            peer, _ = server.accept()
            peer.sendall(MAGIC + bytes(NONCE_NBYTES))
            peer.recv(HELLO_NBYTES, socket.MSG_WAITALL)
            peer.sendall(bytes(PROOF_NBYTES))
            said.append(peer.recv(1000))
            peer.close()

        said = []
        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(RankFailedError, match="does not know the secret of this job"):
            HostedStore([server.getsockname()], SECRET, 10)
        thread.join()
    assert said == [b""]


def test_connections_that_say_nothing_are_closed_and_hold_up_nobody(places, monkeypatch):
    monkeypatch.setattr(service_module, "_HELLO_SECONDS", 0.5)
    monkeypatch.setattr(service_module, "_STRANGERS", 8)
    silent = [socket.create_connection(places[0], 10) for _ in range(20)]
    store = HostedStore(places, SECRET, 60)
    store.set("a", b"1")
    assert all(is_closed(peer) for peer in silent)
    assert store.get("a", 0.0) == b"1"


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST.pack(9, 0.0, 1, 0) + b"k",
        REQUEST.pack(2, -1.0, 1, 0) + b"k",
        REQUEST.pack(2, float("nan"), 1, 0) + b"k",
        REQUEST.pack(1, 0.0, 1 << 30, 0),
        REQUEST.pack(1, 0.0, 1, 1 << 62),
        2 * (REQUEST.pack(2, 10.0, 1, 0) + b"k"),
    ],
)
def test_what_is_no_request_ends_its_connection_and_no_other(host, client, request_):
    peer = greeted(host)
    peer.sendall(request_)
    assert is_closed(peer)
    client.set("a", b"1")
    assert client.get("a", 0.0) == b"1"


def test_a_request_that_follows_one_that_waits_ends_the_connection(host, client):
    peer = greeted(host)
    peer.sendall(2 * (REQUEST.pack(2, 60.0, 5, 0) + b"never"))
    assert is_closed(peer)
    assert client.get("never", 0.0) is None


def test_a_wait_that_never_ends_does_not_end_the_service(host, client):
    peer = greeted(host)
    peer.sendall(REQUEST.pack(2, float("inf"), 1, 0) + b"k")
    client.set("a", b"1")
    assert client.get("b", 0.1) is None
    host.set("k", b"v")
    status, nbytes, value = struct.unpack("<BQc", peer.recv(10, socket.MSG_WAITALL))
    assert (status, nbytes, value) == (2, 1, b"v")


def test_a_call_whose_connection_breaks_is_made_once_more(host, client):
    client.set("a", b"1")
    for connection in list(client._open):
        connection.shutdown(socket.SHUT_RDWR)
    assert client.get("a", 0.0) == b"1"


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
    monkeypatch.setattr(hosted_module, "_CALL_SECONDS", 0.5)
    with ThreadPoolExecutor(3) as pool:  # so that it keeps several connections
        list(pool.map(lambda number: client.get("never", 0.2), range(3)))
    os.kill(host._service.number, signal.SIGSTOP)
    try:
        for _ in range(100):
            with pytest.raises(RankFailedError, match="that process is stopped, or its machine is too busy"):
                client.set("a", b"1")
        assert len(client._idle) >= 2
    finally:
        os.kill(host._service.number, signal.SIGCONT)


def test_an_address_that_leads_nowhere_is_passed_over(host):
    with listen("127.0.0.1") as mute:
        began = time.monotonic()
        store = HostedStore([mute.getsockname(), *host.addresses], SECRET, 30)
        store.set("a", b"1")
        assert time.monotonic() - began < 20
        assert host.get("a", 0.0) == b"1"


@pytest.mark.parametrize("address", ["::1", *addresses()])
def test_every_address_of_this_machine_serves(address):
    try:
        server = listen(address)
    except OSError:
        assert ":" in address  # this machine has no IPv6
        pytest.skip(f"{address} can't be used here")
    host = StoreHost([server], SECRET, 30)
    store = HostedStore(host.addresses, SECRET, 30)
    store.set("a", b"1")
    assert host.get("a", 0.0) == b"1"
    store.close()
    host.close()


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
    ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)
if sys.argv[2] != "ends":
    time.sleep(600)
host.get("wanted", 60.0)
host.set("word", b"the last one")
"""


def hosting(mode):
    program = [sys.executable, "-c", HOSTING, SECRET.hex(), mode]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_store_answers_while_its_host_holds_the_interpreters_lock():
    with hosting("holds the lock") as process:
        places = [tuple(place) for place in json.loads(process.stdout.readline())]
        store = HostedStore(places, SECRET, 30)
        store.set("a", b"1")
        assert store.get("a", 0.0) == b"1"
        assert process.poll() is None
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
        os.kill(host._service.number, signal.SIGSTOP)
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
