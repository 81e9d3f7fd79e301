"""The accelerator's benchmark runs to its end on a machine that has none, and so does the stand-in for its codec."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numcodecs.zstd import Zstd

from benchmarks.processes import ROOT


@pytest.mark.long
def test_a_tiny_state_gives_every_figure(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--folder", str(tmp_path), "--json", str(file)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--gigabytes", "0.005", "1e9"], cwd=ROOT, env=environment, timeout=250, check=True)
    assert done.returncode == 0
    result = json.loads(file.read_text())
    assert len(result["left_out"]) >= 1
    assert result["left_out"][-1].startswith("1e+09 GB: ")
    figures = result["sizes"]["0.005 GB"]
    for kind in ("eager", "overlapped"):
        assert set(figures[f"ckptengine, {kind}"]) >= {"call_ms", "lost_ms_per_save_every_1", "durable_s", "restore_s"}
    assert set(figures) >= {"pinned copy", "safetensors", "torch.save", "DCP async, cached pinned stager"}


def test_the_stand_in_and_numcodecs_read_each_others_frames() -> None:
    path = ROOT / "tests" / "gpu" / "stand_in" / "numcodecs" / "zstd.py"
    spec = importlib.util.spec_from_file_location("stand_in_zstd", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for data in (np.arange(100_000).tobytes(), b"x"):
        assert Zstd(level=3).decode(module.Zstd(level=3).encode(data)) == data
        assert module.Zstd().decode(Zstd(level=3).encode(data)) == data
