"""A sample of the zoo, and the zoo's own eyes: what is wrong shows as wrong. `make zoo` tries everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(*arguments: str) -> tuple[int, dict[str, str]]:
    """Return the command's exit code, and what it says of each entry: `{"one AdamW": "exact"}`."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "run.py"), *arguments]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    said = {}
    for line in job.stdout.splitlines():
        if line.startswith(("one ", "two ")):
            entry, _, outcome = line.partition(": ")
            said[f"{entry[:3]} {entry.rpartition('.')[2]}"] = outcome
    assert said, job.stdout + job.stderr
    return job.returncode, said


def test_a_sample_goes_on_bit_for_bit_after_a_restore() -> None:
    code, said = run("--entries", "sample", "--only", "one")
    own = "exact through its own `state_dict`"
    assert said == {
        "one AdamW": "exact",
        "one LBFGS": "exact",
        "one Muon": "exact",
        "one SGD": "exact",
        "one OneCycleLR": own,
        "one AveragedModel (EMA)": "exact",
    }
    assert code == 0


def test_the_zoo_sees_what_is_not_restored() -> None:
    code, said = run("--entries", "broken")
    assert code == 1
    for where in ("one", "two"):
        assert said[f"{where} HidesItsCounter"].startswith("silently different")
        assert said[f"{where} HidesNothing"].startswith(("exact through its own", "refused"))
        assert said[f"{where} ChangedByBeingSaved"].startswith("changed by the save")
        assert said[f"{where} CannotBeRestored"].startswith("saved, refused at the restore")
        assert said[f"{where} EndsItsProcess"].startswith("an error that is not the engine's the process ended with 3")
