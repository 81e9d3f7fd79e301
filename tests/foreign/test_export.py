"""Exports, opened by the libraries whose formats they are in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import zarr
from buckets import Bucket
from cli_run import Call
from foreign_models import model, same
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ckptengine as ce
import ckptengine.zarr
from ckptengine.errors import CheckpointDamagedError, ForeignFormatError, LoadMismatchError, StorageError
from ckptengine.export import mindspore as mindspore_format
from ckptengine.export import stream
from ckptengine.export import zarr as zarr_format
from ckptengine.export.run import shard_nbytes
from ckptengine.load.slabs import slabs

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(seed: int = 1, steps: int = 1) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net = model(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return net, optimizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net, optimizer = trained()
    path = tmp_path_factory.mktemp("checkpoint") / "c"
    ce.save(path, {"model": net, "optimizer": optimizer, "epoch": 3, "args": {"lr": 0.1, "name": "x"}})
    return path


def weights(seed: int = 1) -> dict[str, torch.Tensor]:
    return dict(trained(seed)[0].state_dict())


# safetensors


def test_a_file_is_equal_to_the_byte_with_what_the_package_writes(checkpoint: Path, tmp_path: Path) -> None:
    report = ce.export(checkpoint, tmp_path / "out", only=["model"], rename={"model": ""})
    assert report.files == ("model.safetensors",)
    assert (tmp_path / "out/model.safetensors").read_bytes() == safetensors.torch.save(weights(), {"format": "pt"})
    ce.export(checkpoint, tmp_path / "one.safetensors", only=["model"])
    named = {f"model.{name}": tensor for name, tensor in weights().items()}
    assert (tmp_path / "one.safetensors").read_bytes() == safetensors.torch.save(named, {"format": "pt"})


def test_every_dtype_is_equal_to_the_byte(tmp_path: Path) -> None:
    from test_safetensors import DTYPES

    tensors = {
        f"{dtype} é\n": torch.randint(0, 2, (3, dtype.itemsize), dtype=torch.uint8).view(dtype) for dtype in DTYPES
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "10": torch.ones(1), "9": torch.ones(1)}
    ce.save(tmp_path / "c", tensors)
    ce.export(tmp_path / "c", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


def test_shards_and_their_index_are_those_of_hugging_face(checkpoint: Path, tmp_path: Path) -> None:
    report = ce.export(checkpoint, tmp_path / "hf", only="model", rename={"model": ""}, max_shard_size="3KB")
    assert report.files[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / "hf" / report.files[-1]).read_text())
    assert set(index["weight_map"].values()) == set(report.files[:-1])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights().values())
    loaded = {}
    for file in report.files[:-1]:
        part = safetensors.torch.load_file(tmp_path / "hf" / file)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 3000
        assert {name for name, where in index["weight_map"].items() if where == file} == set(part)
        loaded |= part
    same(loaded, weights())
    same(ce.load(tmp_path / "hf", as_torch=True), weights())


def test_floating_arrays_are_written_in_another_dtype(checkpoint: Path, tmp_path: Path) -> None:
    ce.export(checkpoint, tmp_path / "out", only=["model"], rename={"model": ""}, dtype=torch.bfloat16)
    expected = {name: one.bfloat16() if one.is_floating_point() else one for name, one in weights().items()}
    assert (tmp_path / "out/model.safetensors").read_bytes() == safetensors.torch.save(expected, {"format": "pt"})


def test_a_number_that_the_dtype_cannot_hold_is_an_error(tmp_path: Path) -> None:
    ce.save(tmp_path / "c", {"w": np.array([1.0, 1e6], "f4"), "steps": np.array(1e6, "f4")})
    with pytest.raises(ForeignFormatError, match=r"w: holds 1e\+06, which float16 can't"):
        ce.export(tmp_path / "c", tmp_path / "out", dtype="float16")
    assert not list((tmp_path / "out").glob("*"))
    ce.export(tmp_path / "c", tmp_path / "out", dtype="bfloat16")
    loaded = ce.load(tmp_path / "out")
    assert loaded["w"].dtype == ml_dtypes.bfloat16
    assert loaded["steps"].dtype == np.float32, "a scalar keeps its dtype"


def test_tied_weights_are_written_once_and_told(tmp_path: Path) -> None:
    shared = torch.ones(3, 2)
    ce.save(tmp_path / "c", {"a": shared, "b": shared, "n": 5})
    report = ce.export(tmp_path / "c", tmp_path / "out")
    assert (report.left_out_tied, report.left_out_values) == (("b",), ("n",))
    assert list(safetensors.torch.load_file(tmp_path / "out/model.safetensors")) == ["a"]


def test_a_run_and_a_step_of_it_are_exported(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path / "run", every=1, keep_last=5) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.step(step, {"w": torch.full((2,), float(step))})
    assert ce.export(tmp_path / "run", tmp_path / "new").step == 3
    assert ce.export(tmp_path / "run", tmp_path / "old", step=2).step == 2
    same(ce.load(tmp_path / "old", as_torch=True), {"w": torch.full((2,), 2.0)})


def test_a_bucket_is_exported_to_a_bucket(checkpoint: Path, bucket: Bucket, tmp_path: Path) -> None:
    big = {"w": torch.randn(3_000_000), "v": torch.randn(11)}
    ce.save(f"{bucket.url}/c", big, storage_options=bucket.options)
    options = {"storage_options": bucket.options, "target_options": bucket.options}
    ce.export(f"{bucket.url}/c", f"{bucket.url}/hf", **options)
    bucket.fs.get_file(f"{bucket.url}/hf/model.safetensors", str(tmp_path / "m.safetensors"))
    assert (tmp_path / "m.safetensors").read_bytes() == safetensors.torch.save(big, {"format": "pt"})
    ce.export(f"{bucket.url}/c", f"{bucket.url}/x/c.pt", to="torch", **options)
    bucket.fs.get_file(f"{bucket.url}/x/c.pt", str(tmp_path / "c.pt"))
    same(torch.load(tmp_path / "c.pt", weights_only=True), big)


def test_what_another_library_wrote_is_exported_too(tmp_path: Path) -> None:
    torch.save({"model": weights(), "n": 1}, tmp_path / "c.pt")
    ce.export(tmp_path / "c.pt", tmp_path / "out", only=["model"], rename={"model.*": "net.*"})
    same(ce.load(tmp_path / "out", as_torch=True), {f"net.{name}": tensor for name, tensor in weights().items()})


# The other formats


def test_torch_loads_a_file_as_its_own(checkpoint: Path, tmp_path: Path) -> None:
    ce.export(checkpoint, tmp_path / "c.pt", to="torch")
    net, optimizer = trained()
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "c.pt", weights_only=True, mmap=mapped)
        same(loaded["model"], dict(net.state_dict()))
        same(loaded["optimizer"], optimizer.state_dict())
        assert (loaded["epoch"], loaded["args"]) == (3, {"lr": 0.1, "name": "x"})
    other = torch.optim.AdamW(model(5).parameters())
    other.load_state_dict(loaded["optimizer"])
    same(other.state_dict(), optimizer.state_dict())
    assert zipfile.ZipFile(tmp_path / "c.pt").testzip() is None


def test_values_of_many_kinds_come_back_from_torch(tmp_path: Path) -> None:
    from collections import Counter, OrderedDict

    shared = torch.ones(2)
    state = {
        "tensors": {"f8": torch.ones(3).to(torch.float8_e4m3fn), "u16": torch.ones(2).to(torch.uint16), "empty":
                    torch.zeros(0, 2), "scalar": torch.tensor(3), "one": shared, "two": shared},
        "values": [1, -5, 1 << 40, -(1 << 70), 2.5, float("inf"), "é", b"\xff", None, True, (1, (2, 3, 4, 5)), {}],
        "list": [torch.ones(1), 2], "dtype": torch.bfloat16, "size": torch.Size([1, 2]), "device": torch.device("cpu"),
        "ordered": OrderedDict(b=1, a=2), "counter": Counter("aab"), "many": list(range(3000)),
    }  # fmt: skip
    ce.save(tmp_path / "c", state)
    ce.export(tmp_path / "c", tmp_path / "c.pt", to="torch")
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    same(loaded, state)
    assert loaded["tensors"]["one"] is loaded["tensors"]["two"]


def test_a_value_that_torch_does_not_load_is_named(tmp_path: Path) -> None:
    ce.save(tmp_path / "c", {"w": torch.ones(1), "where": {"path": Path("/x")}})
    with pytest.raises(ForeignFormatError, match=r"where.path: .*Path can't be written"):
        ce.export(tmp_path / "c", tmp_path / "c.pt", to="torch")


def test_dcp_loads_a_directory_as_its_own(checkpoint: Path, tmp_path: Path) -> None:
    ce.export(checkpoint, tmp_path / "d", to="dcp")
    net, optimizer = model(5), torch.optim.AdamW(model(5).parameters())
    optimizer = torch.optim.AdamW(net.parameters())
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "epoch": 0, "args": {"lr": 0.0, "name": ""}}
    dcp.load(state, checkpoint_id=tmp_path / "d", no_dist=True)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    same(net.state_dict(), trained()[0].state_dict())
    same(optimizer.state_dict(), trained()[1].state_dict())
    assert (state["epoch"], state["args"]) == (3, {"lr": 0.1, "name": "x"})
    same(ce.load(tmp_path / "d", as_torch=True)["model"], weights())


@pytest.mark.parametrize("name", ["z", "z.zip"])
def test_zarr_opens_what_was_exported(checkpoint: Path, tmp_path: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(zarr_format, "CHUNK_NBYTES", 1000)
    state = {
        "cut": np.arange(2000.0).reshape(20, 10, 10), "bf": np.ones(3, ml_dtypes.bfloat16), "scalar": np.array(5),
        "n": {"x": [1, float("nan")]}, "empty": np.zeros((0, 2)),
    }  # fmt: skip
    ce.save(tmp_path / "more", state)
    ce.export(tmp_path / "more", tmp_path / name, to="zarr")
    store = zarr.storage.ZipStore(tmp_path / name, mode="r") if name.endswith("zip") else tmp_path / name
    group = zarr.open_group(store, mode="r")
    np.testing.assert_array_equal(group["cut"][:], np.arange(2000.0).reshape(20, 10, 10))
    assert group["bf"][:].astype(float).tolist() == [1, 1, 1]
    assert group["scalar"][()] == 5
    assert group["empty"].shape == (0, 2)
    assert group.attrs["values"]["n"] == {"x": [1, {"$float": "nan"}]}


def test_mindspore_loads_a_file_as_its_own(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    mindspore = pytest.importorskip("mindspore")
    monkeypatch.setattr(mindspore_format, "SLICE_NBYTES", 1000)
    report = ce.export(checkpoint, tmp_path / "m.ckpt", to="mindspore", only=["model", "epoch"], rename={"model": ""})
    assert report.left_out_values == ("epoch",)
    loaded = mindspore.load_checkpoint(str(tmp_path / "m.ckpt"))
    assert list(loaded) == list(weights())
    for name, tensor in weights().items():
        assert loaded[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(loaded[name].asnumpy(), tensor.numpy())


# Bounds and errors


@given(st.lists(st.integers(0, 6), max_size=4), st.integers(1, 40))
def test_slabs_follow_each_other_and_make_up_a_tensor(shape: list[int], most: int) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    parts = []
    for box in slabs(tuple(shape), most):
        assert 0 < box.volume <= most
        parts.append(array[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].reshape(-1))
    np.testing.assert_array_equal(np.concatenate([*parts, np.zeros(0, int)]), array.reshape(-1))


def test_files_of_many_windows_are_written_whole(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "WINDOW_NBYTES", 1 << 16)
    tensors = {f"t{n}": torch.randn(n * 1013 + 1, 3) for n in range(40)} | {"big": torch.randn(200_001)}
    ce.save(tmp_path / "c", tensors)
    seen: list[tuple[int, int]] = []
    ce.export(tmp_path / "c", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    data = (tmp_path / "out/model.safetensors").read_bytes()
    assert data == safetensors.torch.save(tensors, {"format": "pt"})
    assert seen[-1] == (len(data), len(data))
    ce.export(tmp_path / "c", tmp_path / "half", dtype="bfloat16")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert (tmp_path / "half/model.safetensors").read_bytes() == safetensors.torch.save(half, {"format": "pt"})
    ce.export(tmp_path / "c", tmp_path / "c.pt", to="torch")
    same(torch.load(tmp_path / "c.pt", weights_only=True), tensors)


MEASURE = """
import re, sys
import ckptengine as ce
ce.export(sys.argv[1], sys.argv[2], to=sys.argv[3], dtype="bfloat16")
assert "torch" not in sys.modules
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.parametrize(("to", "name"), [("safetensors", "hf"), ("torch", "c.pt"), ("dcp", "d"), ("zarr", "z")])
def test_memory_does_not_grow_with_the_size(tmp_path: Path, to: str, name: str) -> None:
    state = {"one": np.zeros((100, 1_000_000), "f4"), **{f"w{n}": np.ones(1_000_000, "f4") for n in range(50)}}
    ce.save(tmp_path / "c", state)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "c"), str(tmp_path / name), to]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 256 << 10, "kilobytes, of 600 MB of arrays"


