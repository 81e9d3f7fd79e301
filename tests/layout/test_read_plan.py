from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shardings import (
    KINDS,
    Sharding,
    perform,
    region,
    save,
    shapes,
    shardings,
    spread,
    touched_blocks,
    values,
)

from ckptengine.errors import CheckpointDamagedError, LoadMismatchError
from ckptengine.layout.read_plan import Copy, WantedPart, blocks, plan_read
from ckptengine.layout.rows import LeafRecord, RowTable
from ckptengine.schema.box import Box
from ckptengine.schema.head import LeafLayout
from ckptengine.schema.leaf import Placement


def check_reading(shape: tuple[int, ...], stored: Sharding, wanted: Sharding, dtype: str, block_nbytes: int) -> None:
    """Save one way, read another from nothing but the planned blocks, and compare every byte."""
    table, archives = save(shape, stored, dtype)
    tensor = values(shape, dtype)
    for boxes in wanted:
        targets = [np.full(box.shape, b"\xaa" * tensor.itemsize, tensor.dtype) for box in boxes]
        plan = plan_read(table, [WantedPart(0, box) for box in boxes])
        for number, copies in plan.items():
            assert all(copy.archive == number for copy in copies)
            assert [copy.position for copy in copies] == sorted(copy.position for copy in copies)
            ranges = blocks(copies, block_nbytes, len(archives[number]))
            check_ranges(ranges, copies, block_nbytes, len(archives[number]))
            read = bytearray(b"\xdd" * len(archives[number]))
            for start, end in ranges.tolist():
                read[start:end] = archives[number][start:end]
            for copy in copies:
                perform(copy, bytes(read), targets[copy.part])
        for box, target in zip(boxes, targets, strict=True):
            assert target.tobytes() == tensor[region(box.offset, box.shape)].tobytes()


def check_ranges(ranges: np.ndarray, copies: list[Copy], block_nbytes: int, fixed_nbytes: int) -> None:
    """Exactly the blocks that are needed are read: the ratio is 1, where 1.05 is asked for."""
    assert (ranges[1:, 0] > ranges[:-1, 1]).all()
    assert (ranges[:, 0] < ranges[:, 1]).all()
    assert (ranges[:, 0] % block_nbytes == 0).all()
    assert ((ranges[:, 1] % block_nbytes == 0) | (ranges[:, 1] == fixed_nbytes)).all()
    read = {block for start, end in ranges.tolist() for block in range(start // block_nbytes, -(-end // block_nbytes))}
    assert read == touched_blocks(copies, block_nbytes)


@given(st.data(), shapes, st.sampled_from(["uint8", "float32", "complex128"]), st.sampled_from([1, 8, 64, 512]))
def test_every_element_is_read_from_where_it_lies(
    data: st.DataObject, shape: tuple[int, ...], dtype: str, block_nbytes: int
) -> None:
    check_reading(shape, data.draw(shardings(shape)), data.draw(shardings(shape)), dtype, block_nbytes)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**32),
)
def test_leaves_that_were_split_are_read_back(a: str, b: str, write: int, read: int, seed: int) -> None:
    shape, rng = (600, 450), random.Random(seed)
    stored, wanted = spread(a, shape, write, rng), spread(b, shape, read, rng)
    check_reading(shape, stored, wanted, "complex128", 1 << 12)


def test_ten_rows_nested_two_by_two_are_read_by_three() -> None:
    stored = [[Box((0, 0), (3, 5))], [Box((3, 0), (2, 5))], [Box((5, 0), (3, 5))], [Box((8, 0), (2, 5))]]
    check_reading((10, 5), stored, spread("dim0", (10, 5), 3, random.Random(0)), "float32", 16)


def one_leaf(shape: tuple[int, ...], boxes: list[Box], chunk: tuple[int, ...] | None = None) -> RowTable:
    """Rows of one leaf of bytes, each in an archive of its own; the boxes of a grid are all of its cells."""
    leaf = LeafLayout(("m", "w"), "uint8", shape, Placement.SHARDED, "torch", chunk)
    stored = boxes if chunk is None else []
    return RowTable(
        (LeafRecord(*(getattr(leaf, name) for name in LEAF_FIELDS), None, (0, len(boxes))),),
        np.arange(len(boxes), dtype=np.int32),
        np.zeros(len(boxes), np.int64),
        np.asarray([o for box in stored for o in box.offset], np.int64),
        np.asarray([n for box in stored for n in box.shape], np.int64),
    )


