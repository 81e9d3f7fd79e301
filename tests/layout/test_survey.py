from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shardings import Sharding, assign_all, holding, shapes, shardings, spread

from ckptengine.errors import CheckpointError, SaveFailedError, StateError
from ckptengine.layout.holdings import Holding
from ckptengine.layout.survey import (
    Kind,
    Survey,
    Table,
    by_path,
    decode_boxes,
    encode_boxes,
    even_part,
    survey_of,
    table_of,
)
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import Placement

WORLD = 12


def held(leaves: dict[str, tuple[tuple[int, ...], Sharding, Placement]]) -> list[list[Holding]]:
    """What each rank holds of leaves, given their shapes, shardings and placements by name."""
    return [
        by_path([holding((n,), shape, boxes[rank], placement=kind) for n, (shape, boxes, kind) in leaves.items()], rank)
        for rank in range(WORLD)
    ]


def surveyed(mine: list[list[Holding]]) -> tuple[Survey, list[bytes]]:
    """The survey, and the distinct tables as they would travel."""
    said = [table_of(of_rank, rank, len(mine)).encode() for rank, of_rank in enumerate(mine)]
    distinct = list(dict.fromkeys(said))
    numbers = np.asarray([distinct.index(table) for table in said])
    return survey_of([Table.decode(table) for table in distinct], numbers), distinct


def all_told(survey: Survey, mine: list[list[Holding]]) -> list[bytes]:
    """What each rank tells of its boxes."""
    return [encode_boxes(survey, of_rank, rank) for rank, of_rank in enumerate(mine)]


def model(kind: str) -> list[list[Holding]]:
    """Leaves of four shapes, many of each, all spread in the same way."""
    sizes = [(WORLD * 4, 8), (WORLD * 3 - 1, 4), (5, 5), (WORLD,)]
    leaves = {}
    for number in range(200):
        shape = sizes[number % 4]
        leaves[f"w{number}"] = (shape, spread(kind, shape, WORLD, random.Random(3)), Placement.SHARDED)
    return held(leaves)


def test_even_parts_are_those_of_torch_chunk() -> None:
    assert [even_part(10, rank, 4) for rank in range(4)] == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert [even_part(2, rank, 4) for rank in range(4)] == [(0, 1), (1, 1), (2, 0), (2, 0)]


@pytest.mark.parametrize(
    ("kind", "groups", "told"), [("dim0", 4, 0), ("replicas", 4, 0), ("mesh", 4, 4), ("hsdp", 4, 4), ("nested", 4, 4)]
)
def test_leaves_that_are_spread_alike_are_one_group_in_few_tables(kind: str, groups: int, told: int) -> None:
    survey, distinct = surveyed(model(kind))
    assert len(survey.leaves) == 200
    assert len(survey.groups) == groups
    assert len(survey.told) <= told
    assert sum(group.count for group in survey.groups) == 200
    assert len(distinct) <= 3  # a box of a mesh may happen to be that of an even cut


def test_the_boxes_that_a_rank_tells_do_not_grow_with_the_leaves() -> None:
    mine = model("mesh")
    survey, _ = surveyed(mine)
    numbers = 1 + 2 * 2
    assert max(len(told) for told in all_told(survey, mine)) <= 1 + 4 * numbers * len(survey.told)


def test_nothing_is_told_of_even_cuts_and_of_whole_replicas() -> None:
    shape = (WORLD * 2, 3)
    cut = spread("dim0", shape, WORLD, random.Random(0))
    whole = [[Box.whole(shape)]] * WORLD
    survey, distinct = surveyed(
        held(
            {
                "even": (shape, cut, Placement.SHARDED),
                "one": ((1, 3), [[Box.whole((1, 3))], *[[]] * (WORLD - 1)], Placement.SHARDED),
                "all": (shape, whole, Placement.REPLICATED),
                "statistics": (shape, whole, Placement.WHOLE),
                "none": ((0, 3), [[]] * WORLD, Placement.SHARDED),
                "scalar": ((), [[Box((), ())]] * WORLD, Placement.REPLICATED),
            }
        )
    )
    assert {head.path[0]: survey.groups[group].kind for head, group in survey.leaves} == {
        "all": Kind.WHOLE,
        "even": Kind.EVEN,
        "none": Kind.WHOLE,
        "one": Kind.EVEN,
        "scalar": Kind.WHOLE,
        "statistics": Kind.WHOLE,
    }
    assert survey.told == []
    assert len(distinct) == 1


