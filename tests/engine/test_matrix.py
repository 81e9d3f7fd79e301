"""From each sharding to each, at 1 to 4 ranks, bit for bit: a tenth of the pairs, and under `long` all of them."""

import json
import subprocess
import sys

import pytest
from launch import HERE, environment, launch

pytest.importorskip("torch")
from layouts import LAYOUTS

CASES = [f"{size}-{layout}" for size in LAYOUTS for layout in LAYOUTS[size]]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    return folder, launch("matrix_job.py", 4, folder, "10")


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_loads_into(case, matrix):
    _, ranks = matrix
    problems = {
        f"{pair} on rank {rank}": problem
        for rank, found in enumerate(ranks)
        for pair, problem in found.items()
        if pair.endswith(f" -> {case}")
    }
    assert not problems


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_checkpoint_loads_into_every_sharding(tmp_path):
    assert launch("matrix_job.py", 4, tmp_path, "1", timeout=800) == [{}] * 4


def test_every_checkpoint_is_read_without_torch(matrix):
    folder, _ = matrix
    command = [sys.executable, str(HERE / "numpy_reader.py"), str(folder)]
    reader = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert reader.returncode == 0, reader.stderr
    assert json.loads(reader.stdout) == {case: [] for case in CASES}
