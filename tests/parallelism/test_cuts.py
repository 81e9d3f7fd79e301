"""Where the parts of split tensors lie: computed from what the ranks tell, compared with what cutting gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import StateError
from ckptengine.schema.box import Box
from ckptengine.state.cut import Cut, state_cuts
from ckptengine.state.meeting import Meeting, Told, ToldShard
from ckptengine.state.moments import Moments

Grid = np.ndarray


@dataclass(frozen=True)
class Split:
    """A tensor over a grid of ranks: each dimension of the grid cuts one of the tensor, in parts by themselves."""

    whole: Grid
    locals: list[Grid]
    told: list[Told]
    replicas: int


def cut_up(array: Grid, dim: int, parts: list[int], lengths: list[list[int]]) -> list[Grid]:
    """Return what each rank gets of an array: of each part, one stretch after the other, of these lengths."""
    pieces: list[list[Grid]] = [[] for _ in lengths]
    for number, part in enumerate(np.split(array, np.cumsum(parts)[:-1], dim)):
        for rank, stretch in enumerate(np.split(part, np.cumsum([one[number] for one in lengths])[:-1], dim)):
            pieces[rank].append(stretch)
    return [np.concatenate(one, dim) for one in pieces]


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Draw replicas × a first split × a second one, of other dimensions or of the same, uneven and in parts."""
    ndim = draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    dims = [draw(st.integers(0, ndim - 1)) for _ in sizes]
    replicas = draw(st.integers(1, 2))
    counts = {dim: draw(st.integers(1, 2)) for dim in set(dims)}
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    # Lengths at the leaves of the grid, from which all others follow: [first][second][part] for one dimension.
    same = dims[0] == dims[1]
    leaf = st.integers(0, 2)
    if same:
        table = [[[draw(leaf) for _ in range(counts[dims[0]])] for _ in range(sizes[1])] for _ in range(sizes[0])]
        shape[dims[0]] = int(np.sum(table))
    else:
        tables = [
            [[draw(leaf) for _ in range(counts[dim])] for _ in range(n)] for dim, n in zip(dims, sizes, strict=True)
        ]
        for dim, lengths in zip(dims, tables, strict=True):
            shape[dim] = int(np.sum(lengths))
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    locals_: list[Grid] = []
    parts_of: list[list[list[int]]] = []
    for first in range(sizes[0]):
        for second in range(sizes[1]):
            if same:
                outer = [np.sum(one, 0).tolist() for one in table]
                total = np.sum(outer, 0).tolist()
                part = cut_up(whole, dims[0], total, outer)[first]
                locals_.append(cut_up(part, dims[0], outer[first], table[first])[second])
                parts_of.append([table[first][second]] * 2)
            else:
                part = cut_up(whole, dims[0], np.sum(tables[0], 0).tolist(), tables[0])[first]
                locals_.append(cut_up(part, dims[1], np.sum(tables[1], 0).tolist(), tables[1])[second])
                parts_of.append([tables[0][first], tables[1][second]])
    n = sizes[0] * sizes[1]
    told = []
    for rank in range(replicas * n):
        base, (first, second) = rank // n * n, divmod(rank % n, sizes[1])
        groups = (
            tuple(base + one * sizes[1] + second for one in range(sizes[0])),
            tuple(base + first * sizes[1] + one for one in range(sizes[1])),
        )
        shards = tuple(
            ToldShard(dim, tuple((f"part {k}", length) for k, length in enumerate(lengths)), number)
            for number, (dim, lengths) in enumerate(zip(dims, parts_of[rank % n], strict=True))
        )
        told.append(Told({"w": (locals_[rank % n].shape, shards)}, {}, (True,), groups))
    return Split(whole, locals_ * replicas, told, replicas)


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(box.offset, box.shape, strict=True))


def cuts_of(split: Split) -> list[Cut]:
    cuts = []
    for rank in range(len(split.told)):
        meeting = Meeting(rank, [Told.decode(*one.encode()) for one in split.told])
        meeting.check_groups()
        cuts.append(meeting.cut("w"))
    return cuts


@settings(max_examples=300, deadline=None)
@given(splits(), splits())
def test_every_element_lies_where_it_belongs_whatever_the_splits(one: Split, other: Split) -> None:
    for split in (one, other):
        for cut, local in zip(cuts_of(split), split.locals, strict=True):
            assert (cut.shape, cut.local) == (split.whole.shape, local.shape)
            mine = np.full(local.shape, -1)
            for box, place in cut.pieces:
                mine[region(place)] = split.whole[region(box)]
            assert np.array_equal(mine, local)


@settings(max_examples=200, deadline=None)
@given(splits())
def test_what_the_ranks_have_makes_the_whole_tensor(split: Split) -> None:
    whole, times = np.full(split.whole.shape, -1), np.zeros(split.whole.shape, int)
    for cut, local in zip(cuts_of(split), split.locals, strict=True):
        for box, place in cut.pieces:
            times[region(box)] += 1
            whole[region(box)] = local[region(place)]
    assert np.array_equal(whole, split.whole)
    assert (times == split.replicas).all()


