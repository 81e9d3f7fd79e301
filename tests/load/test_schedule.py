from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.load.schedule import make_schedule, needed_nbytes

BLOCK = 4
Blocks = set[tuple[int, int]]


def blocks_of(rows: np.ndarray) -> Blocks:
    """Return archive and number of every block in some ranges."""
    return {(archive, at) for archive, start, stop in rows.tolist() for at in range(start, stop, BLOCK)}


def ranges_of(wanted: Blocks) -> np.ndarray:
    """Return ascending ranges of which no two touch."""
    rows: list[list[int]] = []
    for archive, at in sorted(wanted):
        if rows and rows[-1][0] == archive and rows[-1][2] == at:
            rows[-1][2] += BLOCK
        else:
            rows.append([archive, at, at + BLOCK])
    return np.array(rows, np.int64).reshape(-1, 3)


needs = st.lists(
    st.sets(st.tuples(st.sampled_from([0, 1, 7]), st.integers(0, 30).map(lambda number: number * BLOCK))).map(
        ranges_of
    ),
    min_size=1,
    max_size=5,
)


@given(needs, st.sampled_from([BLOCK, 3 * BLOCK, 100 * BLOCK]))
def test_every_block_is_read_once_and_reaches_all_that_need_it(needs, most):
    schedule = make_schedule(needs, most)
    wanted = [blocks_of(rows) for rows in needs]
    read: list[tuple[int, int]] = []
    got: list[Blocks] = [blocks_of(rows) for rows in schedule.private]
    for rows in schedule.private:
        read += blocks_of(rows)
    for number, request in enumerate(schedule.requests):
        assert request.number == number
        assert 0 < request.nbytes <= most
        assert request.reader in request.consumers
        assert len(request.consumers) > 1
        piece = blocks_of(np.array([[request.archive, request.position, request.position + request.nbytes]]))
        read += piece
        for rank in range(len(needs)):
            assert (rank in request.consumers) == bool(piece & wanted[rank])
            if rank in request.consumers:
                got[rank] |= piece
    assert len(read) == len(set(read))
    assert set(read) == set().union(*wanted)
    assert schedule.node_nbytes == len(read) * BLOCK
    for mine, there in zip(wanted, got, strict=True):
        assert mine <= there
    places = [(request.archive, request.position) for request in schedule.requests]
    assert places == sorted(places)


@given(needs)
def test_ranges_that_one_rank_alone_wants_stay_in_one_piece(needs):
    for rows in schedule_alone(needs):
        for (archive, _, stop), (following, start, _) in pairwise(rows.tolist()):
            assert (archive, stop) < (following, start)


def schedule_alone(needs: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    return make_schedule(needs, 2 * BLOCK).private


def test_the_reading_is_spread_evenly_over_those_who_want_the_bytes():
    everything = np.array([[0, 0, 400 * BLOCK], [3, 0, 400 * BLOCK]], np.int64)
    schedule = make_schedule([everything] * 4, 10 * BLOCK)
    load = [sum(one.nbytes for one in schedule.requests if one.reader == rank) for rank in range(4)]
    assert load == [needed_nbytes(everything) // 4] * 4
