"""Directories of PyTorch's distributed checkpoint as sources, against those that torch wrote."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from buckets import Bucket
from foreign_models import model, same
from torch.distributed.checkpoint import _extension as extension
from torch.distributed.checkpoint.state_dict import get_state_dict

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointError, ForeignFormatError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def saved(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


def trained() -> dict[str, Any]:
    net = model(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model_state, optimizer_state = get_state_dict(net, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "step": 7, "args": {"lr": 0.1, "name": "x"}}


def test_a_training_checkpoint_comes_back_with_its_values(tmp_path: Path) -> None:
    state = trained()
    same(ce.load(saved(tmp_path / "d", state), as_torch=True), state)


def test_tensors_of_many_kinds_come_back(tmp_path: Path) -> None:
    state = {
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 6).t(),
        "bf16": torch.randn(3).bfloat16(),
        "float8": torch.randn(3, 2).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "list": [torch.ones(2), 5, {"a": torch.zeros(1)}],
        "bytes": b"\x00\xff",
        "nothing": None,
    }
    same(ce.load(saved(tmp_path / "d", state), as_torch=True), state)


def test_a_state_is_filled(tmp_path: Path) -> None:
    saved(tmp_path / "d", {"model": model(1).state_dict(), "step": 9})
    state = {"model": model(2), "step": 0}
    assert ce.load(tmp_path / "d", into=state).complete
    same(state["model"].state_dict(), model(1).state_dict())
    assert state["step"] == 9


def test_a_directory_in_a_bucket_is_read(tmp_path: Path, bucket: Bucket) -> None:
    state = trained()
    for file in saved(tmp_path / "d", state).iterdir():
        bucket.fs.put_file(str(file), f"{bucket.url}/d/{file.name}")
    same(ce.load(f"{bucket.url}/d", storage_options=bucket.options, as_torch=True), state)


def test_names_without_a_planners_paths_are_text(tmp_path: Path) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({"net.0.weight": torch.ones(3)}, checkpoint_id=tmp_path / "d", planner=planner, no_dist=True)
    same(ce.load(tmp_path / "d", as_torch=True), {"net.0.weight": torch.ones(3)})
    state = {"net": {"0.weight": torch.zeros(3)}}
    ce.load(tmp_path / "d", into=state)
    same(state["net"]["0.weight"], torch.ones(3))


def test_a_directory_without_its_metadata_is_a_save_that_was_not_finished(tmp_path: Path) -> None:
    saved(tmp_path / "d", {"a": torch.ones(2)})
    (tmp_path / "d" / ".metadata").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"d/.metadata: missing. DCP writes it last"):
        ce.load(tmp_path / "d")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "d", {"a": torch.ones(2)})
    (tmp_path / "d" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointDamagedError, match=r".metadata: names __0_0.distcp, which is missing, for a"):
        ce.load(tmp_path / "d")


def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path / "d", {"a": torch.ones(200), "b": torch.ones(3), "n": 5})
    data = (tmp_path / "d" / "__0_0.distcp").read_bytes()
    for length in range(0, len(data), 211):
        (tmp_path / "d" / "__0_0.distcp").write_bytes(data[:length])
        with pytest.raises(CheckpointDamagedError):
            ce.load(tmp_path / "d", as_torch=True)


def test_metadata_that_is_cut_off_or_changed_is_an_error_or_read_as_it_was(tmp_path: Path) -> None:
    state = {"a": torch.arange(8.0), "b": torch.ones(3), "n": 5}
    saved(tmp_path / "d", state)
    file = tmp_path / "d" / ".metadata"
    data = file.read_bytes()
    for length in range(0, len(data), 41):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointDamagedError, match=".metadata"):
            ce.load(tmp_path / "d")
    for place in range(0, len(data), 5):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :])
        try:
            loaded = ce.load(tmp_path / "d", as_torch=True)
        except CheckpointError:
            continue
        for name in {"a", "b"} & set(loaded):
            assert loaded[name].dtype == torch.float32


class Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_the_metadata_and_in_a_value_is_named_and_not_run(tmp_path: Path) -> None:
    saved(tmp_path / "d", {"a": torch.ones(2), "x": Touches(tmp_path / "made")})
    with pytest.raises(ForeignFormatError, match=r"d: x holds posix.mkdir"):
        ce.load(tmp_path / "d")
    assert ce.load(tmp_path / "d", only=["a"])["a"].tolist() == [1.0, 1.0]
    (tmp_path / "d" / ".metadata").write_bytes(pickle.dumps(Touches(tmp_path / "made")))
    with pytest.raises(ForeignFormatError, match=r".metadata: holds posix.mkdir"):
        ce.load(tmp_path / "d")
    assert not (tmp_path / "made").exists()


def test_a_path_that_leads_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "d", {"a": torch.ones(2)})
    (tmp_path / "secret.distcp").write_bytes((tmp_path / "d" / "__0_0.distcp").read_bytes())
    metadata = pickle.loads((tmp_path / "d" / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../secret.distcp"
    (tmp_path / "d" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"'../secret.distcp' is not a name within"):
        ce.load(tmp_path / "d")


def test_tensors_that_an_extension_has_changed_are_refused(tmp_path: Path) -> None:
    class Reversed(extension.StreamTransformExtension):
        @staticmethod
        def registry_name() -> str:
            return "stream.reversed"

        @staticmethod
        def from_descriptor(version: str) -> Any:
            return Reversed()

        def get_descriptor(self) -> str:
            return "stream.reversed/1"

        def transform_to(self, output: Any) -> Any:
            return output

        def transform_from(self, input: Any) -> Any:
            return input

    writer = dcp.FileSystemWriter(tmp_path / "d", _extensions=[Reversed()])
    dcp.save({"a": torch.ones(2)}, storage_writer=writer, no_dist=True)
    with pytest.raises(ForeignFormatError, match=r"a went through stream.reversed/1"):
        ce.load(tmp_path / "d")


def test_metadata_that_contradicts_a_tensor_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path / "d", {"a": torch.ones(4, 2)})
    metadata = pickle.loads((tmp_path / "d" / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["a"]
    entry.size = entry.chunks[0].sizes = torch.Size([2, 4])
    (tmp_path / "d" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointDamagedError, match=r"float32 of shape \(4, 2\), the metadata says float32 of shape"):
        ce.load(tmp_path / "d")
