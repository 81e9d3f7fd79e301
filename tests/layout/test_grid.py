from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shardings import Sharding, holding, shardings, spread

from ckptengine.layout.grid import cell_index, regular_grid


def grid_of(shape: tuple[int, ...], sharding: Sharding, itemsize: int = 1) -> tuple[int, ...] | None:
    boxes = [box for boxes in sharding for box in boxes]
    held = holding(("w",), shape, boxes)
    return regular_grid(shape, held.offsets, held.lengths, itemsize)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4), st.randoms())
def test_all_cells_of_a_grid_in_any_order_are_found(dims: list[tuple[int, int]], rng) -> None:  # type: ignore[no-untyped-def]
    shape = tuple(length for length, _ in dims)
    chunk = tuple(min(pair) for pair in dims)
    offsets = list(itertools.product(*(range(0, n, c) for n, c in zip(shape, chunk, strict=True))))
    rng.shuffle(offsets)
    starts = np.asarray(offsets, np.int64).reshape(len(offsets), len(shape))
    lengths = np.minimum(np.asarray(chunk, np.int64), np.asarray(shape, np.int64) - starts)
    assert regular_grid(shape, starts, lengths) == chunk
    repeated = np.concatenate([starts, starts[:1]]), np.concatenate([lengths, lengths[:1]])
    assert regular_grid(shape, *repeated) == chunk
    if len(offsets) > 1:
        assert regular_grid(shape, starts[1:], lengths[1:]) is None


def test_a_scalar_has_the_empty_chunk_shape() -> None:
    assert grid_of((), spread("replicas", (), 3, None)) == ()  # type: ignore[arg-type]


def test_a_leaf_without_elements_has_chunks_of_at_least_one() -> None:
    none = np.zeros((0, 2), np.int64)
    assert regular_grid((0, 3), none, none) == (1, 3)


def test_ten_rows_nested_two_by_two_are_no_grid() -> None:
    offsets, lengths = np.array([[0], [3], [5], [8]]), np.array([[3], [2], [3], [2]])
    assert regular_grid((10,), offsets, lengths) is None


def test_boxes_outside_of_the_shape_are_no_grid() -> None:
    assert regular_grid((4,), np.array([[-2], [0], [2]]), np.array([[2], [2], [2]])) is None
    assert regular_grid((4,), np.array([[0], [4]]), np.array([[4], [0]])) is None


@pytest.mark.parametrize(("itemsize", "expected"), [(4, (512, 1024)), (8, None)])
def test_padding_of_a_third_is_accepted_up_to_one_mebibyte(itemsize: int, expected: tuple[int, ...] | None) -> None:
    offsets, lengths = np.array([[0, 0], [512, 0]]), np.array([[512, 1024], [256, 1024]])
    assert regular_grid((768, 1024), offsets, lengths, itemsize) == expected


@given(shardings((10, 6)))
def test_a_grid_that_is_found_has_the_boxes_as_cells(sharding: Sharding) -> None:
    chunk = grid_of((10, 6), sharding)
    if chunk is not None:
        boxes = {box.offset for boxes in sharding for box in boxes}
        cells = {cell_index(offset, chunk) for offset in boxes}
        assert cells == set(itertools.product(*(range(-(-n // c)) for n, c in zip((10, 6), chunk, strict=True))))
