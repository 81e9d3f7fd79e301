"""The cursor: whatever world sizes follow each other, wherever they are cut, each epoch is used once."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.data.cursor import Cursor
from ckptengine.data.digest import digest_of, parse_digest, write_digest
from ckptengine.data.ledger import MAX_RUNS, GlobalBatch, Ledger, Run
from ckptengine.data.order import Sequential, Shuffled
from ckptengine.data.proof import coverage, digest_of_runs
from ckptengine.errors import LoadMismatchError


def ignore(samples: int) -> None:
    """Take no notice of progress."""


def group(world_size: int, length: int = 20, batch: int = 6, **options: Any) -> list[Cursor]:
    return [Cursor(Shuffled(length, 5), batch, rank=r, world_size=world_size, **options) for r in range(world_size)]


def saved(cursors: list[Cursor]) -> list[dict[str, Any]]:
    """Return each rank's state; what is not per rank must be one value, and plain JSON."""
    states = [cursor.state_dict() for cursor in cursors]
    shared = [json.dumps({key: item for key, item in state.items() if key != "digest"}) for state in states]
    assert len(set(shared)) == 1
    return states


def restored(states: list[dict[str, Any]], cursors: list[Cursor]) -> list[Cursor]:
    """Load each rank as the engine does: its own digest, or what `resize` makes of all."""
    digests = [state["digest"].value for state in states]
    for cursor in cursors:
        own = digests[cursor.rank] if len(cursors) == len(states) else None
        if own is None:
            own = states[0]["digest"].resize(digests, cursor.rank, len(cursors))
        cursor.load_state_dict({**json.loads(json.dumps({**states[0], "digest": None})), "digest": own})
    return cursors


def take(cursors: list[Cursor], batches: int, epochs: int, used: Counter[tuple[int, int]]) -> int:
    """Use so many global batches on all ranks, up to an epoch; return how many of their samples were padding."""
    padding = 0
    for _ in range(batches):
        if cursors[0].epoch >= epochs:
            break
        batch = next(cursors[0].plan())
        parts = [cursor.lists_of(batch.size) for cursor in cursors]
        assert all(part for part in parts), "every rank has something to do"
        flat = [part for own in parts for part in own]
        assert [begin for begin, _ in flat] == [0, *(end for _, end in flat[:-1])]
        assert flat[-1][1] == batch.size
        for cursor, own in zip(cursors, parts, strict=True):
            for begin, end in own:
                samples = cursor.samples_of(batch, begin, end)
                cursor.count(batch, begin, samples)
                used.update((batch.epoch, sample) for sample in samples.tolist())
            cursor.complete(batch)
        padding += batch.padding
    return padding


