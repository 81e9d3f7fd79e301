import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_tables import FILL, GUARD, aligned, block_crcs, examples, native, piece_bounds, random_bytes

BLOCKS = [1, 7, 64, 100, 4096]
EXTENT = tuple[int, int, int]  # position, nbytes, descriptor


@st.composite
def extents(draw: st.DrawFn) -> tuple[list[EXTENT], int]:
    rows, position = [], draw(st.integers(0, 50))
    for _ in range(draw(st.integers(0, 6))):
        nbytes = draw(st.sampled_from([0, 1, 5, 64, 128, 200, 999]))
        described = draw(st.booleans())
        rows.append((position, nbytes, position + nbytes if described else -1))
        position += nbytes + (4 if described else 0) + draw(st.sampled_from([0, 0, 3, 64]))
    return rows, position + draw(st.integers(0, 80))


def check(rows: list[EXTENT], fixed: int, block: int, threads: int, seed: int = 0) -> None:
    guarded = aligned(fixed + 2 * GUARD)
    guarded[:] = FILL
    image = guarded[GUARD : GUARD + fixed]
    image[:] = random_bytes(seed, fixed)
    final = image.copy()
    table, pieces, entries = [], [], []
    for position, nbytes, descriptor in rows:
        table.append((position, nbytes, len(pieces), descriptor))
        pieces += [zlib.crc32(image[a:b]) for a, b in piece_bounds(position, nbytes, block)]
        entries.append(zlib.crc32(image[position : position + nbytes]))
        if descriptor >= 0:
            final[descriptor : descriptor + 4] = np.frombuffer(struct.pack("<I", entries[-1]), np.uint8)
    entry_table = np.zeros(len(rows), np.uint32)
    block_table = np.zeros(-(-fixed // block), np.uint32)
    native.seal(
        image.ctypes.data,
        fixed,
        np.array(table, np.int64).reshape(-1, 4),
        block,
        np.array(pieces, np.uint32),
        entry_table,
        block_table,
        threads,
    )
    assert entry_table.tolist() == entries
    np.testing.assert_array_equal(image, final)
    np.testing.assert_array_equal(block_table, block_crcs(final, block))
    assert (guarded[:GUARD] == FILL).all()
    assert (guarded[GUARD + fixed :] == FILL).all()
    image[:] = random_bytes(seed, fixed)
    entry_table[:] = 0
    block_table[:] = 0
    step = (seed % 3 + 1) * block
    for begin in range(0, fixed, step):
        end = min(begin + step, fixed)
        rows_of_4 = np.array(table, np.int64).reshape(-1, 4)
        piece_table = np.array(pieces, np.uint32)
        native.seal(
            image.ctypes.data + begin,
            fixed,
            rows_of_4,
            block,
            piece_table,
            entry_table,
            block_table,
            threads,
            begin,
            end,
        )
    assert entry_table.tolist() == entries, "window by window"
    np.testing.assert_array_equal(image, final)
    np.testing.assert_array_equal(block_table, block_crcs(final, block))


@given(extents(), st.sampled_from(BLOCKS), st.integers(1, 3), st.integers(0, 99))
@examples
def test_entries_descriptors_and_blocks_are_those_of_the_final_image(drawn, block, threads, seed):
    rows, fixed = drawn
    check(rows, fixed, block, threads, seed)


def test_many_extents_over_many_blocks_are_sealed_by_several_threads():
    rows, position = [], 0
    for number in range(3000):
        nbytes = (number * 7919) % 1500
        rows.append((position, nbytes, position + nbytes))
        position += nbytes + 4 + number % 5
    check(rows, position + 100, 4096, 3)
    check([(4096, 3 << 20, -1), (5 << 20, 70_000, 6 << 20)], (6 << 20) + 4096, 65536, 3)


def test_a_block_inside_of_one_extent_takes_its_piece_without_reading_the_image():
    fixed, block = 4 * 64, 64
    image = np.zeros(fixed, np.uint8)
    pieces = np.array([11, 22, 33], np.uint32)
    blocks = np.zeros(4, np.uint32)
    extent = np.array([[10, fixed - 10 - 32, 0, -1]], np.int64)
    native.seal(
        image.ctypes.data,
        fixed,
        extent,
        block,
        np.append(pieces, np.uint32(44)),
        np.zeros(1, np.uint32),
        blocks,
        1,
    )
    assert blocks[1:3].tolist() == [22, 33]
    assert blocks[0] == blocks[3] == zlib.crc32(bytes(64))


def test_nothing_to_seal_is_no_work():
    empty = np.zeros(0, np.uint32)
    native.seal(0, 0, np.zeros((0, 4), np.int64), 64, empty, empty, empty, 2)


BIG = 2**63 - 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(-1, 10, 0, -1)], "extent 0"),
        ([(0, -1, 0, -1)], "extent 0"),
        ([(0, 1025, 0, -1)], "extent 0"),
        ([(BIG, BIG, 0, -1)], "extent 0"),
        ([(0, 10, 0, -1), (9, 10, 1, -1)], "extent 1"),
        ([(100, 10, 0, -1), (0, 10, 1, -1)], "extent 1"),
        ([(0, 10, -1, -1)], "extent 0: crc_index"),
        ([(0, 10, 16, -1)], "extent 0: crc_index"),
        ([(0, 10, BIG, -1)], "extent 0: crc_index"),
        ([(60, 10, 15, -1)], "extent 0: crc_index"),
        ([(0, 10, 0, 1021)], "extent 0: descriptor_pos"),
        ([(0, 10, 0, BIG)], "extent 0: descriptor_pos"),
        ([(0, 10, 0, 9)], "extent 0: descriptor_pos 9 lies within extent 0"),
        ([(0, 10, 0, 10), (13, 10, 1, -1)], "extent 0: descriptor_pos 10 lies within extent 1"),
        ([(0, 10, 0, -1), (20, 10, 1, 7)], "extent 1: descriptor_pos 7 lies within extent 0"),
    ],
)
def test_extents_out_of_bounds_are_refused_before_anything_is_touched(rows, message):
    image = np.full(1024, FILL, np.uint8)
    pieces, entries, blocks = np.zeros(16, np.uint32), np.zeros(2, np.uint32), np.zeros(16, np.uint32)
    with pytest.raises(ValueError, match=message):
        native.seal(image.ctypes.data, 1024, np.array(rows, np.int64), 64, pieces, entries, blocks, 1)
    assert (image == FILL).all()
    assert not blocks.any()


def test_tables_that_are_too_small_are_refused():
    image = np.zeros(1024, np.uint8)
    one, crcs = np.array([[0, 10, 0, -1]], np.int64), np.zeros(16, np.uint32)
    with pytest.raises(ValueError, match="entry_crcs"):
        native.seal(image.ctypes.data, 1024, one, 64, crcs, crcs[:0], crcs, 1)
    with pytest.raises(ValueError, match="block_crcs"):
        native.seal(image.ctypes.data, 1024, one, 64, crcs, crcs, crcs[:15].copy(), 1)
    with pytest.raises(ValueError, match="rows of 4"):
        native.seal(image.ctypes.data, 1024, one[0, :3].copy(), 64, crcs, crcs, crcs, 1)
    with pytest.raises(ValueError, match="image_address"):
        native.seal(0, 1024, one, 64, crcs, crcs, crcs, 1)
    for block, fixed in [(0, 1024), (-64, 1024), (64, -1)]:
        with pytest.raises(ValueError, match="block_nbytes"):
            native.seal(image.ctypes.data, fixed, one, block, crcs, crcs, crcs, 1)
