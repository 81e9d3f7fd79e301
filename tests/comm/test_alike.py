"""Arguments that all ranks must give alike: what travels for that, and what is said where they differ."""

import pytest
from thread_ranks import Ranks

import ckptengine as ce
from ckptengine.comm.alike import all_alike, first_alike, in_words
from ckptengine.errors import StorageError


@pytest.fixture
def sent():
    """What each rank has sent in each `all_gather`."""
    return [[], [], []]


@pytest.fixture
def ranks(sent):
    three = Ranks(3)
    for comm, of_rank in zip(three.comms, sent, strict=True):

        def all_gather(value, timeout, gather=comm.all_gather, of_rank=of_rank):
            of_rank.append(value)
            return gather(value, timeout)

        comm.all_gather = all_gather
    yield three
    three.end()


def ask(ranks, function, values, work=lambda: b"found"):
    """Have each rank ask for a value; return what it is given, or told."""

    def one(rank):
        try:
            return function(ranks.comms[rank], work, "call", {"other": 1, "name": values[rank]}, 20.0, "working")
        except (ValueError, StorageError) as error:
            return type(error), str(error)

    return ranks.run(one)


def failing():
    raise StorageError(5, "no disk")


def test_ranks_that_ask_alike_send_eight_bytes_more(ranks, sent):
    assert ask(ranks, first_alike, ["value" * 1000] * 3) == [b"found"] * 3
    assert [list(map(len, of_rank)) for of_rank in sent] == [[8 + 1 + len(b"found")], [8], [8]]


def test_words_travel_where_ranks_ask_for_different_things(ranks, sent):
    said = ask(ranks, first_alike, ["one", "two", "one"])
    message = "call: name is one on ranks 0, 2, two on rank 1. All ranks make this call together: give all the same"
    assert said == [(ValueError, message)] * 3
    assert [len(of_rank) for of_rank in sent] == [2] * 3


@pytest.mark.parametrize("function", [first_alike, all_alike])
def test_what_ranks_ask_for_is_looked_at_before_what_was_found(ranks, function):
    """Rank 0 may have failed because of an argument that the others did not give."""
    assert {kind for kind, _ in ask(ranks, function, ["one", "two", "one"], failing)} == {ValueError}
    assert {kind for kind, _ in ask(ranks, function, ["one"] * 3, failing)} == {StorageError}


def test_all_ranks_are_given_what_each_has_found(ranks):
    assert ask(ranks, all_alike, ["one"] * 3) == [[b"found"] * 3] * 3


@pytest.mark.parametrize(("function", "found"), [(first_alike, b"found"), (all_alike, [b"found"])])
def test_a_single_process_makes_no_words(function, found):
    class Unspeakable:
        def __str__(self):
            raise AssertionError

    assert function(ce.SingleProcess(), lambda: b"found", "call", {"name": Unspeakable()}, 1.0, "working") == found


def test_of_many_or_long_values_some_are_shown():
    text = in_words("name", [*range(6), "long" * 1000])
    assert text.startswith("name is 0 on rank 0, 1 on rank 1, 2 on rank 2, 3 on rank 3, and 3 more. ")
    assert len(in_words("name", ["long" * 1000, 1])) < 400
