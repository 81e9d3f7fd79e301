"""What every storage promises: one list of properties, for each storage that a test file names.

A test file makes a subclass `TestContract` and a fixture `storage`. `second` is another storage of the same place, as
another process has it.
"""

from __future__ import annotations

import errno
import json
import mmap
import threading
import time
import zlib

import numpy as np
import pytest

from ckptengine.catalog.lease import Lease
from ckptengine.errors import CheckpointDamagedError, StorageError
from ckptengine.storage.base import Storage

__all__ = ["BLOCK", "StorageContract", "aligned", "load", "write_archive"]

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


def load(storage: Storage, name: str, data: np.ndarray, target: np.ndarray) -> int:
    """Read all of an archive whose bytes were `data` into `target`; return the first damaged block, or -1."""
    crcs = np.array([zlib.crc32(data[start : start + BLOCK]) for start in range(0, data.size, BLOCK)], np.uint32)
    ranges = np.array([0, data.size], np.int64)
    # One operation: all bytes, as one row of a box of one dimension.
    ops = [0, data.size, 1, 1, target.ctypes.data, target.ctypes.data, target.size]
    ops += [data.size, 0, data.size, 1]
    index = np.array([0, len(ops)], np.int64)
    return storage.load_archive(name, data.size, BLOCK, crcs, ranges, np.array(ops, np.int64), index)


class StorageContract:
    @pytest.fixture
    def second(self, storage: Storage) -> Storage:
        return storage

    def test_small_files_are_written_read_listed_and_deleted(self, storage):
        storage.create()
        storage.write_bytes("a/b/x", b"12345")
        storage.write_bytes("a/y", b"")
        assert (storage.read_bytes("a/b/x", 5), storage.read_bytes("a/y", 5)) == (b"12345", b"")
        assert (storage.size("a/b/x"), storage.size("a/b"), storage.size("a/z")) == (5, None, None)
        assert (storage.list(), storage.list("a"), storage.list("nowhere")) == (["a"], ["b", "y"], [])
        assert storage.exists("a/b")
        assert not storage.exists("a/c")
        assert storage.read_range("a/b/x", 1, 3) == b"234"
        storage.write_bytes("a/b/x", b"6")
        assert storage.read_bytes("a/b/x", 5) == b"6"
        storage.delete("a/y")
        storage.delete("a/y")
        assert storage.list("a") == ["b"]

    def test_what_is_missing_too_long_or_short_is_told_as_that(self, storage):
        storage.write_bytes("x", b"12345")
        assert storage.list("step") == storage.temporaries() == []
        assert storage.size("y") is None
        assert storage.modified("y") is None
        assert not storage.exists("y")
        storage.delete("y")
        storage.delete_tree("y")
        assert storage.remove_directory("y")
        with pytest.raises(CheckpointDamagedError):
            storage.read_range("x", 3, 4)
        for name, limit, number in (("x", 4, errno.EFBIG), ("y", 9, errno.ENOENT), ("d/y", 9, errno.ENOENT)):
            with pytest.raises(StorageError, match=name) as caught:
                storage.read_bytes(name, limit)
            assert caught.value.errno == number

    @pytest.mark.parametrize(
        "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\0b", "a\\b", ".."]
    )
    def test_names_that_lead_out_of_the_storage_are_refused(self, storage, name):
        for call in (
            lambda: storage.read_bytes(name, 10),
            lambda: storage.read_range(name, 0, 1),
            lambda: storage.size(name),
            lambda: storage.write_bytes(name, b""),
            lambda: storage.put_if_absent(name, b""),
            lambda: storage.create_archive(name, 4096),
            lambda: storage.delete(name),
            lambda: storage.delete_tree(name),
            lambda: storage.touch(name),
        ):
            with pytest.raises(StorageError) as caught:
                call()
            assert caught.value.errno == errno.EINVAL

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

    @pytest.mark.parametrize(("nbytes", "windows"), [(4096, 1), (12 << 20, 1), ((11 << 20) + 4096, 3), (10 << 20, 5)])
    def test_an_archive_arrives_as_it_lies_in_memory(self, storage, nbytes, windows):
        data = aligned(nbytes)
        write_archive(storage, "step/data/archive", data, windows)
        assert storage.size("step/data/archive") == nbytes
        assert storage.read_range("step/data/archive", 0, nbytes) == data.tobytes()
        assert storage.unfinished() == []
        assert storage.temporaries("step/data") == []

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

    def test_an_archive_comes_back_verified(self, storage):
        data = aligned(BLOCK * 50 + 4096)
        write_archive(storage, "archive", data)
        target = np.zeros_like(data)
        assert load(storage, "archive", data, target) == -1
        assert np.array_equal(target, data)
        bad = aligned(data.size)
        bad[BLOCK * 3 + 17] ^= 1
        write_archive(storage, "archive", bad)
        assert load(storage, "archive", data, target) == 3
        write_archive(storage, "archive", data[: BLOCK * 2])
        with pytest.raises(CheckpointDamagedError, match="archive"):
            load(storage, "archive", data, target)

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