def enough(state: dict[str, Any], cursor: Cursor) -> bool:
    """Whether each rank can have a sample (a micro-batch) of the rest of the epoch, where it must not be changed."""
    rest = cursor.order.length - state["consumed"]
    return cursor.last != "ragged" or -(-rest // (cursor.micro_batch or 1)) >= cursor.world_size


lives = st.lists(st.tuples(st.integers(1, 7), st.integers(7, 16), st.integers(0, 9)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(16, 40),
    lives=lives,
    last=st.sampled_from(["ragged", "drop", "pad"]),
    micro_batch=st.sampled_from([None, 1, 2]),
)
def test_any_world_sizes_cut_anywhere_use_each_epoch_once(
    length: int, lives: list[tuple[int, int, int]], last: Any, micro_batch: int | None
) -> None:
    used: Counter[tuple[int, int]] = Counter()
    padding, epochs = 0, 2
    states: list[dict[str, Any]] | None = None
    cursors: list[Cursor] = []
    for world_size, batch, count in [*lives, (1, 7, 10_000)]:
        least = batch if micro_batch is None else batch // micro_batch
        cursors = group(min(world_size, least), length, batch, last=last, micro_batch=micro_batch)
        if states is not None:
            if not enough(states[0], cursors[0]):
                with pytest.raises(LoadMismatchError, match=f"{len(cursors)} ranks"):
                    restored(states, cursors)
                continue
            restored(states, cursors)
        padding += take(cursors, count, epochs, used)
        states = saved(cursors)
    assert cursors[0].epoch == epochs
    whole = Counter((epoch, sample) for epoch in range(epochs) for sample in range(length))
    runs = list(cursors[0].ledger.runs())
    if last == "ragged":
        assert used == whole
    if last == "pad":
        assert set(used) == set(whole)
        assert sum(used.values()) == len(whole) + padding == len(whole) + sum(run.padding for run in runs)
    if last == "drop":
        assert set(used.values()) == {1}
        assert sum(used.values()) == len(whole) - sum(run.end - run.begin for run in runs if not run.batches)
    # The ledger and the digests say the same of what was used.
    assert coverage(runs, cursors[0].order, epochs) == []
    assert digest_of_runs(runs, cursors[0].order, ignore) == sum(c.digest for c in cursors) % 2**128


def test_micro_batches_are_the_same_ones_at_every_world_size() -> None:
    def lists(world_size: int) -> list[list[int]]:
        cursors = group(world_size, 40, 12, micro_batch=3)
        batch = next(cursors[0].plan())
        return [c.samples_of(batch, *part).tolist() for c in cursors for part in c.lists_of(batch.size)]

    assert lists(1) == lists(2) == lists(3) == lists(4)
    assert [len(part) for part in lists(1)] == [3, 3, 3, 3]
    with pytest.raises(ValueError, match="4 micro-batches of 3, for 5 ranks"):
        group(5, 40, 12, micro_batch=3)


def test_a_rest_that_is_too_short_for_the_ranks_joins_the_batch_before_it() -> None:
    assert [batch.size for batch in group(2, 20)[0].plan()] == [6, 6, 6, 2]
    assert [batch.size for batch in group(3, 20)[0].plan()] == [6, 6, 8]
    assert [batch.size for batch in group(3, 20, last="drop")[0].plan()] == [6, 6, 6]
    assert [batch.size for batch in group(3, 20, last="pad")[0].plan()] == [6, 6, 6, 6]
    for ranks in (1, 2, 3):
        for last in ("ragged", "drop", "pad"):
            cursor = group(ranks, 20, last=last)[0]
            full, other = cursor.sizes_left()
            assert [batch.size for batch in cursor.plan()] == [6] * full + [other] * (other > 0)


def test_a_restart_with_more_ranks_than_samples_of_the_epoch_are_left_says_how_many_can_go_on() -> None:
    cursors = group(2, 20)
    take(cursors, 3, 1, Counter())
    states = saved(cursors)
    with pytest.raises(LoadMismatchError, match=r"of epoch 0 a global batch of 2 samples .* at most 2 ranks"):
        restored(states, group(3, 20))
    for last in ("drop", "pad"):
        restored(states, group(3, 20, last=last))


def test_the_state_at_an_epoch_s_end_is_the_start_of_the_next() -> None:
    cursors = group(2, 20)
    take(cursors, 4, 9, Counter())
    states = saved(cursors)
    assert (states[0]["epoch"], states[0]["consumed"], states[0]["batches"]) == (1, 0, 4)
    again = restored(states, group(3, 20))[0]
    assert next(again.plan()) == GlobalBatch(4, 1, 0, 6)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (Shuffled(21, 5), "length 21 here, 20 there"),
        (Shuffled(20, 6), "seed 6 here, 5 there"),
        (Sequential(20), "kind 'sequential' here, 'shuffled' there; seed None here, 5 there"),
    ],
)
def test_another_order_is_an_error_that_says_how_to_start_anew(order: Any, message: str) -> None:
    state = group(1)[0].state_dict()
    with pytest.raises(LoadMismatchError, match=message) as caught:
        Cursor(order, 6, rank=0, world_size=1).load_state_dict(state)
    assert "to start anew with other data, restore the other parts only" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cursor": "another"}, "not the state of a data cursor"),
        ({"consumed": -1}, "consumed is -1"),
        ({"consumed": 21}, "consumed 21 of 20"),
        ({"batches": True}, "batches is True"),
        ({"ledger": [[1, [0, 1]]]}, "a run of a ledger has 8 numbers"),
        ({"ledger": [[1 << 63, [0, 0, 0, 0, 1, 0, 1, 0]]]}, "chapter repeats"),
        ({"ledger": [[1, [0, 1, 0, 0, 3, 0, 1, 0]]]}, "no run of a ledger"),
        ({"digest": "12"}, "32 hexadecimal digits"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    state = {**group(1)[0].state_dict(), **change}
    with pytest.raises(LoadMismatchError, match=message):
        group(1)[0].load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 0}, "global_batch=0"),
        ({"global_batch": 4, "micro_batch": 5}, "micro_batch=5"),
        ({"global_batch": 4, "last": "keep"}, "last='keep'"),
        ({"global_batch": 4, "rank": 2, "world_size": 2}, "rank=2"),
        ({"global_batch": 2, "world_size": 3}, "a global batch of 2 samples for 3 ranks"),
        ({"global_batch": 40, "last": "drop"}, "leaves nothing of an epoch of 20"),
        ({"global_batch": 40, "world_size": 21}, "the epoch: a global batch of 20 samples for 21 ranks"),
    ],
)
def test_arguments_that_leave_nothing_to_do_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cursor(Shuffled(20, 5), **{"rank": 0, "world_size": 1, **arguments})


