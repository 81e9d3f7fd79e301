"""A GPT that is trained in pipeline stages is killed, and goes on in other stages as if it had never been split."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

import ckptengine as ce

HERE = Path(__file__).parent
STEPS = 9


def life(folder: Path, schedule: str, ranks: int, die_at: int | None = None) -> None:
    folder.mkdir(exist_ok=True)
    dies = () if die_at is None else ("--die-at", die_at)
    done = run_ranks(ranks, HERE / "pipeline_job.py", folder, schedule, "--steps", STEPS, *dies, timeout=120)
    assert (done.returncode == 0) == (die_at is None), done.stdout[-4000:]


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        yield from leaves(value, f"{name}.{key}")
    if not isinstance(state, Mapping | list):
        yield name, state.tobytes() if isinstance(state, np.ndarray) else state


def losses(folder: Path) -> dict[int, list[list[str]]]:
    """Return the losses of each step, once for each time that it was trained."""
    found: dict[int, list[list[str]]] = {}
    for line in (folder / "losses").read_text().splitlines():
        step, _, _, *values = line.split()
        found.setdefault(int(step), []).append(values)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    life(folder, "none", 1)
    return folder


LIVES = {
    "2 → 4 → 1": [("1f1b", 2, 3), ("1f1b", 4, 5), ("none", 1, None)],
    "1 → interleaved on 2 → 4": [("none", 1, 3), ("interleaved", 2, 5), ("1f1b", 4, None)],
    "4 → 2 → interleaved on 2 → 2": [("1f1b", 4, 3), ("1f1b", 2, 5), ("interleaved", 2, 7), ("1f1b", 2, None)],
}


@pytest.mark.parametrize(
    "lives",
    [
        pytest.param(lives, id=name, marks=pytest.mark.long if name.startswith("4") else ())
        for name, lives in LIVES.items()
    ],
)
def test_a_killed_training_goes_on_in_other_stages_to_the_same_bits(
    tmp_path: Path, undisturbed: Path, lives: list[tuple[str, int, int | None]]
) -> None:
    folder = tmp_path / "job"
    for schedule, ranks, die_at in lives:
        life(folder, schedule, ranks, die_at)
    expected, found = losses(undisturbed), losses(folder)
    assert list(found) == list(range(1, STEPS + 1))
    for step, times in found.items():
        assert all(values == expected[step][0] for values in times), step
    assert len(found[3]) == 2, "the first life was killed after step 3, and had saved step 2"
    ours, theirs = (dict(leaves(ce.load(run / "run"))) for run in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and "params" not in name] == []


@pytest.mark.long
@pytest.mark.parametrize("how", ["fsdp1", "fsdp2", "zero"])
def test_stages_that_are_killed_go_on_as_ranks_that_share_the_model_and_as_stages_again(
    tmp_path: Path, undisturbed: Path, how: str
) -> None:
    """The ranks add up gradients in another order, so the losses are equal to that order."""
    folder = tmp_path / "job"
    for schedule, ranks, die_at in (("1f1b", 2, 3), (how, 2, 5), ("interleaved", 2, 7), (how, 4, None)):
        life(folder, schedule, ranks, die_at)
    expected, found = losses(undisturbed), losses(folder)
    assert list(found) == list(range(1, STEPS + 1))
    for step, times in found.items():
        for values in times:
            pairs = zip(map(float.fromhex, values), map(float.fromhex, expected[step][0]), strict=True)
            assert all(abs(one - other) < 1e-5 * other for one, other in pairs), (step, values)
