"""LocalStorage on real file systems, down to full disks and files that end early."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from contract import BLOCK, StorageContract, aligned, load, write_archive

from ckptengine.errors import CheckpointDamagedError, StorageError
from ckptengine.storage.disk import Disk
from ckptengine.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "a" / "run")


class TestContract(StorageContract):
    @pytest.fixture
    def second(self, storage):
        return LocalStorage(storage.root)


def all_files(storage):
    return sorted(str(path.relative_to(storage.root)) for path in storage.root.rglob("*") if path.is_file())


@pytest.mark.parametrize("nbytes", [0, 4096, (20 << 20) + 8192])
def test_an_archive_is_written_whole(storage, nbytes):
    data = aligned(nbytes)
    write_archive(storage, "step/data/rank.zip", data)
    assert storage.size("step/data/rank.zip") == nbytes
    assert storage.read_range("step/data/rank.zip", 0, nbytes) == data.tobytes()
    assert all_files(storage) == ["step/data/rank.zip"]
    assert storage.direct_writes + storage.buffered_writes == 1


def test_a_finished_archive_is_a_read_only_file_and_can_be_deleted_all_the_same(storage):
    data = aligned(4096)
    for name in ("step/data/rank.zip", "step/data/other.zip"):
        write_archive(storage, name, data)
        assert not os.stat(storage.location(name)).st_mode & 0o222
    storage.delete("step/data/other.zip")
    storage.delete_tree("step")
    assert all_files(storage) == []


def test_an_archive_comes_in_parts_and_is_not_there_before_it_is_finished(storage):
    data = aligned(3 * 4096)
    with storage.create_archive("rank.zip", 4096) as archive:
        for position in range(0, data.size, 4096):
            archive.write(data.ctypes.data + position, 4096, position)
        assert storage.size("rank.zip") is None
        archive.finish()
    assert storage.read_range("rank.zip", 0, data.size) == data.tobytes()


def test_an_archive_that_is_not_finished_leaves_nothing_behind(storage):
    data = aligned(4096)
    with storage.create_archive("rank.zip", 1 << 20) as archive:
        archive.write(data.ctypes.data, 4096, 0)
    assert all_files(storage) == []


def test_memory_that_is_not_aligned_is_refused(storage):
    data = aligned(8192)
    with pytest.raises(ValueError, match="multiples of 4096"):
        write_archive(storage, "rank.zip", data[64:4160])
    with pytest.raises(ValueError, match="multiples of 4096"):
        write_archive(storage, "rank.zip", data[:100])


class Refusing(Disk):
    """A file system that takes no direct I/O, as some network file systems."""

    def write_memory(self, fd, address, nbytes, position):
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().write_memory(fd, address, nbytes, position)


def test_where_direct_writes_are_refused_it_is_said_once_and_written_buffered(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ckptengine.storage.direct._refusing", set())
    storage, data = LocalStorage(tmp_path, Refusing()), aligned(1 << 20)
    for number in range(2):
        write_archive(storage, f"{number}.zip", data)
        assert storage.read_bytes(f"{number}.zip", 1 << 20) == data.tobytes()
    assert (storage.direct_writes, storage.buffered_writes) == (0, 2)
    assert caplog.text.count("refuses direct I/O") == 1


class FailingSync(Disk):
    def __init__(self):
        self.syncs = 0

    def sync(self, fd):
        self.syncs += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_failed_fsync_fails_the_write_and_is_not_repeated(tmp_path):
    disk = FailingSync()
    storage, data = LocalStorage(tmp_path, disk), aligned(4096)
    with pytest.raises(StorageError, match=r"cannot sync .*rank\.zip.*see the kernel's log") as caught:
        write_archive(storage, "rank.zip", data)
    assert caught.value.errno == errno.EIO
    with pytest.raises(StorageError):
        storage.write_bytes("small", b"1")
    with pytest.raises(StorageError):
        storage.put_if_absent("small", b"1")
    assert disk.syncs == 3
    assert os.listdir(tmp_path) == []


class ShortWrites(Disk):
    def write(self, fd, data):
        while data:
            data = data[os.write(fd, data[:3]) :]


def test_short_writes_are_continued(tmp_path):
    storage = LocalStorage(tmp_path, ShortWrites())
    storage.write_bytes("small", b"0123456789")
    assert storage.read_bytes("small", 10) == b"0123456789"


@pytest.fixture
def small_disk(tmp_path):
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield LocalStorage(mounted)
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_full_disk_says_what_is_needed_and_what_is_there(small_disk):
    data = aligned(4 << 20)
    with pytest.raises(StorageError, match=r"rank\.zip: 4194304 bytes are needed and \d+ are available") as caught:
        write_archive(small_disk, "rank.zip", data)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(StorageError, match="make room") as caught:
        small_disk.write_bytes("small", bytes(4 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_disk.root) == []
    write_archive(small_disk, "rank.zip", data[: 512 << 10])
    assert small_disk.size("rank.zip") == 512 << 10


LIMITED = """
import mmap, resource, sys, numpy as np
from ckptengine.errors import StorageError
from ckptengine.storage.local import LocalStorage
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
data = np.frombuffer(mmap.mmap(-1, 4 << 20), np.uint8)
try:
    with LocalStorage(sys.argv[1]).create_archive("rank.zip", data.size) as archive:
        archive.write(data.ctypes.data, data.size, 0)
except StorageError as error:
    print(error)
