"""The store that one rank hosts for the others over TCP."""

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from store_secret import SECRET

from ckptengine.catalog.receipt import Channel, Outcome, Receipt, collect
from ckptengine.comm import exchange as exchange_module
from ckptengine.comm import service as service_module
from ckptengine.comm.exchange import StoreCommunicator, connect
from ckptengine.comm.host import StoreHost
from ckptengine.comm.hosted import HostedStore
from ckptengine.comm.interfaces import addresses, listen
from ckptengine.comm.keyvalue import get_large, put_large
from ckptengine.comm.wire import HELLO_NBYTES, MAGIC, NONCE_NBYTES, PROOF_NBYTES, REQUEST, proof
from ckptengine.errors import DeadlineError, RankFailedError


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
    known = HostedStore(places, SECRET, 60)
    monkeypatch.setattr(service_module, "_STRANGERS", 8)
    with monkeypatch.context() as short:
        short.setattr(service_module, "_HELLO_SECONDS", 0.5)
        silent = [socket.create_connection(places[0], 10) for _ in range(8)]
        assert all(peer.recv(1) for peer in silent)  # each has its place, and whoever comes next has the usual time
    known.set("a", b"1")
    late = HostedStore(places, SECRET, 60)
    assert late.get("a", 0.0) == b"1"
    assert all(is_closed(peer) for peer in silent)
    assert known.get("a", 0.0) == b"1"


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
