import json
import math

import pytest

from ckptengine.cli.output import print_json, ranks_text, size_text
from ckptengine.inspect import LeafSummary


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(None, "?"), (0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1024, "1 KiB"), (3 << 40, "3 TiB")],
)
def test_sizes_are_short(nbytes: int | None, text: str) -> None:
    assert size_text(nbytes) == text


@pytest.mark.parametrize(("ranks", "text"), [((), ""), ((4,), "4"), ((0, 1, 2), "0-2"), ((0, 2, 3, 9), "0, 2-3, 9")])
def test_runs_of_ranks_are_joined(ranks: tuple[int, ...], text: str) -> None:
    assert ranks_text(ranks) == text


def test_values_that_json_lacks_are_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    leaf = LeafSummary("w", "float32", (2, 3), 24, "sharded", (0, 1), None)
    print_json({"leaf": leaf, 3: math.nan, "raw": b"\x00", "big": 1 << 80, "on": True})
    assert json.loads(capsys.readouterr().out) == {
        "leaf": {
            "name": "w",
            "dtype": "float32",
            "shape": [2, 3],
            "nbytes": 24,
            "placement": "sharded",
            "archives": [0, 1],
            "rank": None,
        },
        "3": "nan",
        "raw": "b'\\x00'",
        "big": 1 << 80,
        "on": True,
    }