def test_ten_thousand_like_epochs_are_kept_as_one() -> None:
    ledger = Ledger()
    for epoch in range(10_000):
        ledger.add(GlobalBatch(2 * epoch, epoch, 0, 6), 2, 0)
        ledger.add(GlobalBatch(2 * epoch + 1, epoch, 6, 10), 2, 0)
        ledger.close_epoch()
    assert ledger.plain() == [[10_000, [0, 0, 0, 0, 6, 0, 2, 0], [1, 1, 0, 6, 10, 0, 2, 0]]]
    runs = list(Ledger.from_plain(ledger.plain()).runs())
    assert runs[-1] == Run(19_999, 19_999, 9_999, 6, 10, 0, 2, 0)
    assert coverage(runs, Sequential(10), 10_000) == []


def test_more_epochs_than_runs_may_be_stored_can_be_loaded_again() -> None:
    """Training on one batch per epoch for days: a few numbers, however many epochs."""
    cursor = Cursor(Shuffled(20, 5), 20, rank=0, world_size=1)
    epochs = MAX_RUNS + 5
    cursor.load_state_dict(
        {
            **cursor.state_dict(),
            "ledger": [[epochs, [0, 0, 0, 0, 20, 0, 1, 0]]],
            "epoch": epochs,
            "batches": epochs,
        }
    )
    batch = next(cursor.plan())
    assert (batch.epoch, batch.number) == (epochs, epochs)
    assert len(cursor.ledger) == epochs
    with pytest.raises(ValueError, match="more than"):
        Ledger.from_plain([[1, *([[0, 0, 0, 0, 1, 0, 1, 0]] * (MAX_RUNS + 1))]])


def test_batches_of_one_size_are_one_run_and_what_interrupts_them_shows() -> None:
    ledger = Ledger()
    for number in range(5):
        ledger.add(GlobalBatch(number, 0, 4 * number, 4 * number + 4), 2, 0)
    ledger.add(GlobalBatch(5, 0, 24, 28), 2, 0)  # a gap of four
    ledger.add(GlobalBatch(6, 0, 28, 32), 3, 0)  # other ranks
    ledger.add(GlobalBatch(7, 0, 32, 36), 3, 1)  # another life
    runs = [(run.first, run.last, run.begin, run.end) for run in ledger.runs()]
    assert runs == [(0, 4, 0, 20), (5, 5, 24, 28), (6, 6, 28, 32), (7, 7, 32, 36)]
    assert Ledger.from_plain(ledger.plain()).plain() == ledger.plain()


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=50), st.integers(0, 9), st.randoms())
def test_digests_add_up_in_any_order_and_in_any_parts(samples: list[int], epoch: int, random: Any) -> None:
    whole = digest_of(epoch, np.array(samples))
    random.shuffle(samples)
    cut = random.randrange(len(samples) + 1)
    parts = [np.array(part, np.int64) for part in (samples[:cut], samples[cut:])]
    assert sum(digest_of(epoch, part) for part in parts) % 2**128 == whole
    assert parse_digest(write_digest(whole)) == whole
    assert digest_of(epoch + 1, np.array(samples)) != whole
    assert digest_of(epoch, np.array(samples), padding=True) != whole
    assert digest_of(epoch, np.array([*samples, samples[0]])) != whole