LEAF_FIELDS = ("path", "dtype", "shape", "placement", "container", "chunk_shape")


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([Box((0,), (4,))], r"m\.w: element \[[4567]\] of shape \(8,\) lies in no stored box"),
        ([Box((0,), (4,)), Box((5,), (3,))], r"element \[4\]"),
        ([Box((0,), (4,)), Box((3,), (5,))], r"element \[3\] .* lies in 2 stored boxes .* ranks 0, 1"),
        ([Box((0,), (5,)), Box((3,), (3,))], "instead of one"),
        ([], "no stored box"),
    ],
)
def test_stored_boxes_that_do_not_tile_are_damage(boxes: list[Box], message: str) -> None:
    with pytest.raises(CheckpointDamagedError, match=message):
        plan_read(one_leaf((8,), boxes), [WantedPart(0, Box.whole((8,)))])


def test_only_the_wanted_part_must_be_there() -> None:
    plan = plan_read(one_leaf((8,), [Box((0,), (4,))]), [WantedPart(0, Box((1,), (2,)))])
    assert plan == {0: [Copy(0, 0, 0, 4, 1, (4,), (1,), (2,), (0,))]}


@pytest.mark.parametrize("box", [Box((7,), (2,)), Box((-1,), (2,)), Box((0, 0), (1, 1)), Box((), ())])
def test_a_part_outside_of_the_leaf_is_a_mismatch(box: Box) -> None:
    with pytest.raises(LoadMismatchError, match=r"m\.w"):
        plan_read(one_leaf((8,), [Box((0,), (8,))]), [WantedPart(0, box)])


def test_an_edge_chunk_is_read_from_its_padded_place() -> None:
    table = one_leaf(
        (5, 5), [Box((0, 0), (3, 3)), Box((0, 3), (3, 2)), Box((3, 0), (2, 3)), Box((3, 3), (2, 2))], (3, 3)
    )
    plan = plan_read(table, [WantedPart(0, Box((4, 4), (1, 1)))])
    assert plan == {3: [Copy(0, 3, 0, 9, 1, (3, 3), (1, 1), (1, 1), (0, 0))]}


def copy_of(dense: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], position: int = 0) -> Copy:
    return Copy(0, 0, position, int(np.prod(dense)), 1, dense, offset, shape, (0,) * len(shape))


def test_a_column_reads_only_the_blocks_of_its_rows() -> None:
    ranges = blocks([copy_of((10, 1000), (0, 500), (10, 4))], 100, 10_000)
    assert ranges.tolist() == [[row * 1000 + 500, row * 1000 + 600] for row in range(10)]


def test_a_column_of_short_rows_reads_one_range() -> None:
    assert blocks([copy_of((10, 50), (0, 20), (10, 4))], 100, 500).tolist() == [[0, 500]]


def test_ranges_join_where_blocks_touch_and_only_there() -> None:
    copies = [copy_of((100,), (0,), (100,), position) for position in (0, 100, 350, 700)]
    assert blocks(copies, 100, 760 + 40).tolist() == [[0, 200], [300, 500], [700, 800]]
    assert blocks(copies[::-1], 100, 800).tolist() == [[0, 200], [300, 500], [700, 800]]


def test_no_copies_need_no_blocks() -> None:
    assert blocks([], 100, 0).shape == (0, 2)


def test_a_chunk_beyond_the_fixed_region_is_damage() -> None:
    with pytest.raises(CheckpointDamagedError, match="does not lie within the 799 bytes"):
        blocks([copy_of((100,), (0,), (100,), 700)], 100, 799)


def test_a_row_of_a_leaf_with_a_hundred_thousand_chunks_is_found_without_looking_at_all() -> None:
    rows, columns = 400, 250
    boxes = [Box((row * 2, column * 2), (2, 2)) for row in range(rows) for column in range(columns)]
    table = one_leaf((rows * 2, columns * 2), boxes, (2, 2))
    wanted = [WantedPart(0, Box((0, column), (rows * 2, 1))) for column in range(columns)]
    plan = plan_read(table, wanted)
    assert sum(map(len, plan.values())) == rows * columns


class Watched:
    """Rows of which it is noted what is asked for."""

    def __init__(self, table: RowTable) -> None:
        self.leaves, self.index = table.leaves, table.index
        self.table = table
        self.asked: list[int] = []

    def places(self, rows: np.ndarray, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.asked += rows.tolist()
        return self.table.places(rows, nbytes)

    def boxes(self, leaf: int) -> tuple[np.ndarray, np.ndarray]:
        assert not self.leaves[leaf].is_grid
        return self.table.boxes(leaf)

    def orders(self, rows: np.ndarray) -> None:
        return self.table.orders(rows)


def test_only_the_rows_of_the_cells_that_are_wanted_are_asked_for() -> None:
    boxes = [Box((row * 2, column * 2), (2, 2)) for row in range(300) for column in range(300)]
    rows = Watched(one_leaf((600, 600), boxes, (2, 2)))
    plan_read(rows, [WantedPart(0, Box((7, 9), (2, 1))), WantedPart(0, Box((0, 0), (0, 5)))])
    assert rows.asked == [3 * 300 + 4, 4 * 300 + 4]
