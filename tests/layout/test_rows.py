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

from ckptengine.errors import CheckpointDamagedError, CheckpointError
from ckptengine.layout.box import Box
from ckptengine.layout.read_plan import WantedPart, plan_read
from ckptengine.layout.rows import RowTable, columns, from_columns, leaves_to_json


def same(a: RowTable, b: RowTable) -> bool:
    pairs = zip(columns(a).values(), columns(b).values(), strict=True)
    return a.leaves == b.leaves and all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


@given(st.data(), shapes)
def test_a_table_comes_back_from_its_columns(data: st.DataObject, shape: tuple[int, ...]) -> None:
    table, archives = save(shape, data.draw(shardings(shape)))
    leaves = json.loads(json.dumps(leaves_to_json(table)))
    assert same(from_columns(leaves, columns(table)), table)
    assert same(from_columns(leaves, columns(table), [len(archive) for archive in archives]), table)


def example() -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    table, _ = save((6, 4), spread("dim0", (6, 4), 3, random.Random(0)))
    return leaves_to_json(table), {name: column.copy() for name, column in columns(table).items()}


def test_the_json_of_a_leaf_is_what_the_format_says() -> None:
    assert example()[0] == [
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
        ({"shape": [5, 4]}, "row 2 is no cell|row 2 is empty or outside"),
        ({"chunk_shape": [0, 4]}, "does not fit"),
        ({"chunk_shape": [2, 5]}, "does not fit"),
        ({"chunk_shape": [3, 4]}, "no cell"),
        ({"chunk_shape": 7}, "chunk_shape"),
        ({"placement": "here"}, "placement"),
        ({"placement": "per_rank"}, "rank None does not fit"),
        ({"rank": 1}, "rank 1 does not fit"),
        ({"container": None}, "container"),
        ({"rows": [0, 2]}, "1 rows belong to no leaf"),
        ({"rows": [0, 4]}, "don't follow"),
        ({"rows": [1, 3]}, "don't follow"),
        ({"rows": [0, -1]}, "don't follow"),
        ({"rows": [0, 1 << 70]}, "don't follow"),
        ({"rows": [0]}, "two integers"),
        ({"more": 1}, "exactly"),
    ],
)
def test_a_leaf_that_lies_is_refused(change: dict[str, Any], message: str) -> None:
    leaves, table = example()
    leaves[0].update(change)
    with pytest.raises(CheckpointDamagedError, match=message):
        from_columns(leaves, table)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("archive", -1, "archive -1, which there is not"),
        ("archive", 3, "archive 3, which there is not"),
        ("position", -1, "do not lie within"),
        ("position", 1000, "do not lie within"),
        ("position", 2**63 - 1, "do not lie within"),
        ("nbytes", -1, "do not lie within"),
        ("nbytes", 2**63 - 1, "do not lie within"),
        ("nbytes", 31, "another size"),
        ("offsets", -2, "outside of its shape"),
        ("offsets", 2**63 - 2, "outside of its shape"),
        ("offsets", 1, "no cell"),
        ("lengths", 0, "is empty"),
        ("lengths", 2**63 - 1, "outside of its shape"),
        ("lengths", 1, "no cell"),
    ],
)
def test_a_number_that_lies_is_refused(name: str, value: int, message: str) -> None:
    leaves, table = example()
    table[name] = table[name].astype(np.int64)
    table[name][0] = value
    with pytest.raises(CheckpointDamagedError, match=message):
        from_columns(leaves, table, [100, 100, 100])


def test_columns_of_other_kinds_are_refused() -> None:
    leaves, table = example()
    for name in table:
        for wrong in (
            table[name][:-1],
            table[name].astype(float),
            table[name].reshape(1, -1),
            table[name] != 0,
        ):
            with pytest.raises(CheckpointDamagedError):
                from_columns(leaves, {**table, name: wrong})
        with pytest.raises(CheckpointDamagedError):
            from_columns(leaves, {other: table[other] for other in table if other != name})
    for wrong_leaves in (None, {}, [None], [[]], leaves * 2, [{}]):
        with pytest.raises(CheckpointDamagedError):
            from_columns(wrong_leaves, table)


wild = st.one_of(st.integers(-3, 9), st.sampled_from([2**63 - 1, -(2**63), 1 << 40, 1 << 62]))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), wild, st.floats(), st.sampled_from(["", "w", "per_rank"])),
    st.lists,
    max_leaves=4,
)


@given(st.data())
def test_wild_tables_raise_only_errors_of_ours(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    table, archives = save(shape, data.draw(shardings(shape)))
    leaves, numbers = leaves_to_json(table), {name: column.copy() for name, column in columns(table).items()}
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(leaves[0])))
        leaves[0][name] = data.draw(junk)
    for name in ("position", "nbytes", "offsets", "lengths"):
        if numbers[name].size and data.draw(st.booleans()):
            numbers[name][data.draw(st.integers(0, numbers[name].size - 1))] = data.draw(wild)
    with contextlib.suppress(CheckpointError):
        read = from_columns(leaves, numbers, [len(archive) for archive in archives])
        plan_read(read, [WantedPart(0, Box.whole(read.leaves[0].shape))])
