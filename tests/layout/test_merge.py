from __future__ import annotations

import contextlib
import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shardings import assign_all, holding, holdings, save, shapes, shardings, spread, values, write

from ckptengine.errors import CheckpointError, SaveFailedError
from ckptengine.layout import merge as merging
from ckptengine.layout.assign import Assigned, assign_alone
from ckptengine.layout.merge import merge
from ckptengine.layout.rank_rows import PackedRows, RankRows
from ckptengine.layout.read_plan import plan_read
from ckptengine.layout.rows import RowTable, leaves_from_json, leaves_to_json
from ckptengine.schema.box import Box
from ckptengine.schema.head import LeafLayout
from ckptengine.schema.leaf import Placement


def rows_of(rank: int, assigned: list[Assigned]) -> RankRows:
    sizes = [
        np.prod(leaf.chunk_shape or length) * leaf.itemsize for leaf in assigned for length in leaf.lengths.tolist()
    ]
    nbytes = np.asarray(sizes, np.int64)
    return RankRows.of(rank, assigned, np.cumsum(nbytes) - nbytes)


@given(st.data(), shapes)
def test_merged_rows_are_sorted_and_cover_each_leaf(data: st.DataObject, shape: tuple[int, ...]) -> None:
    table, archives = save(shape, data.draw(shardings(shape)))
    (record,) = table.leaves
    offsets, lengths = table.boxes(0)
    assert record.rows == (0, offsets.shape[0])
    assert offsets.tolist() == sorted(offsets.tolist())
    assert int(lengths.prod(axis=1).sum()) == np.prod(shape)
    dense = [record.chunk_shape or length for length in lengths.tolist()]
    for archive, position, chunk in zip(table.archive, table.position, dense, strict=True):
        assert 0 <= position <= position + np.prod(chunk) * record.itemsize <= len(archives[archive])


def test_leaves_of_many_kinds_are_kept_apart() -> None:
    whole = Box.whole((4,))
    held = [
        [
            holding(("x", 1), (4,), [whole], placement=Placement.REPLICATED),
            holding(("x", "1"), (), [Box((), ())], placement=Placement.REPLICATED),
            holding(("rng",), (rank + 1,), [Box.whole((rank + 1,))], "int64", Placement.PER_RANK),
            holding(("none",), (0,), []),
        ]
        for rank in range(3)
    ]
    tables = [rows_of(rank, leaves) for rank, leaves in enumerate(assign_all(held))]
    table = merge(tables)
    assert [(leaf.path, leaf.rank, leaf.rows) for leaf in table.leaves] == [
        (("none",), None, (0, 0)),
        (("rng",), 0, (0, 1)),
        (("rng",), 1, (1, 2)),
        (("rng",), 2, (2, 3)),
        (("x", "1"), None, (3, 4)),
        (("x", 1), None, (4, 5)),
    ]
    assert table.archive[:3].tolist() == [0, 1, 2]
    assert table.boxes(3)[1].tolist() == [[3]]
    assert table.boxes(4)[1].shape == (1, 0)
    assert table.index[("x", 1), None] == 5


def test_boxes_that_several_ranks_wrote_become_one_row_of_the_lowest() -> None:
    held = [[holding(("new",), (4,), [Box.whole((4,))])] for _ in range(3)]
    tables = [rows_of(rank, assign_alone([], [], held[rank], rank)) for rank in range(3)]
    table = merge([tables[2], tables[0], tables[1]])
    assert table.archive.tolist() == [0]


def test_what_ranks_wrote_alone_fits_what_others_wrote_by_the_plan() -> None:
    held = [[holding(("w",), (8,), [Box((4 * rank,), (4,))])] for rank in range(2)]
    common = assign_all(held)
    now = [[*of_rank, holding(("new",), (2, 2), [Box.whole((2, 2))])] for of_rank in held]
    alone = [assign_alone(common[rank], held[rank], now[rank], rank) for rank in range(2)]
    tensors = {("w",): values((8,), "float32"), ("new",): values((2, 2), "float32")}
    table, _ = write(alone, tensors)
    assert [leaf.rows for leaf in table.leaves] == [(0, 1), (1, 3)]
    one_sided, _ = write([alone[0], common[1]], tensors)
    assert [leaf.rows for leaf in one_sided.leaves] == [(0, 1), (1, 3)]


