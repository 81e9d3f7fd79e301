"""The package without MindSpore, and its benchmark with it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

WITHOUT = """
import sys
sys.modules["mindspore"] = None  # as where it isn't installed
import numpy as np
import ckptengine as ce
ce.save(sys.argv[1], {"a": np.arange(3)})
assert ce.load(sys.argv[1])["a"].tolist() == [0, 1, 2]
try:
    import ckptengine.mindspore
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_mindspore_all_else_works_and_the_import_says_how_to_install_it(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "a")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "pip install 'mindspore>=2.10'" in done.stdout


def test_the_benchmark_measures_mindspores_three_ways_and_ours(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "mindspore", "--scale", "0.02", "--runs", "1"]
    command += ["--folder", str(tmp_path), "--json", str(file)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(file.read_text())["mindspore"]
    assert len(result["systems"]) == 4
    assert not result["errors"]
    assert all(len(one[measure]) == 1 for one in result["systems"].values() for measure in ("call", "stall", "durable"))
    assert all(target["figure"] > 0 for target in result["targets"])
