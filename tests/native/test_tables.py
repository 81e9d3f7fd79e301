"""The rows that the package writes say to the C code what they are to say."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from native_tables import native

from ckptengine.native.tables import NOTHING, CopyPlan, ScatterPlan, copy_row, scatter_row

BLOCK = 65536


def crcs_of(data: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(data[start : start + BLOCK]) for start in range(0, data.size, BLOCK)], np.uint32)


def test_a_box_of_strided_memory_becomes_the_corner_of_its_chunk() -> None:
    source = np.arange(48, dtype=np.int32).reshape(6, 8)
    box = source[1:4, 2:8:2]
    memory = (box.ctypes.data, source.ctypes.data, source.nbytes)
    row = copy_row(64, 4 * 5 * 4, 0, 4, memory, (4, 5), box.shape, box.strides)
    image, crcs = np.full(256, 7, np.uint8), np.zeros(1, np.uint32)
    plan = CopyPlan.of([row])
    native.pack(image.ctypes.data, image.size, plan.ops, plan.index, BLOCK, crcs, 1)
    expected = np.zeros((4, 5), np.int32)
    expected[:3, :3] = box
    assert image[64:144].view(np.int32).reshape(4, 5).tolist() == expected.tolist()
    assert (image[:64] == 7).all()
    assert (image[144:] == 7).all()
    assert crcs[0] == zlib.crc32(expected.tobytes())


def test_a_row_is_filled_from_elsewhere_once_it_is_told_so() -> None:
    first, second = np.arange(4, dtype=np.int64), np.arange(4, 8, dtype=np.int64)
    rows = [
        copy_row(32 * n, 32, n, 8, (one.ctypes.data, one.ctypes.data, 32), (4,), (4,), (8,))
        for n, one in enumerate((first, second))
    ]
    plan, other = CopyPlan.of(rows), np.full(4, 9, np.int64)
    image, crcs = np.zeros(8, np.int64), np.zeros(2, np.uint32)
    plan.set_source(1, other.ctypes.data, other.nbytes)
    native.pack(image.ctypes.data, 64, plan.ops, plan.index, BLOCK, crcs, 1)
    assert image.tolist() == [0, 1, 2, 3, 9, 9, 9, 9]
    plan.replace(1, rows[1])
    native.pack(image.ctypes.data, 64, plan.ops, plan.index, BLOCK, crcs, 1)
    assert image.tolist() == list(range(8))


def test_a_box_of_a_chunk_goes_to_strided_memory() -> None:
    data = np.arange(60, dtype=np.uint16)
    target = np.zeros((4, 6), np.uint16)
    box = target[1:3, ::2]
    memory = (box.ctypes.data, target.ctypes.data, target.nbytes)
    plan = ScatterPlan.of([scatter_row(40, 40, 2, memory, (4, 5), (1, 2), box.shape, box.strides)])
    raw = data.view(np.uint8)
    end = native.scatter(raw.ctypes.data, 0, 120, 120, BLOCK, crcs_of(raw), plan.ops, plan.index, 1)
    assert end == -1
    assert box.tolist() == data[20:40].reshape(4, 5)[1:3, 2:5].tolist()
    assert target[[0, 3]].sum() == 0


def test_plain_bytes_of_several_places_go_to_their_addresses() -> None:
    raw = np.arange(200, dtype=np.uint8)
    out = np.zeros(12, np.uint8)
    positions, sizes = np.array([3, 50, 190], np.int64), np.array([4, 6, 2], np.int64)
    plan = ScatterPlan.of_bytes(positions, sizes, out.ctypes.data + np.array([0, 4, 10], np.int64))
    assert native.scatter(raw.ctypes.data, 0, 200, 200, BLOCK, crcs_of(raw), plan.ops, plan.index, 1) == -1
    assert out.tolist() == [*range(3, 7), *range(50, 56), 190, 191]


@pytest.mark.parametrize("damaged", [False, True])
def test_bytes_are_verified_where_nothing_is_wanted_of_them(damaged: bool) -> None:
    raw = np.arange(200, dtype=np.uint8)
    crcs = crcs_of(raw)
    raw[7] += damaged
    found = native.scatter(raw.ctypes.data, 0, 200, 200, BLOCK, crcs, NOTHING.ops, NOTHING.index, 1)
    assert found == (0 if damaged else -1)
