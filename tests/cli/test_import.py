from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from cli_run import Call

import ckptengine as ce


def test_weights_of_another_library_become_a_checkpoint_that_a_model_is_filled_from(tmp_path: Path, call: Call) -> None:
    net, other = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "m.safetensors")
    result = call("import", tmp_path / "m.safetensors", tmp_path / "c", "--under", "model")
    assert result.exit_code == 0, result.stderr
    assert call("verify", tmp_path / "c").exit_code == 0
    ce.load(tmp_path / "c", into={"model": other})
    assert torch.equal(net.weight, other.weight)
    assert call("import", tmp_path / "m.safetensors", tmp_path / "c").exit_code == 2


def test_parts_and_new_names_and_values_are_imported(tmp_path: Path, call: Call) -> None:
    torch.save({"net": {"w": torch.ones(2)}, "epoch": 3, "rest": torch.zeros(1)}, tmp_path / "c.pt")
    options = ["--rename", "net=model", "--only", "model", "--only", "epoch"]
    result = call("import", tmp_path / "c.pt", tmp_path / "c", *options)
    assert result.exit_code == 0, result.stderr
    loaded = ce.load(tmp_path / "c")
    assert (set(loaded), loaded["epoch"]) == ({"model", "epoch"}, 3)
    np.testing.assert_array_equal(loaded["model"]["w"], [1, 1])


def test_a_source_that_is_none_is_told(tmp_path: Path, call: Call) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"x")
    assert call("import", tmp_path / "m.safetensors", tmp_path / "c").exit_code == 1
    assert call("import", tmp_path / "none", tmp_path / "c").exit_code == 2