COLUMN = Cut((8, 6), (4, 6), ((Box((4, 0), (4, 6)), Box((0, 0), (4, 6))),), frozenset({0}), "split")
STACK = Cut((8, 5, 6), (2, 5, 6), ((Box((2, 0, 0), (2, 5, 6)), Box((0, 0, 0), (2, 5, 6))),), frozenset({0}), "split")
ROW_OF_ONE = Cut((2, 6), (1, 6), ((Box((1, 0), (1, 6)), Box((0, 0), (1, 6))),), frozenset({0}), "split")


def test_moments_are_split_as_their_parameter_and_counters_are_not() -> None:
    shapes = {("exp_avg",): (4, 6), ("step",): (), ("inner", "m"): (4, 6), ("beta",): (1,)}
    assert state_cuts(COLUMN, shapes, (), stored=False, moments=Moments()) == {
        ("exp_avg",): COLUMN,
        ("inner", "m"): COLUMN,
    }


def test_means_over_rows_or_columns_are_split_along_the_dimension_that_they_keep() -> None:
    found = state_cuts(COLUMN, {("row_var",): (4, 1)}, (), stored=False, moments=Moments())[("row_var",)]
    assert (found.shape, found.local) == ((8, 1), (4, 1))
    assert found.pieces == ((Box((4, 0), (4, 1)), Box((0, 0), (4, 1))),)
    stack = state_cuts(
        STACK, {("row",): (2, 5), ("col",): (2, 6), ("col_var",): (2, 1, 6)}, (), stored=False, moments=Moments()
    )
    assert {keys[0]: one.shape for keys, one in stack.items()} == {"row": (8, 5), "col": (8, 6), "col_var": (8, 1, 6)}
    stored = state_cuts(STACK, {("row",): (8, 5)}, (), stored=True, moments=Moments())
    assert stored[("row",)] == stack[("row",)]


@pytest.mark.parametrize(
    ("cut", "shapes", "stored"),
    [
        (COLUMN, {("col_var",): (1, 6)}, False),  # a mean over the rows that this rank has
        (COLUMN, {("exp_avg_sq_col",): (6,)}, False),
        (COLUMN, {("preconditioner",): (4, 4)}, False),
        (COLUMN, {("col_var",): (1, 6)}, True),
        (ROW_OF_ONE, {("row_var",): (1, 1), ("col_var",): (1, 6)}, False),  # which of them is a part?
    ],
)
def test_a_state_that_only_this_rank_s_part_has_made_is_refused_by_name(cut, shapes, stored) -> None:
    with pytest.raises(StateError, match=r"optimizer\.w\.(col_var|exp_avg_sq_col|preconditioner|row_var)"):
        state_cuts(cut, shapes, ("optimizer", "w"), stored=stored, moments=Moments())


def half(*shape: int) -> Cut:
    """The second half of a matrix of this rank's `shape`, split along the rows."""
    rows, columns = shape
    whole = (2 * rows, columns)
    return Cut(whole, (rows, columns), ((Box((rows, 0), shape), Box((0, 0), shape)),), frozenset({0}), "split")


OTHER: list[tuple[tuple[int, ...], dict[tuple[str, ...], tuple[int, ...]]]] = [
    ((4, 6), {("m",): (4, 6), ("q",): (4, 4)}),
    ((6,), {("m",): (6,), ("q",): (6,), ("unseen",): (6,)}),
]


@pytest.mark.parametrize(
    ("key", "moments"),
    [
        ("exp_avg", Moments()),  # torch's own name
        ("m", Moments(OTHER)),  # a matrix that is not square tells
        ("unseen", Moments(OTHER, frozenset({"unseen"}))),  # the user has said so
        ("moment1.fc.weight", Moments()),  # MindSpore's
    ],
)
def test_a_state_of_the_shape_of_a_square_part_is_split_where_it_is_known_to_be_a_moment(key, moments) -> None:
    assert state_cuts(half(4, 4), {(key,): (4, 4)}, (), stored=False, moments=moments) == {(key,): half(4, 4)}


@pytest.mark.parametrize(("key", "moments"), [("q", Moments()), ("q", Moments(OTHER)), ("unseen", Moments(OTHER))])
@pytest.mark.parametrize(("cut", "stored"), [(half(4, 4), False), (half(4, 8), True)])
def test_a_state_of_the_shape_of_a_square_part_is_refused_where_it_may_be_a_preconditioner(
    cut, stored, key, moments
) -> None:
    whole = cut.shape if stored else cut.local
    with pytest.raises(StateError, match=rf"optimizer\.w\.{key}: a state of the shape .* square .*moments=\['{key}'\]"):
        state_cuts(cut, {(key,): whole}, ("optimizer", "w"), stored=stored, moments=moments)
