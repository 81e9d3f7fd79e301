"""A sample of the zoo, and the zoo's own eyes: what is wrong shows as wrong. `make zoo` tries everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What the command says of each entry of `sample.py`: `{"one AdamW": "exact"}`."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "run.py"), "--entries", "sample"]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert job.returncode == 1, job.stdout + job.stderr  # as there are lines at fault
    said = {}
    for line in job.stdout.splitlines():
        if line.startswith(("one ", "two ")):
            entry, _, outcome = line.partition(": ")
            said[f"{entry[:3]} {entry.rpartition('.')[2]}"] = outcome
    return said


@pytest.mark.parametrize("where", ["one", "two"])
def test_a_sample_goes_on_bit_for_bit_after_a_restore(said: dict[str, str], where: str) -> None:
    for name in ("AdamW", "SGD", "AveragedModel (EMA)"):
        assert said[f"{where} {name}"] == "exact"
    for name in ("OneCycleLR", "HidesNothing"):
        assert said[f"{where} {name}"] == "exact through its own `state_dict`"


@pytest.mark.parametrize("where", ["one", "two"])
def test_the_zoo_sees_what_is_not_as_it_was(said: dict[str, str], where: str) -> None:
    assert said[f"{where} HidesItsCounter"].startswith("silently different")
    assert said[f"{where} ChangedByBeingSaved"].startswith("changed by the save")
    assert said[f"{where} CannotBeRestored"].startswith("saved, refused at the restore")
    assert said[f"{where} EndsItsProcess"].startswith("an error that is not the engine's: the process ended with 3")
