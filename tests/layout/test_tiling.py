from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from shardings import holding, kd_split, region

from ckptengine.layout.tiling import find_fault, inside, linear, tiles, untiled
from ckptengine.schema.box import Box


def cover(shape: tuple[int, ...], offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    count = np.zeros(shape, np.int64)
    for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
        count[region(offset, length)] += 1
    return count


@given(
    st.lists(st.integers(1, 8), max_size=4).map(tuple),
    st.integers(0, 2**32),
    st.integers(0, 3),
    st.booleans(),
)
def test_tiling_is_told_from_gaps_and_overlaps(shape: tuple[int, ...], seed: int, changes: int, add: bool) -> None:
    rng = random.Random(seed)
    boxes = kd_split(Box.whole(shape), rng.randint(1, 10), rng)
    for _ in range(changes):
        change = rng.choice(boxes) if boxes else Box.whole(shape)
        if add:
            boxes.append(change)
        elif boxes:
            boxes.remove(change)
    held = holding(("w",), shape, boxes)
    count = cover(shape, held.offsets, held.lengths)
    assert tiles(shape, held.offsets, held.lengths) == bool((count == 1).all())
    if not (count == 1).all():
        fault = find_fault(shape, held.offsets, held.lengths)
        assert count[fault.element] == len(fault.rows) != 1


def test_equal_volume_with_a_gap_and_an_overlap_is_no_tiling() -> None:
    assert not tiles((4,), np.array([[0], [1]]), np.array([[2], [2]]))


def test_the_tensors_at_fault_are_named_among_many() -> None:
    shapes = [(4,), (), (0, 3), (2, 2), (2, 2), ()]
    counts = np.array([2, 1, 0, 2, 1, 2])
    offsets = np.array([0, 2, 0, 0, 1, 0, 0, 0])
    lengths = np.array([2, 2, 1, 2, 1, 2, 2, 1])
    assert untiled(shapes, counts, offsets, lengths).tolist() == [4, 5]


def test_a_million_boxes_that_no_plane_separates_are_checked_in_linear_time() -> None:
    side = 1000
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1).reshape(-1, 2)
    assert tiles((side, side), grid, np.ones_like(grid))
    fault = find_fault((side, side), np.delete(grid, 123_456, axis=0), np.ones_like(grid)[1:])
    assert fault.element == (123, 456)
    assert fault.rows == ()


def test_linear_places_are_those_of_numpy() -> None:
    offsets = np.argwhere(np.ones((3, 4, 5), bool))
    assert linear((3, 4, 5), offsets).tolist() == list(range(60))


def test_boxes_at_the_ends_of_int64_do_not_wrap() -> None:
    huge = 2**63 - 1
    offsets, lengths = np.array([[huge], [1], [-1], [0]]), np.array([[huge], [huge], [2], [1 << 62]])
    assert inside((1 << 62,), offsets, lengths).tolist() == [False, False, False, True]