NONE = np.zeros(0, np.int64)


def two_ranks(change: dict[str, object]) -> list[RankRows]:
    leaf = LeafLayout(("m", "w"), "float32", (4,), Placement.SHARDED, "torch", (2,))
    parts = [RankRows(rank, (leaf,), np.array([1]), np.array([0]), np.array([rank]), NONE, NONE) for rank in range(2)]
    return [parts[0], dataclasses.replace(parts[1], **change)]


def layout(**change: object) -> tuple[LeafLayout, ...]:
    leaf = LeafLayout(("m", "w"), "float32", (4,), Placement.SHARDED, "torch", (2,))
    return (dataclasses.replace(leaf, **change),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaves": layout(dtype="int32")}, r"m\.w: rank 0 wrote sharded float32 .*, rank 1 sharded int32"),
        ({"leaves": layout(shape=(5,))}, r"shape \(5,\)"),
        ({"leaves": layout(chunk_shape=None)}, "as fragments"),
        (
            {"leaves": layout(placement=Placement.PER_RANK)},
            r"m\.w: rank 0 shares it .*, rank 1 keeps its own",
        ),
        ({"leaves": layout() * 2, "counts": np.array([1, 0])}, "lists a leaf twice"),
        (
            {"cells": np.array([0])},
            r"2 of 4 elements were written by no rank, .*; the leaf is in the state of ranks 0, 1",
        ),
        ({"cells": np.array([2])}, "that rank 1 wrote is no cell"),
        ({"cells": np.array([-1])}, "that rank 1 wrote is no cell"),
        ({"cells": np.array([1 << 62])}, "that rank 1 wrote is no cell"),
        ({"position": np.array([-1])}, "that rank 1 wrote has a negative position"),
        ({"rank": 0}, "one rank"),
        (
            {
                "counts": np.array([0]),
                "position": NONE,
                "cells": NONE,
            },
            r"2 of 4 elements were written by no rank, for example \[[23]\]",
        ),
    ],
)
def test_rows_that_make_no_checkpoint_are_refused(change: dict[str, object], message: str) -> None:
    assert merge(two_ranks({})).archive.tolist() == [0, 1]
    with pytest.raises(SaveFailedError, match=message):
        merge(two_ranks(change))


def fragments(change: dict[str, object]) -> list[RankRows]:
    """Bytes 0 to 3 by rank 0, 3 to 8 by rank 1."""
    leaf = LeafLayout(("w",), "uint8", (8,), Placement.SHARDED, "torch", None)
    parts = [
        RankRows(rank, (leaf,), np.array([1]), np.array([0]), NONE, np.array([3 * rank]), np.array([3 + 2 * rank]))
        for rank in range(2)
    ]
    return [parts[0], dataclasses.replace(parts[1], **change)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([2]), "lengths": np.array([6])}, r"element \[2\] was written 2 times, by ranks 0, 1"),
        ({"lengths": np.array([4])}, r"1 of 8 elements were written by no rank, for example \[7\]"),
        ({"lengths": np.array([6])}, "that rank 1 wrote is empty or outside"),
        ({"lengths": np.array([0])}, "that rank 1 wrote is empty or outside"),
        ({"offsets": np.array([1 << 62])}, "that rank 1 wrote is empty or outside"),
        ({"position": np.array([-1])}, "negative position"),
    ],
)
def test_fragments_that_make_no_leaf_are_refused(change: dict[str, object], message: str) -> None:
    table = merge(fragments({})[::-1])
    assert table.archive.tolist() == [0, 1]
    assert table.boxes(0)[1].tolist() == [[3], [5]]
    with pytest.raises(SaveFailedError, match=message):
        merge(fragments(change))


def test_grids_of_more_cells_than_memory_has_are_refused_by_what_is_missing() -> None:
    leaf = LeafLayout(("w",), "uint8", (1 << 60,), Placement.SHARDED, "torch", (1,))
    rows = RankRows(0, (leaf,), np.array([3]), np.arange(3), np.array([0, 1, 3]), NONE, NONE)
    with pytest.raises(SaveFailedError, match=r"1152921504606846973 of .* for example \[2\]"):
        merge([rows])


