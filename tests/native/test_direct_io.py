import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_tables import ScatterOp, aligned, block_crcs, examples, native, random_bytes, table

BLOCK = 4096
BIG = 2**63 - 1
Open = Callable[[Path, int], int]


@pytest.fixture(params=["buffered", "direct"])
def open_file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Open files with and without O_DIRECT; skip the former where the file system refuses it."""
    direct = os.O_DIRECT if request.param == "direct" else 0
    opened: list[int] = []

    def open_it(path: Path, flags: int) -> int:
        opened.append(os.open(path, flags | direct, 0o644))
        return opened[-1]

    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_RDWR | direct))
    except OSError:
        pytest.skip("the file system of the temporary directory has no O_DIRECT")
    yield open_it
    for fd in opened:
        os.close(fd)


def load_all(
    fd: int, fixed: int, crcs: np.ndarray | None, target: np.ndarray, request: int = BLOCK, threads: int = 2
) -> int:
    flat, index = table([ScatterOp(0, target.shape, (0,), target).row()])
    ranges = np.array([[0, fixed]], np.int64)
    return native.load(fd, fixed, BLOCK, crcs, ranges, flat, index, request, threads)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("request_nbytes", [4096, 12288, 1 << 20])
def test_what_is_written_is_read_back(open_file, tmp_path, depth, request_nbytes):
    data = aligned(200 * BLOCK)
    data[:] = random_bytes(1, data.nbytes)
    fd = open_file(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    native.write(fd, data.ctypes.data, data.nbytes, 2 * BLOCK, request_nbytes, depth)
    assert (tmp_path / "file").read_bytes() == bytes(2 * BLOCK) + data.tobytes()
    file = np.fromfile(tmp_path / "file", np.uint8)
    target = np.zeros(file.nbytes, np.uint8)
    assert load_all(fd, file.nbytes, block_crcs(file, BLOCK), target, request_nbytes, depth) == -1
    np.testing.assert_array_equal(target, file)


@given(data=st.data())
@settings(examples, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_any_ranges_are_read_and_nothing_else(open_file, tmp_path, data):
    blocks = data.draw(st.integers(1, 60))
    file = random_bytes(blocks, blocks * BLOCK)
    (tmp_path / "file").write_bytes(file.tobytes())
    cuts = sorted(data.draw(st.sets(st.integers(0, blocks), max_size=8)))
    ranges = [(a * BLOCK, (b - a) * BLOCK) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    position = data.draw(st.integers(0, file.nbytes - 1)) // 8 * 8
    target = np.zeros(file.nbytes // 8 * 2, np.float64)[::-2]
    count = (file.nbytes - position) // 8
    flat, index = table([ScatterOp(position, (count,), (0,), target[:count]).row()])
    fd = open_file(tmp_path / "file", os.O_RDONLY)
    request = data.draw(st.integers(1, 5)) * BLOCK
    threads = data.draw(st.integers(1, 4))
    crcs = block_crcs(file, BLOCK)
    done = native.load(
        fd, file.nbytes, BLOCK, crcs, np.array(ranges, np.int64).reshape(-1, 2), flat, index, request, threads
    )
    assert done == -1
    wanted = np.zeros(file.nbytes, np.uint8)
    for begin, nbytes in ranges:
        wanted[begin : begin + nbytes] = file[begin : begin + nbytes]
    wanted_values = wanted[position:][: count * 8]
    assert target[:count].tobytes() == wanted_values.tobytes()
    assert not target[count:].any()


def test_the_lowest_damaged_block_is_returned(open_file, tmp_path):
    file = random_bytes(3, 300 * BLOCK)
    crcs = block_crcs(file, BLOCK)
    target = np.zeros(file.nbytes, np.uint8)
    for damaged in ([0], [299], [17, 18, 250], [40, 41, 42, 43]):
        copy = file.copy()
        copy[[block * BLOCK + 5 for block in damaged]] ^= 1
        (tmp_path / "file").write_bytes(copy.tobytes())
        fd = open_file(tmp_path / "file", os.O_RDONLY)
        for threads in (1, 4):
            assert load_all(fd, file.nbytes, crcs, target, 2 * BLOCK, threads) == damaged[0]


@pytest.mark.parametrize("length", [0, 1, BLOCK, BLOCK + 100, 5 * BLOCK, 20 * BLOCK - 1])
def test_a_file_that_ends_too_early_is_damaged_where_it_ends(open_file, tmp_path, length):
    file = random_bytes(4, 20 * BLOCK)
    (tmp_path / "file").write_bytes(file[:length].tobytes())
    target = np.zeros(file.nbytes, np.uint8)
    fd = open_file(tmp_path / "file", os.O_RDONLY)
    for request in (BLOCK, 3 * BLOCK, 64 * BLOCK):
        assert load_all(fd, file.nbytes, block_crcs(file, BLOCK), target, request, 3) == length // BLOCK


def test_blocks_before_the_early_end_are_still_verified(open_file, tmp_path):
    file = random_bytes(5, 20 * BLOCK)
    crcs = block_crcs(file, BLOCK)
    file[3 * BLOCK] ^= 1
    (tmp_path / "file").write_bytes(file[: 9 * BLOCK].tobytes())
    fd = open_file(tmp_path / "file", os.O_RDONLY)
    assert load_all(fd, file.nbytes, crcs, np.zeros(file.nbytes, np.uint8), 64 * BLOCK, 1) == 3


def test_a_failed_read_names_position_and_errno(tmp_path):
    write_only = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    crcs = np.zeros(4, np.uint32)
    with pytest.raises(OSError, match="at position 0 of file descriptor") as caught:
        load_all(write_only, 4 * BLOCK, crcs, np.zeros(4 * BLOCK, np.uint8), 4 * BLOCK)
    assert caught.value.errno == errno.EBADF
    os.close(write_only)


def test_a_full_device_is_an_error_with_its_errno():
    data = aligned(BLOCK)
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="writing 4096 bytes at position 0") as caught:
        native.write(fd, data.ctypes.data, BLOCK, 0, BLOCK, 2)
    assert caught.value.errno == errno.ENOSPC
    os.close(fd)


def test_a_short_write_goes_on_until_the_error_that_stopped_it(open_file, tmp_path):
    """A file size limit cuts the write that crosses it short, then refuses the rest."""
    data = aligned(8 * BLOCK)
    data[:] = random_bytes(6, data.nbytes)
    fd = open_file(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * BLOCK, before[1]))
    try:
        with pytest.raises(OSError, match=f"at position {5 * BLOCK}") as caught:
            native.write(fd, data.ctypes.data, data.nbytes, 0, 8 * BLOCK, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "file").read_bytes() == data[: 5 * BLOCK].tobytes()


def test_a_short_write_that_stops_inside_of_a_block_reports_where(tmp_path):
    data = aligned(2 * BLOCK)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match="at position 5000") as caught:
            native.write(fd, data.ctypes.data, data.nbytes, 0, 2 * BLOCK, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        os.close(fd)
    assert caught.value.errno == errno.EFBIG


def test_nothing_is_written_for_no_bytes(tmp_path):
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    native.write(fd, 0, 0, 0, BLOCK, 4)
    assert os.fstat(fd).st_size == 0
    os.close(fd)


@pytest.mark.parametrize(
    ("nbytes", "position", "request_nbytes", "depth"),
    [
        (-1, 0, BLOCK, 1),
        (BLOCK, -1, BLOCK, 1),
        (BLOCK, 0, 0, 1),
        (BLOCK, 0, BLOCK, 0),
        (BLOCK, 2**63 - 1, BLOCK, 1),
    ],
)
def test_impossible_writes_are_refused(tmp_path, nbytes, position, request_nbytes, depth):
    data = aligned(BLOCK)
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    with pytest.raises(ValueError):
        native.write(fd, data.ctypes.data, nbytes, position, request_nbytes, depth)
    assert os.fstat(fd).st_size == 0
    os.close(fd)


@pytest.mark.parametrize(
    ("ranges", "request_nbytes", "message"),
    [
        ([[0, 8 * BLOCK]], BLOCK + 1, "request_nbytes"),
        ([[0, 8 * BLOCK]], 0, "request_nbytes"),
        ([[100, BLOCK]], BLOCK, "range 0"),
        ([[0, 100]], BLOCK, "range 0"),
        ([[0, 9 * BLOCK]], BLOCK, "range 0"),
        ([[0, -BLOCK]], BLOCK, "range 0"),
        ([[0, 2 * BLOCK], [BLOCK, BLOCK]], BLOCK, "range 1"),
        ([[BLOCK, BLOCK], [0, BLOCK]], BLOCK, "range 1"),
        ([0, BLOCK, BLOCK], BLOCK, "rows of 2"),
    ],
)
def test_ranges_out_of_bounds_are_refused(tmp_path, ranges, request_nbytes, message):
    (tmp_path / "file").write_bytes(bytes(8 * BLOCK))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    flat, index = table([])
    crcs = block_crcs(np.zeros(8 * BLOCK, np.uint8), BLOCK)
    with pytest.raises(ValueError, match=message):
        native.load(fd, 8 * BLOCK, BLOCK, crcs, np.array(ranges, np.int64), flat, index, request_nbytes, 1)
    os.close(fd)


def test_loads_from_several_python_threads_share_the_buffers(tmp_path):
    file = random_bytes(8, 64 * BLOCK)
    (tmp_path / "file").write_bytes(file.tobytes())
    crcs = block_crcs(file, BLOCK)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    wrong: list[int] = []

    def run(number: int) -> None:
        for turn in range(20):
            target = np.zeros(file.nbytes, np.uint8)
            done = load_all(fd, file.nbytes, crcs, target, (1 + (number + turn) % 5) * BLOCK, 3)
            if done != -1 or not np.array_equal(target, file):
                wrong.append(number)

    workers = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.close(fd)
    assert not wrong


@pytest.mark.parametrize("length", [1, BLOCK - 1, 5 * BLOCK, 5 * BLOCK + 17])
def test_a_file_without_checksums_is_read_to_its_last_byte_wherever_it_ends(open_file, tmp_path, length):
    file = random_bytes(6, length)
    (tmp_path / "file").write_bytes(file.tobytes())
    target = np.zeros(length, np.uint8)
    fd = open_file(tmp_path / "file", os.O_RDONLY)
    for request in (BLOCK, 3 * BLOCK):
        target[:] = 0
        assert load_all(fd, length, None, target, request, 3) == -1
        np.testing.assert_array_equal(target, file)


def test_a_file_without_checksums_that_ends_too_early_is_damaged_where_it_ends(open_file, tmp_path):
    (tmp_path / "file").write_bytes(random_bytes(7, 3 * BLOCK + 9).tobytes())
    fd = open_file(tmp_path / "file", os.O_RDONLY)
    assert load_all(fd, 5 * BLOCK + 100, None, np.zeros(5 * BLOCK + 100, np.uint8), BLOCK, 2) == 3