"""


def test_a_file_size_limit_is_an_error_that_names_it(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "rank.zip" in output
    assert "ulimit -f" in output
    assert os.listdir(tmp_path / "run") == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1 << 20


def test_an_archive_comes_back_verified(storage):
    data = aligned(BLOCK * 5 + 4096)
    write_archive(storage, "rank.zip", data)
    target = np.zeros_like(data)
    assert load(storage, "rank.zip", data, target) == -1
    assert np.array_equal(target, data)
    with open(storage.location("rank.zip"), "r+b") as file:
        file.seek(BLOCK * 3 + 17)
        file.write(bytes([data[BLOCK * 3 + 17] ^ 1]))
    assert load(storage, "rank.zip", data, target) == 3


def test_a_shorter_archive_is_damaged(storage):
    data = aligned(BLOCK)
    write_archive(storage, "rank.zip", data)
    os.truncate(storage.location("rank.zip"), 4096)
    with pytest.raises(CheckpointDamagedError, match=r"rank\.zip: 4096 bytes long, at least 65536"):
        load(storage, "rank.zip", data, np.zeros_like(data))
    with pytest.raises(CheckpointDamagedError, match="bytes 4000 to 5000 were expected"):
        storage.read_range("rank.zip", 4000, 1000)
    with pytest.raises(CheckpointDamagedError):
        storage.read_range("rank.zip", 0, 1 << 60)
    with pytest.raises(CheckpointDamagedError):
        storage.read_range("rank.zip", -1, 1)


def test_where_links_are_refused_a_rename_publishes(storage, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert storage.put_if_absent("manifest.json", b"first")
    assert not storage.put_if_absent("manifest.json", b"second")
    assert storage.read_bytes("manifest.json", 10) == b"first"
    assert all_files(storage) == ["manifest.json"]


def test_a_pipe_in_place_of_a_file_does_not_hold_up_the_reader(storage):
    storage.create()
    os.mkfifo(storage.location("manifest.json"))
    with pytest.raises(StorageError, match="not a regular file"):
        storage.read_bytes("manifest.json", 10)
    assert storage.size("manifest.json") is None


def test_directories_are_listed_and_removed(storage):
    storage.write_bytes("step/data/file", b"1")
    storage.make_directory("step/empty")
    assert storage.list() == ["step"]
    assert storage.list("step") == ["data", "empty"]
    assert not storage.remove_directory("step")
    assert storage.remove_directory("step/empty")
    storage.delete_tree("step/data")
    assert storage.list("step") == []


def test_a_directory_that_was_removed_meanwhile_is_made_again(storage):
    for _ in range(2):
        storage.write_bytes("step/data/file", b"1")
        storage.make_directory("step/data")
        # By another process, so that this storage doesn't know.
        LocalStorage(storage.root).delete_tree("step")
        storage.make_directory("step/data")
        assert storage.list("step") == ["data"]
        LocalStorage(storage.root).delete_tree("step")


def test_a_directory_in_which_others_delete_too_is_deleted_whole(storage):
    for _ in range(20):
        storage.make_directory("data")
        folder = Path(storage.location("data"))
        for number in range(300):
            (folder / str(number)).touch()
        files = list(folder.iterdir())[::-1]
        other = threading.Thread(target=lambda files=files: [file.unlink(missing_ok=True) for file in files])
        other.start()
        storage.delete_tree("data")
        other.join()
        assert not folder.exists()


def test_temporaries_are_listed_apart(storage):
    storage.write_bytes("file", b"1")
    with open(storage.location(".tmp-file.0123456789ab"), "w"):
        pass
    assert storage.list() == ["file"]
    assert storage.temporaries() == [".tmp-file.0123456789ab"]


def test_ages_are_told_by_the_file_systems_clock(storage):
    storage.write_bytes("lease", b"1")
    os.utime(storage.location("lease"), (1000, 1000))
    assert storage.modified("lease") == 1000
    storage.touch("lease")
    assert 0 <= storage.now() - storage.modified("lease") < 60
    assert abs(storage.now() - time.time()) < 60


def test_a_root_that_is_a_file_or_closed_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        LocalStorage(tmp_path / "file").create()
    with pytest.raises(StorageError, match="a part of the path is a file"):
        LocalStorage(tmp_path / "file" / "run").create()
    with pytest.raises(StorageError, match="cannot make the directory"):
        LocalStorage("/proc/run").create()


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("open", lambda storage: storage.read_bytes("file", 10)),
        ("fstat", lambda storage: storage.read_bytes("file", 10)),
        ("fstat", lambda storage: storage.read_range("file", 0, 1)),
        ("pread", lambda storage: storage.read_range("file", 0, 1)),
        ("stat", lambda storage: storage.size("file")),
        ("stat", lambda storage: storage.modified("file")),
        ("lstat", lambda storage: storage.is_linked("file")),
        ("utime", lambda storage: storage.touch("file")),
        ("close", lambda storage: storage.write_bytes("file", b"2")),
        ("unlink", lambda storage: storage.delete("file")),
    ],
)
def test_whatever_call_of_the_system_fails_the_error_names_the_file(storage, monkeypatch, function, call):
    storage.write_bytes("file", b"1")
    real, failed = getattr(os, function), []

    def failing(*arguments, **options):
        if failed:
            return real(*arguments, **options)
        failed.append(function)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(StorageError, match=rf"cannot .*{storage.location('file')}: Input/output error") as raised:
        call(storage)
    assert raised.value.errno == errno.EIO
    assert failed


def test_a_directory_that_can_not_be_listed_is_named_and_not_taken_for_an_empty_one(storage, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(os, "listdir", failing)
    with pytest.raises(StorageError, match=f"cannot list {storage.root}: Input/output error"):
        storage.list()
