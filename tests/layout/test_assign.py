from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shardings import KINDS, Sharding, assign_all, holding, holdings, region, shapes, shardings, spread

from ckptengine.errors import StateError
from ckptengine.layout.assign import Assigned, assign_alone
from ckptengine.layout.holdings import Holding
from ckptengine.schema.box import Box
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import Placement


def check_every_element_once(
    assigned: list[list[Assigned]], held: list[list[Holding]], path: tuple[str | int, ...] = ("w",)
) -> None:
    """Every element is written once, by a rank that holds it; all ranks agree on the rest."""
    leaves = [(rank, leaf) for rank, of_rank in enumerate(assigned) for leaf in of_rank if leaf.path == path]
    shape, chunk = leaves[0][1].shape, leaves[0][1].chunk_shape
    count = np.zeros(shape, np.int8)
    names: list[str] = []
    for rank, leaf in leaves:
        assert leaf.chunk_shape == chunk
        names += leaf.fragments
        assert len(leaf.fragments) == (leaf.offsets.shape[0] if chunk is None else 0)
        mine = np.zeros(shape, bool)
        for have in held[rank]:
            if have.path == path:
                for offset, length in zip(have.offsets.tolist(), have.lengths.tolist(), strict=True):
                    mine[region(offset, length)] = True
        for offset, length in zip(leaf.offsets.tolist(), leaf.lengths.tolist(), strict=True):
            count[region(offset, length)] += 1
            assert mine[region(offset, length)].all()
            if chunk is not None:
                assert all(o % c == 0 for o, c in zip(offset, chunk, strict=True))
                edge = [min(c, n - o) for c, n, o in zip(chunk, shape, offset, strict=True)]
                assert length == edge
    assert (count == 1).all()
    assert len(set(names)) == len(names)
    writers = [rank for rank, leaf in leaves if leaf.writes]
    assert writers == [r for r, leaf in leaves if leaf.offsets.shape[0]] or (0 in shape and len(writers) == 1)


@given(st.data(), shapes)
def test_every_element_is_written_exactly_once(data: st.DataObject, shape: tuple[int, ...]) -> None:
    held = holdings(shape, data.draw(shardings(shape)))
    assigned = assign_all(held)
    check_every_element_once(assigned, held)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.sampled_from([(700, 600), (1, 1300, 500), (3, 400, 500), (2_000_003,), (5, 1 << 18)]),
    st.sampled_from(["complex128", "float64"]),
    st.integers(0, 2**32),
)
def test_large_boxes_are_split_and_still_written_exactly_once(
    kind: str, world: int, shape: tuple[int, ...], dtype: str, seed: int
) -> None:
    held = holdings(shape, spread(kind, shape, world, random.Random(seed)), dtype)
    assigned = assign_all(held)
    check_every_element_once(assigned, held)
    if kind == "replicas" and shape == (2_000_003,):  # large in all dtypes, and rows for all ranks
        mine = [sum(leaf.lengths.prod(axis=1).sum() for leaf in leaves) for leaves in assigned]
        assert min(mine) > 0


def test_the_load_of_a_replicated_transformer_is_even() -> None:
    table: list[tuple[tuple[str, ...], tuple[int, ...]]] = [(("wte",), (50257, 768)), (("wpe",), (1024, 768))]
    for layer in range(12):
        for name, shape in {
            "ln": (768,),
            "qkv": (2304, 768),
            "qkv.b": (2304,),
            "proj": (768, 768),
            "fc": (3072, 768),
            "out": (768, 3072),
        }.items():
            table.append(((f"h.{layer}.{name}",), shape))
    for world in (1, 2, 3, 4, 8):
        of_rank = [holding(p, s, [Box.whole(s)], "float32", Placement.REPLICATED) for p, s in table]
        assigned = assign_all([of_rank] * world)
        load = [4 * sum(int(leaf.lengths.prod(axis=1).sum()) for leaf in leaves) for leaves in assigned]
        assert sum(load) == 4 * sum(math.prod(shape) for _, shape in table)
        assert max(load) <= 1.03 * sum(load) / world
        assert all(leaf.chunk_shape is not None for leaves in assigned for leaf in leaves)


def test_hybrid_shards_are_split_between_their_replicas() -> None:
    shape = (4096, 1024)
    halves = [Box((0, 0), (2048, 1024)), Box((2048, 0), (2048, 1024))]
    held = holdings(shape, [[halves[0]], [halves[1]], [halves[0]], [halves[1]]])
    assigned = assign_all(held)
    assert [leaf.chunk_shape for leaves in assigned for leaf in leaves] == [(1024, 1024)] * 4
    assert [leaf.offsets[:, 0].tolist() for leaves in assigned for leaf in leaves] == [
        [0],
        [2048],
        [1024],
        [3072],
    ]


def test_no_piece_is_smaller_than_a_mebibyte() -> None:
    shape = (1024, 1024)
    assigned = assign_all(holdings(shape, [[Box.whole(shape)]] * 64))
    assert sum(leaf.writes for leaves in assigned for leaf in leaves) == 4


def test_whole_leaves_are_written_by_their_lowest_holder() -> None:
    shape = (2048, 1024)
    held = [
        [],
        [holding(("bn",), shape, [Box.whole(shape)], "float32", Placement.WHOLE)],
        [holding(("bn",), shape, [Box.whole(shape)], "float32", Placement.WHOLE)],
    ]
    assigned = assign_all(held)
    assert assigned[0] == []
    assert assigned[1][0].offsets.tolist() == [[0, 0]]
    assert assigned[1][0].chunk_shape == shape
    assert not assigned[2][0].writes


