import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_tables import (
    FILL,
    GUARD,
    SANITIZED,
    PackOp,
    aligned,
    examples,
    native,
    pack_table,
    piece_bounds,
    random_bytes,
    strided,
    table,
)

VARIANTS = native.variants()
BLOCKS = [1, 3, 64, 100, 256, 4096, 65536]


@st.composite
def pack_ops(draw: st.DrawFn) -> list[PackOp]:
    ops, position = [], 0
    for _ in range(draw(st.integers(0, 5))):
        source = draw(strided())
        padding = [draw(st.sampled_from([0, 0, 1, 3])) for _ in source.shape]
        position += draw(st.integers(0, 70))
        op = PackOp(position, tuple(n + p for n, p in zip(source.shape, padding, strict=True)), source)
        ops.append(op)
        position += op.nbytes
    return ops


def expected(ops: list[PackOp], nbytes: int, block: int) -> tuple[np.ndarray, list[int]]:
    image = np.full(nbytes, FILL, np.uint8)
    crcs = []
    for op in ops:
        image[op.position : op.position + op.nbytes] = np.frombuffer(op.dense(), np.uint8)
        for begin, end in piece_bounds(op.position, op.nbytes, block):
            crcs.append(zlib.crc32(image[begin:end]))
    return image, crcs


def check(ops: list[PackOp], block: int, threads: int, variant: str | None = None, offset: int = 0) -> None:
    nbytes = max((op.position + op.nbytes for op in ops), default=0) + 5
    guarded = aligned(nbytes + 2 * GUARD, offset)
    guarded[:] = FILL
    flat, index, crcs = pack_table(ops, block)
    native.pack(guarded.ctypes.data + GUARD, nbytes, flat, index, block, crcs, threads, variant)
    image, wanted = expected(ops, nbytes, block)
    np.testing.assert_array_equal(guarded[GUARD : GUARD + nbytes], image)
    assert (guarded[:GUARD] == FILL).all()
    assert (guarded[GUARD + nbytes :] == FILL).all()
    assert crcs.tolist() == wanted
    crcs[:] = 0
    native.pack(0, nbytes, flat, index, block, crcs, threads, variant)
    assert crcs.tolist() == wanted, "a virtual image has the same checksums"
    for op in ops:
        op.address = 0
    flat, index, _ = pack_table(ops, block)
    crcs[:] = 0
    native.pack(guarded.ctypes.data + GUARD, nbytes, flat, index, block, crcs, threads, variant)
    assert crcs.tolist() == wanted, "bytes already in the image have the same checksums"


@given(pack_ops(), st.sampled_from(BLOCKS), st.integers(1, 3), st.sampled_from(VARIANTS), st.integers(0, 63))
@examples
def test_any_strided_arrays_are_packed_as_numpy_would(ops, block, threads, variant, offset):
    check(ops, block, threads, variant, offset)


@given(pack_ops(), st.sampled_from(BLOCKS), st.integers(1, 3), st.integers(1, 9))
@examples
def test_an_image_that_is_filled_window_by_window_through_less_memory_is_the_same(ops, block, threads, blocks):
    nbytes = max((op.position + op.nbytes for op in ops), default=0)
    image, wanted = expected(ops, nbytes, block)
    flat, index, crcs = pack_table(ops, block)
    for begin in range(0, nbytes, blocks * block):
        end = min(begin + blocks * block, nbytes)
        memory = np.full(end - begin + 2 * GUARD, FILL, np.uint8)
        address = memory.ctypes.data + GUARD
        native.pack(address, nbytes, flat, index, block, crcs, threads, None, begin, end)
        assert np.array_equal(memory[GUARD:-GUARD], image[begin:end])
        assert (memory[:GUARD] == FILL).all()
        assert (memory[-GUARD:] == FILL).all()
    assert crcs.tolist() == wanted


@pytest.mark.parametrize("window", [(1, 128), (0, 100), (-64, 64), (128, 64), (0, 192 + 64), (0, 190)])
def test_a_window_that_is_not_cut_at_blocks_of_the_image_is_refused(window):
    flat, index, crcs = pack_table([PackOp(0, (180,), random_bytes(1, 180))], 64)
    image = aligned(192)
    with pytest.raises(ValueError, match="the window"):
        native.pack(image.ctypes.data, 192, flat, index, 64, crcs, 1, None, *window)


LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T,
    "reversed": lambda a: a[::-1, ::-1],
    "columns": lambda a: a[:, 7:-5],
    "every other column": lambda a: a[:, ::2],
    "every other row": lambda a: a[::2],
    "transposed columns": lambda a: a[:, 3:-2].T,
    "reversed transposed": lambda a: a.T[::-1, ::-1],
    "permuted": lambda a: a[:, : a.shape[1] // 6 * 6].reshape(a.shape[0], -1, 6).transpose(2, 0, 1),
    "channels first": lambda a: a[:, : a.shape[1] // 6 * 6].reshape(a.shape[0], -1, 6).transpose(0, 2, 1),
    "short rows": lambda a: a[:, : a.shape[1] // 6 * 6].reshape(a.shape[0], -1, 6)[:, :, 1:3],
    "repeated": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "repeated rows": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "f8", "c16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_tensor_larger_than_a_unit_is_cut_and_put_together(layout, dtype, threads):
    itemsize = np.dtype(dtype).itemsize
    rows, columns = 61 if SANITIZED else 331, 2003 * 4 // itemsize
    source = LAYOUTS[layout](random_bytes(3, rows * columns * itemsize).view(dtype).reshape(rows, columns))
    padded = tuple(n + 3 for n in source.shape)
    check([PackOp(13, source.shape, source)], 4096, threads)
    check([PackOp(65536, source.shape, source)], 65536, threads, offset=4096 - GUARD)
    check([PackOp(4096, padded, source)], 10_000, threads)


def test_an_image_of_many_small_tensors_is_cut_between_them():
    ops, position = [], 0
    for number in range(700 if SANITIZED else 3000):
        source = random_bytes(number, 4 * (number % 300)).view("f4")
        ops.append(PackOp(position, source.shape, source))
        position += source.nbytes + number % 3
    check(ops, 4096, 3)


def test_blocks_larger_than_a_unit_give_one_piece():
    source = random_bytes(5, 3_000_000)
    check([PackOp(100, source.shape, source)], 1 << 30, 2)


def test_scalars_and_empty_tensors_are_packed():
    scalar = np.array(2.5)
    empty = np.zeros((3, 0, 2), np.float32)
    check([PackOp(3, (), scalar), PackOp(11, (3, 0, 2), empty), PackOp(11, (5, 1, 2), empty)], 64, 1)


def test_a_box_without_elements_leaves_padding_only():
    empty = np.zeros((0, 4), np.float32)
    check([PackOp(8, (3, 4), empty)], 16, 1)


def test_no_ops_are_no_work():
    native.pack(0, 0, np.zeros(0, np.int64), np.zeros(1, np.int64), 64, np.zeros(0, np.uint32), 4)


# ---- bounds ----


def call(row: list[int], address: int | None = None) -> None:
    image = np.full(4096, FILL, np.uint8)
    flat, index = table([row])
    crcs = np.zeros(64, np.uint32)
    try:
        native.pack(image.ctypes.data if address is None else address, 4096, flat, index, 64, crcs, 1)
    finally:
        assert (image == FILL).all()
        assert not crcs.any()


def row_with(**changes: int) -> list[int]:
    source = np.arange(24, dtype=np.uint32).reshape(4, 6)
    row = PackOp(32, (4, 6), source).row(0)
    names = ["file_pos", "nbytes", "crc_index", "itemsize", "ndim", "address", "low", "size"]
    names += ["dense0", "dense1", "box0", "box1", "stride0", "stride1"]
    for name, value in changes.items():
        row[names.index(name)] = value
    return row


BIG = 2**63 - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_pos": -1}, "outside of the image"),
        ({"file_pos": 4001}, "outside of the image"),
        ({"file_pos": BIG}, "outside of the image"),
        ({"nbytes": -1}, "outside of the image"),
        ({"nbytes": BIG}, "outside of the image"),
        ({"nbytes": 92}, "dense shape"),
        ({"crc_index": -1}, "crc_index"),
        ({"crc_index": 63}, "crc_index"),
        ({"crc_index": BIG}, "crc_index"),
        ({"itemsize": 3}, "itemsize"),
        ({"itemsize": 0}, "itemsize"),
        ({"ndim": 3}, "index"),
        ({"ndim": -1}, "index"),
        ({"ndim": BIG}, "index"),
        ({"low": BIG}, "source"),
        ({"low": -1}, "source"),
        ({"size": -1}, "source"),
        ({"size": 95}, "source"),
        ({"size": BIG}, "source"),
        ({"dense0": -4}, "dimension 0"),
        ({"dense0": BIG, "dense1": BIG}, "dense shape"),
        ({"box0": 5}, "dimension 0"),
        ({"box1": -1}, "dimension 1"),
        ({"stride0": 25}, "source"),
        ({"stride0": -24}, "source"),
        ({"stride0": BIG}, "source"),
        ({"stride1": -BIG - 1}, "source"),
        ({"address": -8}, "source"),
        ({"address": 8}, "source"),
    ],
)
def test_an_op_out_of_bounds_is_refused_before_anything_is_touched(changes, message):
    with pytest.raises(ValueError, match=rf"op 0: .*{message}"):
        call(row_with(**changes))


def test_the_refused_op_is_named_by_its_number():
    source = np.zeros(4, np.uint8)
    good, bad = PackOp(0, (4,), source), PackOp(95, (4,), source)
    flat, index = table([good.row(0), good.row(1), bad.row(2)])
    image = np.zeros(96, np.uint8)
    with pytest.raises(ValueError, match="op 2: file_pos 95"):
        native.pack(image.ctypes.data, 96, flat, index, 64, np.zeros(9, np.uint32), 1)


def test_checksums_of_bytes_that_are_nowhere_are_refused():
    with pytest.raises(ValueError, match="op 0: src_address is 0"):
        call(row_with(address=0), address=0)


@pytest.mark.parametrize("index", [[0, 13], [0, 15], [-1, 13], [14, 0], [1, 14], [0, BIG], [BIG, 0], [-BIG, BIG]])
def test_an_index_that_does_not_fit_the_ops_is_refused(index):
    image = np.zeros(4096, np.uint8)
    flat = np.array(row_with(), np.int64)
    with pytest.raises(ValueError, match="op 0: index"):
        native.pack(image.ctypes.data, 4096, flat, np.array(index), 64, np.zeros(64, np.uint32), 1)


def test_tables_of_other_types_are_refused():
    flat, index = table([row_with()])
    crcs = np.zeros(64, np.uint32)
    frozen = crcs.copy()
    frozen.flags.writeable = False
    image = np.zeros(4096, np.uint8)
    for bad_ops, bad_index, bad_crcs, name in [
        (flat.astype(np.int32), index, crcs, "ops"),
        (flat, index.astype(np.int16), crcs, "index"),
        (flat, index[:0], crcs, "index"),
        (flat, index, crcs.astype(np.uint64), "crcs"),
    ]:
        with pytest.raises(ValueError, match=name):
            native.pack(image.ctypes.data, 4096, bad_ops, bad_index, 64, bad_crcs, 1)
    with pytest.raises((ValueError, BufferError)):
        native.pack(image.ctypes.data, 4096, flat, index, 64, frozen, 1)
    with pytest.raises((ValueError, BufferError)):
        native.pack(image.ctypes.data, 4096, np.repeat(flat, 2)[::2], index, 64, crcs, 1)


@pytest.mark.parametrize(("block", "threads"), [(0, 1), (-1, 1), (64, 0), (64, -1), (64, 257)])
def test_impossible_sizes_are_refused(block, threads):
    flat, index = table([row_with()])
    image = np.zeros(4096, np.uint8)
    with pytest.raises(ValueError, match=r"block_nbytes|threads"):
        native.pack(image.ctypes.data, 4096, flat, index, block, np.zeros(64, np.uint32), threads)


@pytest.mark.parametrize("ends", [(2**40, -(2**63)), (BIG, -(2**63)), (-(2**63), 8), (8, 0), (0, BIG), (-1, -1)])
def test_an_index_that_leads_nowhere_is_refused_whatever_its_numbers(ends):
    flat, _ = table([row_with()])
    index = np.array(ends, np.int64)
    image, crcs = np.full(4096, FILL, np.uint8), np.zeros(64, np.uint32)
    with pytest.raises(ValueError, match="op 0: index entries"):
        native.pack(image.ctypes.data, 4096, flat, index, 64, crcs, 1)
    assert (image == FILL).all()