def test_more_rows_than_are_placed_at_a_time_find_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_BATCH_ROWS", 5)
    boxes = spread("replicas", (7,), 3, random.Random(0))
    held = [[holding((name,), (7,), boxes[rank]) for name in "abc"] for rank in range(3)]
    tables = [rows_of(rank, assign_alone([], [], held[rank], rank)) for rank in range(3)]
    assert merge(tables).archive.tolist() == [0, 0, 0]
    assigned = assign_all([[holding((name,), (9, 2), boxes) for name in "abc"] for boxes in dim0((9, 2), 9)])
    assert merge([rows_of(rank, leaves) for rank, leaves in enumerate(assigned)]).archive.tolist() == [*range(9)] * 3


def dim0(shape: tuple[int, ...], world: int) -> list[list[Box]]:
    return spread("dim0", shape, world, random.Random(0))


def test_a_leaf_that_a_rank_holds_and_nobody_wrote_is_refused() -> None:
    held = [[holding(("w",), (4,), [Box.whole((4,))])] for _ in range(2)]
    common = assign_all(held)
    writer = next(rank for rank in range(2) if common[rank][0].writes)
    assert writer == 0
    with pytest.raises(SaveFailedError, match="w: 4 of 4 elements were written by no rank"):
        merge([rows_of(0, assign_alone(common[0], held[0], [], 0)), rows_of(1, common[1])])


def test_ranks_with_equal_tables_share_them_when_decoded() -> None:
    assigned = assign_all(holdings((8,), spread("dim0", (8,), 4, random.Random(0))))
    tables = [PackedRows.decode(rows_of(rank, leaves).encode()) for rank, leaves in enumerate(assigned)]
    assert all(table.leaves is tables[0].leaves for table in tables)
    assert [table.rank for table in tables] == [0, 1, 2, 3]


@given(st.data())
def test_damaged_messages_raise_only_errors_of_ours(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    assigned = assign_all(holdings(shape, data.draw(shardings(shape))))
    messages = [bytearray(rows_of(rank, leaves).encode()) for rank, leaves in enumerate(assigned)]
    damaged = data.draw(st.sampled_from(messages))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        if data.draw(st.booleans()):
            damaged[place : place + 1] = data.draw(st.binary(max_size=3))
        else:
            del damaged[place:]
    with contextlib.suppress(CheckpointError):
        merge([PackedRows.decode(bytes(message)) for message in messages])


numbers = st.one_of(st.integers(-3, 9), st.sampled_from([2**63 - 1, -(2**63), 1 << 40, 1 << 62]))


@given(st.data())
def test_rows_with_wild_numbers_raise_only_errors_of_ours(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    assigned = assign_all(holdings(shape, data.draw(shardings(shape))))
    tables = [rows_of(rank, leaves) for rank, leaves in enumerate(assigned)]
    for name in ("position", "cells", "offsets", "lengths"):
        column = getattr(tables[0], name)
        if column.size and data.draw(st.booleans()):
            column[data.draw(st.integers(0, column.size - 1))] = data.draw(numbers)
    try:
        table = merge(tables)
    except CheckpointError:
        return
    assert isinstance(table, RowTable)


def test_a_thousand_ranks_with_a_hundred_leaves_are_merged() -> None:
    world, leaves = 1000, 100
    layouts = tuple(
        LeafLayout(("model", f"h.{i}.w"), "float32", (world, 64), Placement.SHARDED, "torch", (1, 64))
        for i in range(leaves)
    )
    tables = [
        RankRows(
            rank,
            layouts,
            np.ones(leaves, np.int64),
            np.arange(leaves) * 256,
            np.full(leaves, rank),
            NONE,
            NONE,
        )
        for rank in range(world)
    ]
    table = merge(tables)
    assert len(table.leaves) == leaves
    assert table.archive.tolist() == list(range(world)) * leaves


def test_a_world_without_leaves_makes_an_empty_table() -> None:
    assert assign_all([[], []]) == [[], []]
    table = merge([rows_of(rank, []) for rank in range(2)])
    assert table.leaves == ()
    assert plan_read(table, []) == {}
    assert leaves_from_json(leaves_to_json(table.leaves)) == ()