def test_nothing_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"model.safetensors exists already"):
        ce.export(checkpoint, tmp_path, only=["model"])
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    with pytest.raises(StorageError, match="exists already"):
        ce.export(checkpoint, tmp_path, only=["model"], max_shard_size=1000)


def test_a_damaged_checkpoint_leaves_no_file(tmp_path: Path) -> None:
    ce.save(tmp_path / "c", {"a": np.arange(100_000.0), "b": np.arange(300_000.0)})
    archive = next((tmp_path / "c").glob("data-*/rank-00000.zarr.zip"))
    data = bytearray(archive.read_bytes())
    data[1_500_000] ^= 1
    archive.chmod(0o644)
    archive.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match="CRC32 differs"):
        ce.export(tmp_path / "c", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "gguf"}, ValueError, "one of safetensors, torch"),
        ({"max_shard_size": "5 bananas"}, ValueError, "max_shard_size"),
        ({"dtype": "int8"}, Exception, "dtype='int8'"),
        ({"only": ["modle"]}, LoadMismatchError, r"only=\['modle'\]: .* has nothing of that name"),
        ({"only": ["epoch"]}, LoadMismatchError, "nothing that was selected is an array"),
        ({"rename": {"model.*.weight": "*.x", "model": "1", "optimizer": "1"}}, LoadMismatchError, "called|clash"),
    ],
)
def test_wrong_options_are_named(checkpoint: Path, tmp_path: Path, options: Any, error: Any, message: str) -> None:
    if "rename" in options:
        options = {"rename": lambda name: "x"}
    with pytest.raises(error, match=message):
        ce.export(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_a_format_lacks_is_named(tmp_path: Path) -> None:
    ce.save(tmp_path / "c", {"z": np.zeros(2, "c16")})
    with pytest.raises(ForeignFormatError, match="z: safetensors has no complex128"):
        ce.export(tmp_path / "c", tmp_path / "out")
    with pytest.raises(ForeignFormatError, match="z: MindSpore's files have no complex128"):
        ce.export(tmp_path / "c", tmp_path / "c.ckpt", to="mindspore")


def test_sizes_are_read_as_hugging_face_writes_them() -> None:
    assert [shard_nbytes(size) for size in ("5GB", "1.5 MiB", "200KB", 7, "7B")] == [5 * 10**9, 1572864, 200_000, 7, 7]


def test_the_command_exports(checkpoint: Path, tmp_path: Path, call: Call) -> None:
    result = call("export", checkpoint, tmp_path / "hf", "--only", "model", "--rename", "model=")
    assert result.exit_code == 0, result.stderr
    assert "model.safetensors, 9 arrays" in result.stdout
    same(safetensors.torch.load_file(tmp_path / "hf/model.safetensors"), weights())
    result = call("export", checkpoint, tmp_path / "all")
    assert "left out, as safetensors has none: plain values: args.lr, args.name, epoch" in result.stdout
    assert call("export", checkpoint, tmp_path / "hf", "--only", "model").exit_code == 2
    assert call("export", checkpoint, tmp_path / "x", "--dtype", "int8").exit_code == 2
    assert call("export", checkpoint, tmp_path / "x", "--rename", "model").exit_code == 2
    assert call("export", tmp_path / "none", tmp_path / "x").exit_code == 2


def test_export_stays_a_function_after_an_export(tmp_path: Path) -> None:
    """The folder of the same name is imported by the first call, here in a process that has not imported it."""
    code = (
        "import ckptengine as ce; assert callable(ce.export); import ckptengine.export.run; assert callable(ce.export)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
