"""Targets say met exactly where the figure keeps the promise, and figures are put together as they are described."""

import io

import pytest
from rich.console import Console

from benchmarks import beside, first, leaves, memory, overhead, peers, suite
from benchmarks.__main__ import all_targets
from benchmarks.table import Target, show_targets


@pytest.mark.parametrize(
    ("figure", "at_most", "met"),
    [(1.1, True, True), (1.11, True, False), (1.1, False, True), (1.09, False, False), (None, True, None)],
)
def test_met(figure: float | None, at_most: bool, met: bool | None) -> None:
    assert Target("x", figure, 1.1, at_most=at_most).met is met


def test_json_and_back() -> None:
    target = Target("cold load", 0.9, 0.95, "×", False)
    assert Target.of(target.as_json()) == target
    assert target.as_json()["met"] is False


def test_the_line_shows_figure_target_and_verdict() -> None:
    file = io.StringIO()
    show_targets(Console(file=file, width=100), [Target("python", 1.5, 2, "µs"), Target("gone", None, 2)])
    lines = file.getvalue().splitlines()
    assert any("python" in line and "1.5 µs" in line and "≤ 2 µs" in line and line.count("met") == 1 for line in lines)
    assert any("gone" in line and "not measured" in line for line in lines)


def systems() -> dict[str, dict[str, list[float]]]:
    return {
        "limit: memcpy, O_DIRECT": {"stall": [0.2, 0.4], "durable": [0.8, 1.6], "load": [0.8, 0.8]},
        "ckptengine": {"stall": [0.2, 0.4], "durable": [1.0, 2.0], "load": [1.0, 1.0]},
        "torch_checkpointing": {"stall": [0.3, 0.3], "durable": [3.0, 2.0], "load": [3.0, 3.0]},
        "DCP async, cached stager": {"stall": [0.4, 0.4], "durable": [2.0, 8.0], "load": [2.0, 4.0]},
        "torch.save": {"stall": [2.0, 2.0], "durable": [0.1, 0.1], "load": [9.0, 9.0]},
    }


def test_peers() -> None:
    figures = [target.figure for target in peers.targets(systems())]
    # torch.save's durable does not count: only the two asynchronous ones are promised against.
    assert figures == pytest.approx([1.0, 0.8, 0.8, 1.5, 2.5])


def test_peers_without_any_peer_have_no_figure() -> None:
    alone = {name: one for name, one in systems().items() if name.startswith(("limit", "ckpt"))}
    assert [target.met for target in peers.targets(alone)] == [True, False, False, None, None]


def test_overhead() -> None:
    lost = {"ckptengine": {"lost": [0.1, 0.3, 0.2]}, "DCP async": {"lost": [1.0, 0.5, 2.0]}}
    assert [target.figure for target in overhead.targets(lost)] == [pytest.approx(0.2), None]


def test_python_time_per_leaf() -> None:
    measured = {"ckptengine": {"stall": [0.5, 0.7], "copied": [0.3, 0.3]}}
    assert leaves.python_us_per_leaf(measured, "ckptengine", 100_000) == pytest.approx(3.0)


def test_first() -> None:
    measured = {
        "ckptengine": {"stall": [1.0], "durable": [2.0]},
        "DCP async": {"stall": [2.0], "durable": [1.0]},
        first.PREWARMED: {"stall": [0.5], "durable": [4.0]},
    }
    assert [target.figure for target in first.targets(measured)] == [0.5, 2.0, None, None]
    measured[first.SEEN] = {"stall": [1.0], "durable": [2.0]}
    assert [target.figure for target in first.targets(measured)] == [0.5, 2.0, 2.0, 2.0]


def test_memory_above() -> None:
    samples = [(0.0, 50), (1.0, 100), (2.0, 260), (3.0, 190), (4.0, 900)]
    assert memory.above(samples, began=1.5, ended=3.5) == 160
    with pytest.raises(ValueError, match="too few"):
        memory.above(samples, began=5.0, ended=6.0)


def test_suite() -> None:
    measured = {
        "ckptengine": {"write": [1.0, 1.0], "read": [1.0, 2.0]},
        "DCP save": {"write": [3.0, 2.0], "read": [2.0, 2.0]},
        "DCP async": {"write": [2.0, 4.0], "read": [4.0, 1.0]},
    }
    assert [target.figure for target in suite.targets(measured)] == pytest.approx([2.0, 1.25])


def test_the_suite_has_the_size_that_it_says() -> None:
    size = sum(length * dtype.itemsize for _, dtype, length in suite.tensors(1.0))
    assert round(size / 2**30, 2) == 2.28
    assert all(length % suite.RANKS == 0 for _, _, length in suite.tensors(0.3))


def test_all_targets_name_their_benchmark() -> None:
    plain = Target("stall", 1.0, 1.1).as_json()
    found = all_targets({"peers": {"targets": [plain]}, "scale": {"targets": [{**plain, "note": "x"}]}, "suite": {}})
    assert [target.what for target in found] == ["peers: stall", "scale: stall"]


def test_reshard_takes_the_worst_round() -> None:
    rounds = [{"counted": 100, "needed": 100}, {"counted": 106, "needed": 100}, {"counted": 210, "needed": 0}]
    result = {"nbytes": 200, "cases": {"4 to 2": {"ckptengine": rounds, "DCP": []}}}
    (target,) = beside.reshard_targets(result)
    assert target.figure == pytest.approx(1.06)
    assert target.met is False


def test_scale() -> None:
    result = {"ranks": 16, "leaves": 2, "layout_bytes_per_chunk": 3.5, "first_plan_seconds": 2, "later_plan_seconds": 0}
    assert [target.met for target in beside.scale_targets(result)] == [True, False, True]
