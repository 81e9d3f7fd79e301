from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shardings import save, shapes, shardings, spread

from ckptengine.layout.rows import (
    LeafRecord,
    RowTable,
    check_boxes,
    check_places,
    leaves_from_json,
    leaves_to_json,
    number_starts,
)
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import Placement


@given(st.data(), shapes)
def test_leaves_come_back_from_their_json(data: st.DataObject, shape: tuple[int, ...]) -> None:
    table, _ = save(shape, data.draw(shardings(shape)))
    assert leaves_from_json(json.loads(json.dumps(leaves_to_json(table.leaves)))) == table.leaves


@given(st.data(), shapes)
def test_only_fragments_store_their_boxes(data: st.DataObject, shape: tuple[int, ...]) -> None:
    table, _ = save(shape, data.draw(shardings(shape)))
    (record,) = table.leaves
    numbers = 0 if record.is_grid else table.archive.size * len(shape)
    assert number_starts(table.leaves) == [0, numbers]
    assert table.offsets.size == table.lengths.size == numbers
    assert [column.shape for column in table.boxes(0)] == [(table.archive.size, len(shape))] * 2


def example() -> list[dict[str, Any]]:
    return leaves_to_json(save((6, 4), spread("dim0", (6, 4), 3, random.Random(0)))[0].leaves)


def fragments() -> list[dict[str, Any]]:
    return [{**example()[0], "chunk_shape": None, "rows": [0, 24]}]


def test_the_json_of_a_leaf_is_what_the_format_says() -> None:
    assert example() == [
        {
            "path": ["w"],
            "dtype": "float32",
            "shape": [6, 4],
            "placement": "sharded",
            "container": "torch",
            "chunk_shape": [2, 4],
            "rank": None,
            "rows": [0, 3],
        }
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": []}, "path"),
        ({"path": ["w", True]}, "path"),
        ({"path": "w"}, "path"),
        ({"dtype": "float33"}, "unknown dtype"),
        ({"dtype": ["float32"]}, "unknown dtype"),
        ({"shape": [6, -4]}, "out of range"),
        ({"shape": [6, 4.0]}, "integers"),
        ({"shape": [1] * 33}, "at most 32"),
        ({"shape": [1 << 40, 1 << 40]}, "larger than any tensor"),
        ({"shape": [0, 1 << 62], "chunk_shape": None}, "larger than any tensor"),
        ({"shape": [6, 4, 1]}, "does not fit"),
        ({"shape": [4, 4]}, "its grid has 2 cells, not 3"),
        ({"shape": [7, 4]}, "its grid has 4 cells, not 3"),
        ({"shape": [0, 4], "chunk_shape": [1, 4]}, "its grid has 0 cells, not 3"),
        ({"chunk_shape": [0, 4]}, "does not fit"),
        ({"chunk_shape": [2, 5]}, "does not fit"),
        ({"chunk_shape": [3, 4]}, "its grid has 2 cells"),
        ({"chunk_shape": 7}, "chunk_shape"),
        ({"placement": "here"}, "placement"),
        ({"placement": "per_rank"}, "rank None does not fit"),
        ({"rank": 1}, "rank 1 does not fit"),
        ({"container": None}, "container"),
        ({"rows": [0, 2]}, "its grid has 3 cells, not 2"),
        ({"rows": [0, 4]}, "its grid has 3 cells, not 4"),
        ({"rows": [1, 4]}, "don't follow"),
        ({"rows": [0, -1]}, "don't follow"),
        ({"rows": [0, 1 << 70]}, "its grid has 3 cells"),
        ({"rows": [0]}, "two integers"),
        ({"more": 1}, "exactly"),
        ({"chunk_shape": None, "rows": [0, 25]}, "25 fragments are more than it has elements"),
        ({"chunk_shape": None, "shape": [6, 0], "rows": [0, 1]}, "1 fragments are more"),
    ],
)
def test_a_leaf_that_lies_is_refused(change: dict[str, Any], message: str) -> None:
    leaves = example()
    assert leaves_from_json(leaves)
    assert leaves_from_json(fragments())
    leaves[0].update(change)
    with pytest.raises(ValueError, match=message):
        leaves_from_json(leaves)


def test_tables_of_other_kinds_are_refused() -> None:
    for wrong in (None, {}, [None], [[]], example() * 2, [{}]):
        with pytest.raises(ValueError):
            leaves_from_json(wrong)


@pytest.mark.parametrize(
    ("archive", "position", "nbytes", "message"),
    [
        (-1, 0, 32, "archive -1, which there is not"),
        (3, 0, 32, "archive 3, which there is not"),
        (0, -1, 32, "do not lie within"),
        (0, 69, 32, "do not lie within"),
        (0, 2**63 - 1, 32, "do not lie within"),
        (0, 0, -1, "do not lie within"),
        (0, 0, 2**63 - 1, "do not lie within"),
    ],
)
def test_a_place_outside_of_the_archives_is_refused(archive: int, position: int, nbytes: int, message: str) -> None:
    sizes = np.array([100, 200, 300])
    check_places(np.array([0, 2]), np.array([68, 268]), np.array([32, 32]), sizes)
    with pytest.raises(ValueError, match=message):
        check_places(np.array([0, archive]), np.array([0, position]), np.array([0, nbytes]), sizes)


@pytest.mark.parametrize(
    ("offset", "length"), [(-2, 2), (2**63 - 2, 2), (5, 2), (0, 0), (0, -1), (0, 7), (0, 2**63 - 1), (3, 2**63 - 1)]
)
def test_a_box_outside_of_its_leaf_is_refused(offset: int, length: int) -> None:
    record = LeafRecord(("w",), "float32", (6,), Placement.SHARDED, "torch", None, None, (0, 2))
    check_boxes(record, np.array([[0], [2]]), np.array([[2], [4]]))
    with pytest.raises(ValueError, match="w: row 1 is empty or outside of its shape"):
        check_boxes(record, np.array([[0], [offset]]), np.array([[2], [length]]))


def test_the_boxes_of_a_grid_follow_from_its_chunks() -> None:
    record = LeafRecord(("w",), "uint8", (5, 3), Placement.SHARDED, "torch", (2, 2), None, (0, 6))
    none = np.zeros(0, np.int64)
    table = RowTable((record,), np.zeros(6, np.int32), np.zeros(6, np.int64), none, none)
    offsets, lengths = table.boxes(0)
    boxes = [Box((o0, o1), (min(2, 5 - o0), min(2, 3 - o1))) for o0 in (0, 2, 4) for o1 in (0, 2)]
    assert [tuple(row) for row in offsets.tolist()] == [box.offset for box in boxes]
    assert [tuple(row) for row in lengths.tolist()] == [box.shape for box in boxes]


wild = st.one_of(st.integers(-3, 9), st.sampled_from([2**63 - 1, -(2**63), 1 << 40, 1 << 62]))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), wild, st.floats(), st.sampled_from(["", "w", "per_rank"])),
    st.lists,
    max_leaves=4,
)


@given(st.data())
def test_wild_tables_raise_nothing_but_value_errors(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    leaves = leaves_to_json(save(shape, data.draw(shardings(shape)))[0].leaves)
    leaves[0][data.draw(st.sampled_from(sorted(leaves[0])))] = data.draw(junk)
    with contextlib.suppress(ValueError):
        leaves_from_json(leaves)