def test_per_rank_leaves_may_differ_between_ranks() -> None:
    held = [
        [holding(("rng",), (n,), [Box.whole((n,))] if n else [], dtype, Placement.PER_RANK)]
        for n, dtype in ((4, "uint8"), (0, "uint8"), (5, "int64"))
    ]
    assigned = assign_all(held)
    assert [leaves[0].chunk_shape for leaves in assigned] == [(4,), (1,), (5,)]
    assert all(leaves[0].writes for leaves in assigned)


def test_leaves_come_sorted_with_string_keys_before_numbers() -> None:
    paths: list[tuple[str | int, ...]] = [("b", 10), ("b", 9), ("b", "10"), ("a",), ("b",)]
    assigned = assign_all([[holding(path, (), [Box((), ())]) for path in paths]])
    assert [leaf.path for leaf in assigned[0]] == [("a",), ("b",), ("b", "10"), ("b", 9), ("b", 10)]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            [
                [holding(("m", "w"), (4,), [Box((0,), (2,))])],
                [holding(("m", "w"), (4,), [Box((2,), (2,))], "float64")],
            ],
            r"m\.w: sharded float32 of shape \(4,\) on rank 0, but sharded float64 .* on rank 1",
        ),
        (
            [
                [holding(("w",), (4,), [Box.whole((4,))])],
                [holding(("w",), (4,), [Box.whole((4,))], placement=Placement.PER_RANK)],
            ],
            "per_rank",
        ),
        ([[holding(("w",), (4,), [Box((3,), (2,))])]], r"rank 0 holds a box at \[3\] with lengths \[2\]"),
        ([[holding(("w",), (4,), [Box((-1,), (5,))])]], "not within the global shape"),
        (
            [[holding(("w",), (4,), [Box((0,), (3,))])], [holding(("w",), (4,), [Box((2,), (2,))])]],
            r"the box \[0:3\] of rank 0 and the box \[2:4\] of rank 1 overlap at \[2\]",
        ),
        (
            [[holding(("w",), (4,), [Box((0,), (3,))])], [holding(("w",), (4,), [Box((0,), (4,))])]],
            "overlap",
        ),
        (
            [[holding(("w",), (9,), [Box((0,), (3,))])], [holding(("w",), (9,), [Box((5,), (4,))])]],
            r"2 of 9 elements of shape \(9,\) are held by no rank, for example \[[34]\]",
        ),
        ([[holding(("w",), (3,), [])], []], "3 of 3 elements"),
        ([[holding(("w",), (), []), holding(("w",), (), [])]], "two leaves under this key"),
        ([[holding(("w",), (4,), [Box((0,), (2,))], placement=Placement.PER_RANK)]], "2 of 4 elements"),
    ],
)
def test_states_that_do_not_fit_together_are_refused(held: list[list[Holding]], message: str) -> None:
    with pytest.raises(StateError, match=message):
        assign_all(held)


def test_a_rank_that_changed_alone_keeps_what_did_not_change() -> None:
    whole = Box.whole((8,))
    before = [
        [
            holding(("gone",), (8,), [whole]),
            holding(("grown",), (8,), [whole]),
            holding(("same",), (8,), [Box((4 * rank,), (4,))]),
        ]
        for rank in range(2)
    ]
    now = [
        holding(("new",), (8,), [Box((4,), (4,)), Box((0,), (4,))]),
        holding(("grown",), (9,), [Box.whole((9,))]),
        before[1][2],
        holding(("rng",), (3,), [Box.whole((3,))], placement=Placement.PER_RANK),
        holding(("empty",), (0, 2), []),
    ]
    common = assign_all(before)
    alone = {leaf.path: leaf for leaf in assign_alone(common[1], before[1], now, rank=1)}
    assert list(alone) == [("empty",), ("grown",), ("new",), ("rng",), ("same",)]
    assert alone[("same",)] is common[1][2]
    assert alone[("grown",)].fragments == ("r1-0",)
    assert alone[("new",)].fragments == ("r1-0", "r1-1")
    assert alone[("new",)].offsets.tolist() == [[0], [4]]
    assert alone[("rng",)].chunk_shape == (3,)
    assert alone[("empty",)].chunk_shape == (1, 2)


def test_sizes_are_counted_in_bytes_of_the_dtype() -> None:
    for dtype in ("float32", "complex128"):
        shape = ((4 << 20) // DTYPES[dtype].itemsize,)
        assigned = assign_all(holdings(shape, [[Box.whole(shape)]] * 2, dtype))
        assert [int(leaves[0].lengths.sum()) for leaves in assigned] == [shape[0] // 2] * 2
        fewer = (shape[0] - 1,)
        assert sum(leaves[0].writes for leaves in assign_all(holdings(fewer, [[Box.whole(fewer)]] * 2, dtype))) == 1


def test_a_world_of_a_thousand_ranks_is_planned() -> None:
    world = 1000
    shape = (world * 4 - 3, 8)
    sharding: Sharding = spread("dim0", shape, world, random.Random(0))
    assigned = assign_all(holdings(shape, sharding))
    assert all(leaves[0].chunk_shape == (4, 8) and leaves[0].writes for leaves in assigned)
