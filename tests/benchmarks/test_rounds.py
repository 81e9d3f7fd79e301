"""Rounds are interleaved, and what is said of them is right on given numbers."""

import pytest

from benchmarks.rounds import best_of, interleaved, median_ratio, ratios, rotated, spread


def test_ratios_are_taken_within_rounds() -> None:
    # A slow second round falls on both: the medians' ratio would be 3, the rounds' is 2.
    ours, theirs = [2.0, 20.0, 6.0], [1.0, 10.0, 2.0]
    assert ratios(ours, theirs) == [2.0, 2.0, 3.0]
    assert median_ratio(ours, theirs) == 2.0


def test_rounds_that_are_missing_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        median_ratio([1.0, 2.0], [1.0])


def test_the_best_peer_is_found_in_each_round() -> None:
    assert best_of([[3.0, 1.0], [2.0, 5.0]]) == [2.0, 1.0]


def test_spread() -> None:
    assert spread([0.5, 4.0, 1.0]).text() == "1.00 (0.50–4.00)"
    assert spread([0.012, 0.014]).text() == "0.013 (0.012–0.014)"


def test_each_round_begins_one_place_further() -> None:
    assert [rotated(("a", "b", "c"), number) for number in range(3)] == [
        ("a", "b", "c"),
        ("b", "c", "a"),
        ("c", "a", "b"),
    ]


def test_warm_up_is_not_counted_and_a_failing_subject_stops_nobody() -> None:
    calls: list[str] = []

    def good() -> int:
        calls.append("good")
        return len(calls)

    def bad() -> int:
        calls.append("bad")
        raise OSError("no room")

    measured, errors = interleaved({"good": good, "bad": bad}, rounds=2, warmup=1)
    assert calls == ["good", "bad", "good", "good"]
    assert measured == {"good": [3, 4]}
    assert errors == {"bad": "OSError: no room"}
