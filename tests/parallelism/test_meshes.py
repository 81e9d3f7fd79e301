"""A training that is killed on a mesh of several dimensions goes on over another as if it had been in one process.

A GPT over FSDP2 × tensor × pipeline, sequence and context parallel ranks; experts over HSDP × expert parallel ranks.
"""

import functools
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

pytest.importorskip("torch")
from mesh_gpt import Split

import ckptengine as ce

JOB = Path(__file__).parent / "mesh_life_job.py"
Lives = list[tuple[str, int, int]]
"""Split, last step, and the step after which a rank is killed (0: none)."""
Undisturbed = Callable[[str], tuple[Path, dict[str, float]]]


def live(folder: Path, lives: Lives) -> Iterator[list[dict[str, Any]]]:
    """Yield what the ranks of each life have noted, and leave the run as that life has left it."""
    folder.mkdir(exist_ok=True)
    for number, (split, last, killed) in enumerate(lives):
        ranks = Split.of(split).ranks
        done = run_ranks(ranks, JOB, folder, number, split, last, killed)
        assert done.returncode == (-signal.SIGKILL if killed else 0), done.stdout[-6000:]
        yield [json.loads((folder / f"life-{number}-{rank}.json").read_text()) for rank in range(ranks)]


def union(ranks: list[dict[str, str]]) -> dict[str, str]:
    """Return all that the ranks have; what several have must be the same."""
    found: dict[str, str] = {}
    for rank in ranks:
        assert all(found.setdefault(name, digest) == digest for name, digest in rank.items())
    return found


def leaves(state: Any, name: str = "") -> dict[str, Any]:
    """Return the shapes of a checkpoint's arrays and its plain values, by name; a group's parameters in any order."""
    if name.endswith(".params"):
        return {name: sorted(state)}
    items = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list) else None
    if items is None:
        return {name: state.shape if isinstance(state, np.ndarray) else state}
    return {key: one for k, value in items for key, one in leaves(value, f"{name}.{k}").items()}


def kept(run: Path) -> dict[str, Any]:
    """Return the shapes and plain values of the newest checkpoint but for those that each step changes."""
    return {
        name: value
        for name, value in leaves(ce.load(run)).items()
        if not name.startswith(".scheduler") and name[-2:] != "lr"
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return a function from a split to the run, and the losses, of the same model in one process."""

    @functools.cache
    def trained(split: str) -> tuple[Path, dict[str, float]]:
        folder = tmp_path_factory.mktemp("undisturbed")
        ((only,),) = live(folder, [(split, 10, 0)])
        return folder / "run", only["losses"]

    return trained


LIVES: dict[str, Lives] = {
    "fsdp2 × tp × pp → fsdp2 × tp → one → fsdp2 × tp × pp": [
        ("pp2-fsdp2-tp2", 10, 3), ("fsdp2-tp2", 10, 5), ("one", 10, 7), ("pp2-fsdp2-tp2", 10, 0),
    ],
    "sequence → context × fsdp2 → one → context × sequence → fsdp2 × pp": [
        ("tp2-sp", 10, 3), ("fsdp2-cp2", 10, 5), ("one", 10, 7), ("cp2-tp2-sp", 10, 9), ("pp2-fsdp2", 10, 0),
    ],
    "experts as DTensors × hsdp → declared over 4 → DTensors over 2 → one → declared × hsdp": [
        ("dtensor-hsdp2-fsdp2-ep2", 10, 3), ("stack-ep4", 10, 5), ("dtensor-ep2", 10, 7), ("stack-ep1", 10, 9),
        ("stack-hsdp2-fsdp2-ep2", 10, 0),
    ],
    "lists of experts × hsdp → over 4 → one → over 2": [
        ("list-hsdp2-fsdp2-ep2", 10, 3), ("list-ep4", 10, 5), ("list-ep1", 10, 7), ("list-ep2", 10, 0),
    ],
}  # fmt: skip
ALONE = {"dtensor": "stack-ep1", "stack": "stack-ep1", "list": "list-ep1", "": "one"}


@pytest.mark.long
@pytest.mark.parametrize("lives", [pytest.param(lives, id=name) for name, lives in LIVES.items()])
def test_a_killed_training_goes_on_over_another_mesh(tmp_path: Path, undisturbed: Undisturbed, lives: Lives) -> None:
    whole, losses = undisturbed(ALONE[Split.of(lives[0][0]).experts_as])
    saved: dict[str, str] = {}
    at = 0
    for number, ranks in enumerate(live(tmp_path / "job", lives)):
        if number:
            assert [rank["start"] for rank in ranks] == [at] * len(ranks)
            assert union([rank["loaded"] for rank in ranks]) == saved
            assert max(rank["read"] for rank in ranks) <= 1.05
        for rank in ranks:
            expected = [losses[step] for step in rank["losses"]]
            np.testing.assert_allclose(list(rank["losses"].values()), expected, rtol=1e-5)
        # A mesh leaves nothing of its own in a checkpoint: no stages, no stretches of a sequence.
        assert kept(tmp_path / "job" / "run") == kept(whole)
        (step,) = {step for rank in ranks for step in rank["saved"]}
        at, saved = int(step), union([rank["saved"][step] for rank in ranks])
