"""What every storage promises: one list of properties, for each storage that a test file names.

A test file makes a subclass `TestContract` and a fixture `storage`. `second` is another storage of the same place, as
another process has it. What can only be read keeps the `ReadingContract`: its fixture `view` is what reads the files
that were written to `storage`.
"""

from __future__ import annotations

import errno
import json
import mmap
import threading
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from ckptengine.catalog.lease import Lease
from ckptengine.errors import CheckpointDamagedError, StorageError
from ckptengine.native.tables import ScatterPlan
from ckptengine.storage.archive_read import ArchiveRead
from ckptengine.storage.base import Storage, StorageView

__all__ = ["BLOCK", "ReadingContract", "StorageContract", "aligned", "load", "write_archive"]

BLOCK = 65536


def aligned(nbytes: int, seed: int = 0) -> np.ndarray:
    """Return page-aligned random bytes, shape (nbytes,)."""
    memory = np.frombuffer(mmap.mmap(-1, max(nbytes, 4096)), np.uint8)[:nbytes]
    memory[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return memory


def write_archive(storage: Storage, name: str, data: np.ndarray, windows: int = 1) -> None:
    """Write memory as one archive, in so many calls."""
    with storage.create_archive(name, data.nbytes) as archive:
        step = max(4096, -(-data.nbytes // windows // 4096) * 4096)
        for begin in range(0, max(1, data.nbytes), step):
            part = data[begin : begin + step]
            archive.write(data.ctypes.data + begin, part.nbytes, begin)
        archive.finish()


def load(storage: StorageView, name: str, data: np.ndarray, target: np.ndarray) -> int:
    """Read all of an archive whose bytes were `data` into `target`; return the first damaged block, or -1."""
    crcs = np.array([zlib.crc32(data[start : start + BLOCK]) for start in range(0, data.size, BLOCK)], np.uint32)
    ranges = np.array([[0, data.size]], np.int64)
    whole = (np.array([number], np.int64) for number in (0, data.size, target.ctypes.data))
    read = ArchiveRead(data.size, BLOCK, crcs, ranges, ScatterPlan.of_bytes(*whole))
    return storage.load_archive(name, read)


def refused(*calls: Callable[[], object]) -> None:
    """Check that each call refuses the name that it was given."""
    for call in calls:
        with pytest.raises(StorageError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL


LEADING_OUT = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\0b", "a\\b", ".."]


class ReadingContract:
    """What reads files that lie in `storage` promises."""

    @pytest.fixture
    def view(self, storage: Storage) -> StorageView:
        return storage

    def test_small_files_are_read_and_listed(self, storage, view):
        storage.create()
        storage.write_bytes("a/b/x", b"12345")
        storage.write_bytes("a/y", b"")
        assert (view.read_bytes("a/b/x", 5), view.read_bytes("a/y", 5)) == (b"12345", b"")
        assert (view.size("a/b/x"), view.size("a/b"), view.size("a/z")) == (5, None, None)
        assert (view.list(), view.list("a"), view.list("nowhere")) == (["a"], ["b", "y"], [])
        assert view.exists("a/b")
        assert not view.exists("a/c")
        assert view.read_range("a/b/x", 1, 3) == b"234"
        assert view.location("a/b/x") == storage.location("a/b/x")

    def test_what_is_missing_too_long_or_short_is_told_as_that(self, storage, view):
        storage.write_bytes("x", b"12345")
        assert view.list("step") == []
        assert view.size("y") is None
        assert not view.exists("y")
        with pytest.raises(CheckpointDamagedError):
            view.read_range("x", 3, 4)
        for name, limit, number in (("x", 4, errno.EFBIG), ("y", 9, errno.ENOENT), ("d/y", 9, errno.ENOENT)):
            with pytest.raises(StorageError, match=name) as caught:
                view.read_bytes(name, limit)
            assert caught.value.errno == number

    @pytest.mark.parametrize("name", LEADING_OUT)
    def test_names_that_lead_out_of_the_storage_are_not_read(self, view, name):
        refused(lambda: view.read_bytes(name, 10), lambda: view.read_range(name, 0, 1), lambda: view.size(name))

    @pytest.mark.parametrize(("nbytes", "windows"), [(4096, 1), (12 << 20, 1), ((11 << 20) + 4096, 3), (10 << 20, 5)])
    def test_an_archive_is_read_as_it_lay_in_memory(self, storage, view, nbytes, windows):
        data = aligned(nbytes)
        write_archive(storage, "step/data/archive", data, windows)
        assert view.size("step/data/archive") == nbytes
        assert view.read_range("step/data/archive", 0, nbytes) == data.tobytes()
        assert storage.unfinished() == []
        assert storage.temporaries("step/data") == []

    def test_an_archive_comes_back_verified(self, storage, view):
        data = aligned(BLOCK * 50 + 4096)
        write_archive(storage, "archive", data)
        target = np.zeros_like(data)
        assert load(view, "archive", data, target) == -1
        assert np.array_equal(target, data)
        bad = aligned(data.size)
        bad[BLOCK * 3 + 17] ^= 1
        write_archive(storage, "archive", bad)
        assert load(view, "archive", data, target) == 3
        write_archive(storage, "archive", data[: BLOCK * 2])
        with pytest.raises(CheckpointDamagedError, match="archive"):
            load(view, "archive", data, target)


class StorageContract(ReadingContract):
    """What a storage promises beyond being read."""

    @pytest.fixture
    def second(self, storage: Storage) -> Storage:
        return storage

    def test_small_files_are_replaced_and_deleted(self, storage):
        storage.create()
        storage.write_bytes("a/b/x", b"12345")
        storage.write_bytes("a/y", b"")
        storage.write_bytes("a/b/x", b"6")
        assert storage.read_bytes("a/b/x", 5) == b"6"
        storage.delete("a/y")
        storage.delete("a/y")
        assert storage.list("a") == ["b"]

    def test_what_is_missing_needs_no_deletion(self, storage):
        storage.write_bytes("x", b"12345")
        assert storage.temporaries() == []
        assert storage.modified("y") is None
        storage.delete("y")
        storage.delete_tree("y")
        assert storage.remove_directory("y")

    @pytest.mark.parametrize("name", LEADING_OUT)
    def test_names_that_lead_out_of_the_storage_are_refused(self, storage, name):
        refused(
            lambda: storage.write_bytes(name, b""),
            lambda: storage.put_if_absent(name, b""),
            lambda: storage.create_archive(name, 4096),
            lambda: storage.delete(name),
            lambda: storage.delete_tree(name),
            lambda: storage.touch(name),
        )

    def test_times_are_the_storages(self, storage):
        storage.write_bytes("a/x", b"1")
        assert abs(storage.now() - time.time()) < 30
        assert abs(storage.modified("a/x") - storage.now()) < 30
        assert storage.modified("a") is not None
        assert storage.modified("b") is None
        storage.touch("a/x")
        assert storage.read_bytes("a/x", 9) == b"1"
        assert storage.list() == ["a"]

    def test_a_name_is_taken_once(self, storage, second):
        assert storage.put_if_absent("d/m", b"first")
        assert not second.put_if_absent("d/m", b"second")
        assert storage.read_bytes("d/m", 9) == b"first"
        assert storage.list("d") == ["m"]
        assert storage.temporaries("d") == []

    def test_an_archive_replaces_one_of_the_same_name(self, storage):
        first, second = aligned(8192, 1), aligned(4096, 2)
        write_archive(storage, "d/archive", first)
        write_archive(storage, "d/archive", second)
        assert storage.read_bytes("d/archive", 10000) == second.tobytes()

    def test_an_archive_that_is_given_up_leaves_nothing(self, storage):
        data = aligned(11 << 20)
        with pytest.raises(RuntimeError), storage.create_archive("d/archive", data.nbytes) as archive:
            archive.write(data.ctypes.data, data.nbytes, 0)
            raise RuntimeError
        assert storage.unfinished() == []
        assert storage.size("d/archive") is None
        assert storage.list("d") == storage.temporaries("d") == []

    def test_a_directory_is_deleted_with_all_below_it(self, storage, second):
        for name in ("step/data/x", "step/data/y", "step/data/deep/z", "step/m", "other/x"):
            storage.write_bytes(name, b"1")
        assert not storage.remove_directory("step")
        storage.delete_tree("step/data")
        assert storage.list("step") == ["m"]
        assert not storage.exists("step/data")
        storage.delete("step/m")
        assert storage.remove_directory("step")
        assert storage.list() == second.list() == ["other"]
        storage.write_bytes("step/data/x", b"2")
        assert second.read_bytes("step/data/x", 9) == b"2"

    def test_the_lease_is_a_plain_file(self, storage):
        with Lease(storage, "data-0123456789ab-1"):
            held = json.loads(storage.read_bytes("data-0123456789ab-1/lease.json", 4096))
            assert held["pid"]
        assert storage.list("data-0123456789ab-1") == []

    def test_only_one_of_many_puts_wins_where_the_storage_can_decide(self, storage):
        storage.create()
        if not getattr(storage, "_atomic", True):
            return  # the rule of one job at a time, which is told: see test_runs
        won: list[int] = []
        barrier = threading.Barrier(8)

        def put(number: int) -> None:
            barrier.wait()
            if storage.put_if_absent("manifest.json", b"%d" % number):
                won.append(number)

        threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert storage.read_bytes("manifest.json", 10) == b"%d" % won[0]
        assert storage.list() == ["manifest.json"]
