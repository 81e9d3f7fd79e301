from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.layout.balance import balance, runs_of


def one_by_one(leaves: list[tuple[list[int], list[list[int]]]], load: list[int]) -> tuple[list[list[int]], list[int]]:
    """Graham's rule as it is written: the largest piece first, each to the least loaded of its holders."""
    pieces = [(-size, leaf, place) for leaf, (sizes, _) in enumerate(leaves) for place, size in enumerate(sizes)]
    writers = [[-1] * len(sizes) for sizes, _ in leaves]
    for size, leaf, place in sorted(pieces):
        writer = min(leaves[leaf][1][place], key=lambda rank: (load[rank], rank))
        load[writer] -= size
        writers[leaf][place] = writer
    return writers, load


@st.composite
def leaves_of(draw: st.DrawFn, world: int) -> tuple[list[int], list[list[int]]]:
    """Sizes and holders of a leaf's pieces: replicas of all, disjoint teams, or any sets; boxes may be cut in parts."""
    kind = draw(st.sampled_from(["all", "teams", "any"]))
    ranks = draw(st.permutations(range(world)))
    if kind == "all":
        boxes = [list(range(world))]
    elif kind == "teams":
        size = draw(st.integers(1, world))
        boxes = [sorted(ranks[at : at + size]) for at in range(0, world, size)]
    else:
        sets = st.lists(st.integers(0, world - 1), min_size=1, max_size=world, unique=True).map(sorted)
        boxes = draw(st.lists(sets, min_size=1, max_size=5))
    parts = draw(st.integers(1, 4))
    holders = [box for box in boxes for _ in range(parts)]
    return draw(st.lists(st.integers(1, 3), min_size=len(holders), max_size=len(holders))), holders


@given(st.data(), st.integers(1, 7))
def test_runs_give_what_piece_after_piece_gives(data: st.DataObject, world: int) -> None:
    leaves = data.draw(st.lists(leaves_of(world), max_size=5))
    load = data.draw(st.lists(st.integers(0, 6), min_size=world, max_size=world))
    prepared = []
    for sizes, holders in leaves:
        distinct = list(dict.fromkeys(map(tuple, holders)))
        starts = np.cumsum([0, *map(len, distinct)])
        ranks = np.asarray([rank for box in distinct for rank in box])
        bounds = np.asarray([[starts[i], starts[i + 1]] for i in map(distinct.index, map(tuple, holders))])
        writers = np.full(len(sizes), -1)
        prepared.append((runs_of(np.asarray(sizes), writers, ranks, bounds), writers))
    now = np.asarray(load)
    balance(prepared, now)
    writers, loads = one_by_one(leaves, load)
    assert [of_leaf.tolist() for _, of_leaf in prepared] == writers
    assert now.tolist() == loads


def test_pieces_with_a_writer_are_left_alone() -> None:
    writers = np.array([1, -1])
    runs = runs_of(np.array([5, 5]), writers, np.array([0, 1]), np.array([[0, 2], [0, 2]]))
    load = np.array([0, 5])
    balance([(runs, writers)], load)
    assert writers.tolist() == [1, 0]
    assert load.tolist() == [5, 5]


def test_teams_of_many_ranks_are_served_in_few_steps() -> None:
    teams, size = 500, 4
    holders = np.arange(teams * size).reshape(teams, size)
    bounds = np.stack([np.arange(teams) * size, np.arange(1, teams + 1) * size], axis=1)
    (run,) = runs_of(np.full(teams * 2, 7), np.full(teams * 2, -1), holders.reshape(-1), np.repeat(bounds, 2, axis=0))
    assert [pieces.size for pieces, _ in run.steps] == [teams, teams]
