"""safetensors files as sources, against files that the safetensors package wrote."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from buckets import Bucket
from cli_run import Call
from foreign_models import model, same
from hypothesis import given
from hypothesis import strategies as st

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointError, ForeignFormatError, LoadMismatchError
from ckptengine.foreign.checkpoint import ForeignCheckpoint
from ckptengine.storage.archive_read import ArchiveRead
from ckptengine.storage.local import LocalStorage

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_comes_back_to_the_bit(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 7, dtype.itemsize), dtype=torch.uint8).view(dtype) for dtype in DTYPES
    } | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    safetensors.torch.save_file(tensors, tmp_path / "all.safetensors")
    loaded = ce.load(tmp_path / "all.safetensors", as_torch=True)
    same(loaded, safetensors.torch.load_file(tmp_path / "all.safetensors"))


def test_arrays_of_numpy_come_without_a_framework(tmp_path: Path) -> None:
    arrays = {"a": np.arange(12.0).reshape(3, 4), "b": np.arange(6).astype(ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    loaded = ce.load(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_a_model_is_filled_under_the_name_that_it_has_in_the_state(tmp_path: Path) -> None:
    safetensors.torch.save_file(model(1).state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    filled = model(2)
    report = ce.load(tmp_path / "model.safetensors", into={"net": filled}, rename={"": "net"})
    assert report.complete
    same(filled.state_dict(), model(1).state_dict())


def test_names_that_begin_with_the_states_keys_need_no_rename(tmp_path: Path) -> None:
    tensors = {f"net.{name}": tensor for name, tensor in model(1).state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    filled = model(2)
    ce.load(tmp_path / "model.safetensors", into={"net": filled})
    same(filled.state_dict(), model(1).state_dict())
    plain = {"net": {name: torch.zeros_like(tensor) for name, tensor in model(2).state_dict().items()}}
    ce.load(tmp_path / "model.safetensors", into=plain)
    same(plain["net"], dict(model(1).state_dict()))


def test_only_and_strict_are_those_of_a_load_of_ours(tmp_path: Path) -> None:
    tensors = dict(model(1).state_dict()) | {"other": torch.ones(3)}
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(LoadMismatchError, match="other"):
        ce.load(tmp_path / "m.safetensors", into={"net": model(2)}, rename={"": "net"})
    report = ce.load(tmp_path / "m.safetensors", into={"net": model(2)}, rename={"": "net"}, strict=False)
    assert report.unexpected == ("net.other",)
    assert list(ce.load(tmp_path / "m.safetensors", only=["other"])) == ["other"]


def test_a_dtype_changes_only_with_cast(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.arange(5.0)}, tmp_path / "m.safetensors")
    target = torch.zeros(5, dtype=torch.bfloat16)
    with pytest.raises(LoadMismatchError, match="bfloat16 here, float32"):
        ce.load(tmp_path / "m.safetensors", into={"w": target})
    ce.load(tmp_path / "m.safetensors", into={"w": target}, cast=True)
    same(target, torch.arange(5.0).bfloat16())


def test_a_run_begins_with_the_weights_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    safetensors.torch.save_file(model(1).state_dict(), tmp_path / "m.safetensors")
    state = {"model": model(2), "step": 5}
    with ce.Checkpointer(tmp_path / "run", every=1) as checkpointer, caplog.at_level(logging.INFO):
        assert checkpointer.restore(state) is None
        report = checkpointer.warm_start(tmp_path / "m.safetensors", state, rename={"": "model"})
        checkpointer.step(1, state)
    assert report.complete
    same(state["model"].state_dict(), model(1).state_dict())
    same(ce.load(tmp_path / "run", as_torch=True)["model"], dict(model(1).state_dict()))


def test_a_file_in_a_bucket_is_read_by_ranges(bucket: Bucket, tmp_path: Path) -> None:
    tensors = {"big": torch.randn(2_000_000), "small": torch.arange(7)}
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    bucket.fs.put_file(str(tmp_path / "m.safetensors"), f"{bucket.url}/hub/m.safetensors")
    loaded = ce.load(f"{bucket.url}/hub/m.safetensors", storage_options=bucket.options, as_torch=True)
    same(loaded, tensors)
    part = ce.load(f"{bucket.url}/hub", storage_options=bucket.options, only=["small"], as_torch=True)
    same(part, {"small": tensors["small"]})


def test_only_the_ranges_of_what_is_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{number}": torch.randn(1_000_000) for number in range(8)}
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors")
    read = []
    load = LocalStorage.load_archive

    def counted(self: LocalStorage, name: str, asked: ArchiveRead) -> int:
        read.append(int(asked.ranges[:, 1].sum()))
        return load(self, name, asked)

    monkeypatch.setattr(LocalStorage, "load_archive", counted)
    part = torch.zeros(1000)
    sharded = ce.ShardedArray(part, (1_000_000,), (500_000,))
    ce.load(tmp_path / "m.safetensors", into={"t5": sharded}, only=["t5"], strict=False)
    same(part, tensors["t5"][500_000:501_000])
    assert sum(read) <= 2 * 65536


def test_show_lists_a_file(tmp_path: Path, call: Call) -> None:
    safetensors.torch.save_file({"a.b": torch.ones(2, 3)}, tmp_path / "m.safetensors", {"format": "pt", "by": "me"})
    shown = json.loads(call("show", tmp_path / "m.safetensors", "--json").stdout)
    assert shown["format"] == "safetensors"
    assert shown["files"] == ["m.safetensors"]
    assert shown["metadata"] == {"format": "pt", "by": "me"}
    assert [(leaf["name"], leaf["dtype"], leaf["shape"]) for leaf in shown["leaves"]] == [("a.b", "float32", [2, 3])]
    text = call("show", tmp_path / "m.safetensors").stdout
    assert "safetensors, without checksums" in text


F32 = entry("F32", [2], 0, 8)

LIES = {
    "overlap": ({"a": F32, "b": entry("F32", [2], 4, 12)}, 12, "'a' and 'b' overlap, at byte"),
    "hole": ({"a": F32, "b": entry("F32", [2], 12, 20)}, 20, "leave a hole"),
    "beyond the end": ({"a": F32, "b": entry("F32", [2], 8, 16)}, 12, "'b' ends at byte .* it is cut off"),
    "bytes that are nobody's": ({"a": F32}, 20, "the tensors end at byte"),
    "a shape of other bytes": ({"a": entry("F32", [3], 0, 8)}, 8, r"'a' has 8 bytes .* of F32 takes 12"),
    "an end before the start": ({"a": entry("F32", [2], 8, 0)}, 8, "'a' has -8 bytes"),
    "a negative length": ({"a": entry("F32", [-2], 0, 8)}, 8, "'a' has the shape"),
    "a length that is no integer": ({"a": entry("F32", [2.0], 0, 8)}, 8, "'a' has the shape"),
    "a length that is true": ({"a": entry("U8", [True], 0, 1)}, 1, "'a' has the shape"),
    "lengths whose product overflows": ({"a": entry("U8", [2**40, 2**40, 0], 0, 0)}, 0, "larger than any tensor"),
    "too many dimensions": ({"a": entry("U8", [1] * 40, 0, 1)}, 1, "40 dimensions"),
    "an unknown dtype": ({"a": entry("F6_E2M3", [4], 0, 3)}, 3, "dtype 'F6_E2M3', which is not read"),
    "a key too many": ({"a": F32 | {"more": 1}}, 8, "'a' is not described by"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' is not described by"),
    "metadata of numbers": ({"a": F32, "__metadata__": {"x": 1}}, 8, "__metadata__"),
    "no object": ([], 0, "does not begin with"),
    "no JSON": (b'{"a": ', 8, "not the JSON"),
    "a name twice": (b'{"a": 1, "a": 2}', 8, "the name 'a' comes twice"),
    "nested without end": (b'{"a":' + b"[" * 100_000, 0, "not the JSON"),
    "no UTF-8": (b'{"\xff": 1}', 0, "not the JSON"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_a_clear_error(tmp_path: Path, lie: str) -> None:
    header, nbytes, message = LIES[lie]
    path = raw(tmp_path / "lie.safetensors", header, bytes(nbytes))
    with pytest.raises((CheckpointDamagedError, ForeignFormatError), match=f"lie.safetensors.*{message}"):
        ce.load(path)


@pytest.mark.parametrize("length", [9, 1 << 20, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_huge_header_is_refused_before_anything_is_allocated(tmp_path: Path, length: int) -> None:
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointDamagedError, match=rf"is said to have {length:,} bytes"):
        ce.load(tmp_path / "huge.safetensors")


def test_a_file_that_is_cut_off_anywhere_is_an_error(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(50), "b": torch.ones(7)}, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointDamagedError, match=r"cut.safetensors"):
            ce.load(tmp_path / "cut.safetensors", into={"a": torch.zeros(50), "b": torch.zeros(7)})


@given(data=st.data())
def test_a_file_with_any_flipped_header_byte_is_read_as_the_package_reads_it_or_refused(data: st.DataObject) -> None:
    import tempfile

    whole = safetensors.torch.save({"a": torch.arange(4.0), "bc": torch.ones(2, 3)})
    stop = 8 + struct.unpack("<Q", whole[:8])[0]
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, stop - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.safetensors")
        path.write_bytes(bytes(changed))
        try:
            loaded = ce.load(path, as_torch=True)
        except CheckpointError:
            return
        same(loaded, safetensors.torch.load(bytes(changed)))


def test_a_file_that_is_changed_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.torch.save_file({"a": torch.ones(100_000)}, tmp_path / "m.safetensors")
    archive = ForeignCheckpoint.archive

    def shrunk(self: ForeignCheckpoint, number: int) -> Any:
        (tmp_path / "m.safetensors").write_bytes(b"x" * 1000)
        return archive(self, number)

    monkeypatch.setattr(ForeignCheckpoint, "archive", shrunk)
    with pytest.raises(CheckpointDamagedError, match="bytes when its header was read, it has 1000 bytes now"):
        ce.load(tmp_path / "m.safetensors")
