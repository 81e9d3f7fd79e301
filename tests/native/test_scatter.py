import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_tables import (
    FILL,
    SANITIZED,
    PackOp,
    ScatterOp,
    block_crcs,
    examples,
    memory_of,
    native,
    pack_table,
    random_bytes,
    strided,
    table,
)

BLOCKS = [1, 3, 64, 100, 256, 4096]


def owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@st.composite
def scatter_ops(draw: st.DrawFn) -> list[ScatterOp]:
    ops, position = [], 0
    for _ in range(draw(st.integers(0, 5))):
        target = draw(strided(broadcast=False))
        before = [draw(st.sampled_from([0, 0, 1, 2])) for _ in target.shape]
        after = [draw(st.sampled_from([0, 0, 1, 3])) for _ in target.shape]
        dense = tuple(b + n + a for b, n, a in zip(before, target.shape, after, strict=True))
        op = ScatterOp(position, dense, tuple(before), target)
        ops.append(op)
        # the next op may read the same bytes again
        position += draw(st.sampled_from([0, op.nbytes, op.nbytes + 5, op.nbytes // 2]))
    return ops


def reset(ops: list[ScatterOp]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fill all memory that the targets are views of, and return it with what it must hold in the end."""
    memories = []
    for op in ops:
        memory = owner(op.target)
        memory.view(np.uint8)[:] = FILL
        memories.append((memory, memory.copy()))
    return memories


def expect(op: ScatterOp, file: np.ndarray, wanted: np.ndarray) -> None:
    low, _ = memory_of(op.target)
    start = op.target.ctypes.data - low
    view = np.ndarray(op.target.shape, op.target.dtype, wanted.data, start, op.target.strides)
    view[...] = op.expected(file)


@given(scatter_ops(), st.sampled_from(BLOCKS), st.integers(1, 3), st.data())
@examples
def test_any_sub_boxes_arrive_whatever_ranges_the_file_is_read_in(ops, block, threads, data):
    end = max((op.position + op.nbytes for op in ops), default=0)
    file = random_bytes(data.draw(st.integers(0, 99)), end + data.draw(st.integers(0, 70)))
    crcs = block_crcs(file, block)
    memories = reset(ops)
    for op, (_, wanted) in zip(ops, memories, strict=True):
        expect(op, file, wanted)
    flat, index = table(op.row() for op in ops)
    cuts = data.draw(st.lists(st.integers(0, len(crcs)), max_size=3))
    edges = [0, *sorted(cut * block for cut in cuts), len(file)]
    for position, stop in itertools.pairwise(edges):
        part = file[position:stop].copy()
        if part.size == 0:
            continue
        done = native.scatter(part.ctypes.data, position, len(part), len(file), block, crcs, flat, index, threads)
        assert done == -1
    for memory, wanted in memories:
        np.testing.assert_array_equal(memory.view(np.uint8), wanted.view(np.uint8))


@given(strided(broadcast=False), st.sampled_from(BLOCKS), st.integers(0, 50))
@examples
def test_scatter_undoes_pack(source, block, position):
    op = PackOp(position, source.shape, source)
    image = np.zeros(position + op.nbytes, np.uint8)
    flat, index, crcs = pack_table([op], block)
    native.pack(image.ctypes.data, image.nbytes, flat, index, block, crcs, 1)
    target = np.zeros(source.shape, source.dtype)
    flat, index = table([ScatterOp(position, source.shape, (0,) * source.ndim, target).row()])
    done = native.scatter(
        image.ctypes.data, 0, image.nbytes, image.nbytes, block, block_crcs(image, block), flat, index, 1
    )
    assert done == -1
    assert target.tobytes() == source.tobytes()


TARGETS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T,
    "reversed": lambda a: a[::-1, ::-1],
    "columns": lambda a: a[:, 7:-5],
    "every other column": lambda a: a[:, ::2],
    "every other row": lambda a: a[::2],
    "permuted": lambda a: a[:, : a.shape[1] // 6 * 6].reshape(a.shape[0], -1, 6).transpose(2, 0, 1),
    "channels first": lambda a: a[:, : a.shape[1] // 6 * 6].reshape(a.shape[0], -1, 6).transpose(0, 2, 1),
    "short rows": lambda a: a[:, : a.shape[1] // 6 * 6].reshape(a.shape[0], -1, 6)[:, :, 1:3],
}


@pytest.mark.parametrize("layout", TARGETS)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "f8", "c16"])
@pytest.mark.parametrize(("position", "block"), [(0, 4096), (13, 65536), (4099, 10_000)])
def test_a_tensor_over_many_blocks_arrives(layout, dtype, position, block):
    itemsize = np.dtype(dtype).itemsize
    rows, columns = 61 if SANITIZED else 211, 2003 * 4 // itemsize
    target = TARGETS[layout](np.zeros(rows * columns, dtype).reshape(rows, columns))
    offset = (2,) * target.ndim
    op = ScatterOp(position, tuple(n + 5 for n in target.shape), offset, target)
    file = random_bytes(4, position + op.nbytes + 77)
    memories = reset([op])
    expect(op, file, memories[0][1])
    flat, index = table([op.row()])
    done = native.scatter(file.ctypes.data, 0, len(file), len(file), block, block_crcs(file, block), flat, index, 3)
    assert done == -1
    np.testing.assert_array_equal(memories[0][0].view(np.uint8), memories[0][1].view(np.uint8))


def small_file() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    file = random_bytes(6, 1000)
    target = np.full(1000, FILL, np.uint8)
    flat, index = table([ScatterOp(0, (1000,), (0,), target).row()])
    return file, block_crcs(file, 64), flat, index, target


@given(st.integers(0, 999), st.integers(0, 7), st.integers(1, 3))
@examples
def test_any_flipped_bit_is_found_in_its_block_and_the_block_is_not_scattered(position, bit, threads):
    file, crcs, flat, index, target = small_file()
    file[position] ^= 1 << bit
    block = position // 64
    assert native.scatter(file.ctypes.data, 0, 1000, 1000, 64, crcs, flat, index, threads) == block
    assert (target[block * 64 : block * 64 + 64] == FILL).all()


def test_the_first_of_several_damaged_blocks_is_returned():
    file = random_bytes(7, 4_000_000)
    crcs = block_crcs(file, 4096)
    damaged = [100, 400, 500, 700, 976]
    file[[block * 4096 for block in damaged]] ^= 128
    flat, index = table([])
    for threads in (1, 2, 5):
        for first in damaged:
            position = first * 4096
            size = len(file) - position
            found = native.scatter(
                file[position:].ctypes.data, position, size, len(file), 4096, crcs, flat, index, threads
            )
            assert found == first


def test_an_empty_range_is_no_work():
    _, crcs, flat, index, target = small_file()
    assert native.scatter(0, 0, 0, 1000, 64, crcs, flat, index, 1) == -1
    assert (target == FILL).all()


# ---- bounds ----


def row_with(**changes: int) -> list[int]:
    target = np.zeros((4, 6), np.uint32)
    row = ScatterOp(32, (6, 8), (1, 1), target).row()
    names = ["file_pos", "nbytes", "itemsize", "ndim", "address", "low", "size"]
    names += ["dense0", "dense1", "offset0", "offset1", "box0", "box1", "stride0", "stride1"]
    for name, value in changes.items():
        row[names.index(name)] = value
    return row


BIG = 2**63 - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_pos": -1}, "fixed region"),
        ({"file_pos": 900}, "fixed region"),
        ({"file_pos": BIG}, "fixed region"),
        ({"nbytes": -1}, "fixed region"),
        ({"nbytes": 188}, "dense shape"),
        ({"itemsize": 5}, "itemsize"),
        ({"ndim": 1}, "index"),
        ({"address": 0}, "destination address is 0"),
        ({"address": 8}, "destination"),
        ({"low": BIG}, "destination"),
        ({"size": 95}, "destination"),
        ({"size": -1}, "destination"),
        ({"offset0": -1}, "dimension 0"),
        ({"offset0": 3}, "dimension 0"),
        ({"offset1": BIG}, "dimension 1"),
        ({"box1": 8}, "dimension 1"),
        ({"box0": -1}, "dimension 0"),
        ({"stride0": 25}, "destination"),
        ({"stride0": 0}, "overlap"),
        ({"stride1": 3}, "overlap"),
        ({"stride1": -4}, "destination"),
        ({"stride0": BIG}, "destination"),
    ],
)
def test_an_op_out_of_bounds_is_refused(changes, message):
    file, crcs, _, _, _ = small_file()
    flat, index = table([row_with(**changes)])
    with pytest.raises(ValueError, match=rf"op 0: .*{message}"):
        native.scatter(file.ctypes.data, 0, 1000, 1000, 64, crcs, flat, index, 1)


@pytest.mark.parametrize("ends", [(2**40, -(2**63)), (BIG, -(2**63)), (-(2**63), 8), (8, 0), (0, BIG), (-1, -1)])
def test_an_index_that_leads_nowhere_is_refused_whatever_its_numbers(ends):
    file, crcs, _, _, _ = small_file()
    flat, _ = table([row_with()])
    with pytest.raises(ValueError, match="op 0: index entries"):
        native.scatter(file.ctypes.data, 0, 1000, 1000, 64, crcs, flat, np.array(ends, np.int64), 1)


def test_ops_out_of_order_are_refused():
    file, crcs, _, _, _ = small_file()
    flat, index = table([row_with(file_pos=100), row_with(file_pos=99)])
    with pytest.raises(ValueError, match="op 1: file_pos 99"):
        native.scatter(file.ctypes.data, 0, 1000, 1000, 64, crcs, flat, index, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": 32, "nbytes": 64}, "block_nbytes"),
        ({"nbytes": 100}, "block_nbytes"),
        ({"nbytes": 1001}, "fixed region"),
        ({"nbytes": -64}, "fixed region"),
        ({"position": 64}, "fixed region"),
        ({"position": -64}, "fixed region"),
        ({"position": BIG}, "fixed region"),
        ({"fixed": 1100}, "block_crcs"),
        ({"fixed": -1}, "fixed_nbytes"),
        ({"block": 0}, "block_nbytes"),
        ({"block": 32}, "block_crcs"),
        ({"threads": 0}, "threads"),
        ({"address": 0}, "address"),
        ({"address": -1}, "address"),
    ],
)
def test_a_range_out_of_bounds_is_refused(changes: dict[str, int], message: str):
    file, crcs, flat, index, target = small_file()
    given: dict[str, Any] = {
        "address": file.ctypes.data,
        "position": 0,
        "nbytes": 1000,
        "fixed": 1000,
        "block": 64,
    }
    given |= {"threads": 1, **changes}
    with pytest.raises(ValueError, match=message):
        native.scatter(
            given["address"],
            given["position"],
            given["nbytes"],
            given["fixed"],
            given["block"],
            crcs,
            flat,
            index,
            given["threads"],
        )
    assert (target == FILL).all()