@pytest.mark.parametrize("first", [0, WORLD // 2])
def test_of_an_even_cut_over_some_of_the_ranks_they_tell_a_word_and_no_boxes(first: int) -> None:
    shape = (WORLD // 2 * 3 - 1, 3)
    half = spread("dim0", shape, WORLD // 2, random.Random(0))
    mine: list[list[Holding]] = [[] for _ in range(WORLD)]
    for rank, boxes in enumerate(half, first):
        mine[rank] = [holding(("w",), shape, boxes)]
    survey, distinct = surveyed(mine)
    assert [group.kind for group in survey.groups] == [Kind.BOXES]
    assert survey.groups[0].holders.tolist() == list(range(first, first + WORLD // 2))
    assert len(distinct) == 2
    told = all_told(survey, mine)
    assert max(map(len, told)) == 1 + 4
    survey, boxes = decode_boxes(survey, told)
    assert [group.kind for group in survey.groups] == [Kind.EVEN]
    assert boxes == {}
    assigned = [leaf for of_rank in assign_all(mine) for leaf in of_rank]
    assert [leaf.offsets.tolist() for leaf in assigned] == [[list(box.offset) for box in boxes] for boxes in half]
    assert {leaf.chunk_shape for leaf in assigned} == {(3, 3)}


def test_an_even_part_beside_others_is_a_box_like_theirs() -> None:
    shape = (7, 3)
    cuts = [
        [Box((0, 0), (2, 3))],
        [Box((2, 0), (1, 3)), Box((3, 0), (1, 3))],
        [Box((4, 0), (2, 3))],
        [Box((6, 0), (1, 3))],
    ]
    mine = [[holding(("w",), shape, boxes)] for boxes in cuts] + [[]]  # a fifth rank without the leaf
    survey, _ = surveyed(mine)
    after, boxes = decode_boxes(survey, all_told(survey, mine))
    assert [group.kind for group in after.groups] == [Kind.BOXES]
    assert boxes[0].ranks.tolist() == [0, 1, 1, 2, 3]
    assert boxes[0].offsets[:, 0].tolist() == [0, 2, 3, 4, 6]
    assert boxes[0].lengths.tolist() == [[2, 3], [1, 3], [1, 3], [2, 3], [1, 3]]


def test_a_rank_that_says_how_a_leaf_is_cut_that_it_does_not_have_is_refused() -> None:
    mine = [[holding(("w",), (4,), [Box((0,), (3,))])], [holding(("w",), (4,), [Box((3,), (1,))])], []]
    survey, _ = surveyed(mine)
    told = all_told(survey, mine)
    told[2] = bytes([4]) + np.asarray([-1], "<i4").tobytes()
    with pytest.raises(SaveFailedError, match="does not have"):
        decode_boxes(survey, told)


def test_two_orders_of_one_mesh_are_two_groups() -> None:
    shape, size = (4, 4), 2
    rows = [[Box((2 * (rank // size), 2 * (rank % size)), (2, 2))] for rank in range(4)]
    columns = [[Box((2 * (rank % size), 2 * (rank // size)), (2, 2))] for rank in range(4)]
    mine = [[holding(("a",), shape, rows[rank]), holding(("b",), shape, columns[rank])] for rank in range(4)]
    survey, _ = surveyed(mine)
    assert len(survey.groups) == 2
    assigned = assign_all(mine)
    assert [[leaf.offsets.tolist() for leaf in of_rank] for of_rank in assigned] == [
        [[list(rows[rank][0].offset)], [list(columns[rank][0].offset)]] for rank in range(4)
    ]


@given(st.data(), shapes)
def test_boxes_come_back_from_what_ranks_tell(data: st.DataObject, shape: tuple[int, ...]) -> None:
    sharding = data.draw(shardings(shape))
    mine = [[holding(("a",), shape, boxes), holding(("z", 1), shape, boxes[::-1])] for boxes in sharding]
    survey, _ = surveyed(mine)
    after, boxes = decode_boxes(survey, all_told(survey, mine))
    assert set(boxes) == set(after.told)
    for number in after.told:
        place = 0 if survey.groups[number].head.path == ("a",) else 1
        assert boxes[number].ranks.tolist() == [rank for rank, told in enumerate(sharding) for _ in told]
        assert np.array_equal(boxes[number].offsets, np.concatenate([of_rank[place].offsets for of_rank in mine]))
        assert np.array_equal(boxes[number].lengths, np.concatenate([of_rank[place].lengths for of_rank in mine]))


def test_numbers_that_need_more_than_32_bits_are_told() -> None:
    far = 1 << 40
    mine = [[holding(("w",), (far + 2,), [Box((far * rank,), (far - far * rank + 2 * rank,))])] for rank in range(2)]
    survey, _ = surveyed(mine)
    boxes = decode_boxes(survey, all_told(survey, mine))[1][0]
    assert boxes.offsets.tolist() == [[0], [far]]
    assert boxes.lengths.tolist() == [[far], [2]]


@given(st.data())
def test_damaged_messages_raise_only_errors_of_ours(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    mine = [[holding(("w",), shape, boxes)] for boxes in data.draw(shardings(shape))]
    survey, tables = surveyed(mine)
    messages = [bytearray(message) for message in (*tables, *all_told(survey, mine))]
    damaged = data.draw(st.sampled_from(messages))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        if data.draw(st.booleans()):
            damaged[place : place + 1] = data.draw(st.binary(max_size=3))
        else:
            del damaged[place:]
    with contextlib.suppress(CheckpointError):
        survey_of([Table.decode(bytes(table)) for table in messages[: len(tables)]], np.zeros(1, np.int64))
    with contextlib.suppress(CheckpointError):
        decode_boxes(survey, [bytes(message) for message in messages[len(tables) :]])


@pytest.mark.parametrize("message", [b"", b"\x03", b"\x04\x00", b"\x04", b"\x08" + bytes(7)])
def test_noise_is_refused(message: bytes) -> None:
    mine = [[holding(("w",), (4,), [Box((0,), (3,))])], [holding(("w",), (4,), [Box((3,), (1,))])]]
    survey, _ = surveyed(mine)
    assert survey.told
    with pytest.raises(SaveFailedError):
        decode_boxes(survey, [message, message])
    with pytest.raises(SaveFailedError):
        Table.decode(message)


def test_a_table_that_claims_more_than_it_has_is_refused() -> None:
    message = bytearray(table_of([holding(("w",), (4,), [Box((0,), (4,))])], 0, 1).encode())
    message[8:16] = (1 << 50).to_bytes(8, "little")
    with pytest.raises(SaveFailedError, match="claims more bytes"):
        Table.decode(bytes(message))


def test_ranks_that_disagree_are_named() -> None:
    mine = [[holding(("m", "w"), (4,), [Box.whole((4,))], "float64" if rank == 5 else "int8")] for rank in range(8)]
    with pytest.raises(StateError, match=r"m\.w: .* int8 .* on ranks 0, 1, 2, 3, 4, 6, 7, but .* float64 .* on rank 5"):
        surveyed(mine)
