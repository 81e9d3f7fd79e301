"""Files that torch.save wrote, as sources; nothing in them is ever run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from buckets import Bucket
from cli_run import Call
from foreign_models import model, same

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointError, ForeignFormatError


def trained() -> dict[str, Any]:
    net = model(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": {"lr": 0.01}}


def rewritten(path: Path, change: Any) -> Path:
    """Write a file of torch.save anew with another pickle: what `change` makes of the bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    out = path.with_name(f"changed-{path.name}")
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return out


def test_a_training_checkpoint_comes_back_with_all_its_values(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "c.pt")
    loaded = ce.load(tmp_path / "c.pt", as_torch=True)
    expected = torch.load(tmp_path / "c.pt", weights_only=True)
    same(loaded, expected)
    assert list(loaded["optimizer"]["state"]) == list(range(len(expected["optimizer"]["state"])))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_values_and_tensors_of_many_kinds_come_back(tmp_path: Path, protocol: int) -> None:
    base = torch.randn(10, 6)
    state = {
        "transposed": base.t(), "cut": base[:, 1:3], "row": base[3], "channels": torch.randn(2, 3, 4, 5).to(
            memory_format=torch.channels_last), "parameter": torch.nn.Parameter(torch.ones(2)),
        "wide": torch.ones(1).expand(40), "scalar": torch.tensor(7), "empty": torch.zeros(0, 4),
        "float8": base.to(torch.float8_e4m3fn), "u16": torch.arange(3).to(torch.uint16),
        "bool": torch.tensor([True, False]), "complex": torch.randn(3, dtype=torch.complex64),
        "list": [base, 1, "x"], "tuple": (torch.ones(1), None), "deque": deque([torch.ones(2)], 4),
        "plain": [1, 2.5, (3, None), {"a": b"\xff\x00"}], "number": 1 << 70, "nothing": {}, "nan": float("inf"),
        "dtype": torch.bfloat16, "size": torch.Size([2, 3]), "device": torch.device("cpu"),
        "numpy": np.float64(3.5), "ordered": OrderedDict(a=1), "default": defaultdict(list, a=[1]),
        "set": {1, 2}, "complex number": 1 + 2j, "keys": {1: torch.ones(1), "b": 2},
    }  # fmt: skip
    torch.save(state, tmp_path / "c.pt", pickle_protocol=protocol)
    same(ce.load(tmp_path / "c.pt", as_torch=True), state)


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    net = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 4), "head": torch.nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embed"].weight
    torch.save(net.state_dict(), tmp_path / "c.pt")
    other = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 4), "head": torch.nn.Linear(4, 9, bias=False)})
    other["head"].weight = other["embed"].weight
    assert ce.load(tmp_path / "c.pt", into={"m": other}, rename={"": "m"}).complete
    same(other.state_dict(), net.state_dict())
    loaded = ce.load(tmp_path / "c.pt", as_torch=True)
    assert loaded["embed.weight"] is loaded["head.weight"]


def test_a_part_of_a_transposed_tensor_is_read_where_it_lies(tmp_path: Path) -> None:
    tensor = torch.randn(300, 200).t()
    torch.save({"w": tensor}, tmp_path / "c.pt")
    part = torch.zeros(50, 120)
    ce.load(tmp_path / "c.pt", into={"w": ce.ShardedArray(part, (200, 300), (130, 170))}, strict=False)
    same(part, tensor[130:180, 170:290])


def test_a_model_and_its_buffers_are_filled(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "c.pt")
    state = {"model": model(2), "epoch": 0}
    ce.load(tmp_path / "c.pt", into=state, only=["model", "epoch"])
    same(state["model"].state_dict(), trained()["model"])
    assert state["epoch"] == 3


def test_a_file_in_a_bucket_is_read_by_ranges(tmp_path: Path, bucket: Bucket) -> None:
    state = {"big": torch.randn(1_000_000), "step": 3}
    torch.save(state, tmp_path / "c.pt")
    bucket.fs.put_file(str(tmp_path / "c.pt"), f"{bucket.url}/c.pt")
    same(ce.load(f"{bucket.url}/c.pt", storage_options=bucket.options, as_torch=True), state)


class Touches:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path, call: Any = os.mkdir) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.call, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("call", [os.mkdir, os.system, eval, exec, open, getattr, __import__], ids=str)
def test_code_in_a_file_is_named_and_not_run(tmp_path: Path, protocol: int, call: Any) -> None:
    torch.save({"w": torch.ones(2), "x": Touches(tmp_path / "made", call)}, tmp_path / "c.pt", pickle_protocol=protocol)
    with pytest.raises(ForeignFormatError, match=rf"c.pt: x holds \w+.{call.__name__}, .* no code in it was run"):
        ce.load(tmp_path / "c.pt")
    same(ce.load(tmp_path / "c.pt", only=["w"], as_torch=True), {"w": torch.ones(2)})
    torch.save(Touches(tmp_path / "made", call), tmp_path / "whole.pt", pickle_protocol=protocol)
    with pytest.raises(ForeignFormatError, match=rf"whole.pt: holds \w+.{call.__name__}, .* no code in it was run"):
        ce.load(tmp_path / "whole.pt", only=["w"])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("value", "kind"), [(Namespace(lr=1), "argparse.Namespace"), (torch.nn.Linear(2, 2), "torch.nn.modules.linear")]
)
def test_objects_are_named(tmp_path: Path, value: Any, kind: str) -> None:
    torch.save({"x": value}, tmp_path / "c.pt")
    with pytest.raises(ForeignFormatError, match=f"holds {kind}"):
        ce.load(tmp_path / "c.pt")


class Options(dict):
    """As the hyper parameters of a trainer: a dict of a class of its own."""


def with_objects(folder: Path) -> Path:
    """Write a checkpoint that has objects beside its weights, as trainers make them."""
    more = {"args": Namespace(lr=1), "options": Options(a=torch.ones(1)), "sets": {"seen": {Options: 1}, "epoch": 3}}
    torch.save({"model": trained()["model"], **more, "list": [torch.zeros(2), Namespace()]}, folder / "c.pt")
    return folder / "c.pt"


def test_what_lies_beside_objects_that_are_not_read_is_loaded_with_only(tmp_path: Path) -> None:
    path, net = with_objects(tmp_path), model(2)
    with pytest.raises(ForeignFormatError, match=r"c.pt: args holds argparse.Namespace, .*`only=` loads the rest"):
        ce.load(path, into={"model": net})
    assert ce.load(path, into={"model": net}, only=["model"]).complete
    same(net.state_dict(), trained()["model"])
    assert ce.load(path, only=["sets.epoch"]) == {"sets": {"epoch": 3}}
    for name in ("options", "sets.seen", "list.1", "sets"):
        with pytest.raises(ForeignFormatError, match="no code in it was run"):
            ce.load(path, only=[name])


def test_without_strict_what_is_not_read_is_told_as_unexpected(tmp_path: Path) -> None:
    report = ce.load(with_objects(tmp_path), into={"model": model(2)}, strict=False)
    assert {"args", "options", "sets.seen", "list.1"} <= set(report.unexpected)


def test_the_commands_say_what_is_not_read_and_export_the_rest(tmp_path: Path, call: Call) -> None:
    path = with_objects(tmp_path)
    shown = call("show", path).stdout
    assert "Not read" in shown
    assert "argparse.Namespace" in shown
    refused = call("export", path, tmp_path / "hub")
    assert refused.exit_code == 2
    assert "args holds argparse.Namespace" in refused.stderr
    assert call("export", path, tmp_path / "hub", "--only", "model", "--rename", "model=").exit_code == 0
    same(ce.load(tmp_path / "hub", as_torch=True), trained()["model"])


@pytest.mark.parametrize(
    ("what", "message"),
    [(torch.ones(2), "given a tensor, not a dict"), ([torch.ones(2)], "given a list"), (None, "given a NoneType")],
)
def test_what_has_no_names_is_refused(tmp_path: Path, what: Any, message: str) -> None:
    torch.save(what, tmp_path / "c.pt")
    with pytest.raises(ForeignFormatError, match=message):
        ce.load(tmp_path / "c.pt")


def test_the_older_format_is_an_error_that_says_how_to_convert(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ForeignFormatError, match=r"before torch 1.6 .*torch.save\(torch.load\(path"):
        ce.load(tmp_path / "c.pt")


def test_a_compressed_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(200)}, tmp_path / "c.pt")
    with (
        zipfile.ZipFile(tmp_path / "c.pt") as archive,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in archive.infolist():
            out.writestr(entry.filename, archive.read(entry))
    with pytest.raises(ForeignFormatError, match="is compressed"):
        ce.load(tmp_path / "z.pt")


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"")
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(ForeignFormatError, match="TorchScript"):
        ce.load(tmp_path / "c.pt")


def test_a_file_that_is_cut_off_anywhere_is_an_error(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(300), "n": 1}, tmp_path / "c.pt")
    data = (tmp_path / "c.pt").read_bytes()
    for length in [0, 1, 3, *range(4, len(data), 61)]:
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(CheckpointDamagedError, match=r"cut.pt"):
            ce.load(tmp_path / "cut.pt")


def sizes(*lengths: int) -> bytes:
    """Return a pickle of a tensor whose shape is another than its storage has room for."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(*lengths)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: sizes(50), r"the storage 0 is missing, or shorter than 200 bytes"),
        (lambda data: data.replace(b"K\x02", b"K\x03", 1), "leaves its storage|shorter than"),
        (lambda data: data[:-10], "ends too early|are missing|no whole"),
        (lambda data: b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01h\x00u.", "nested without end"),
        (lambda data: b"\x80\x02i__main__\nX\n.", "instruction b'i'"),
        (lambda data: b"\x80\x02\x8b\xff\xff\xff\x7f.", "are missing"),
        (lambda data: b"\x80\x02Kr\xff\xff\xff\xff.", "."),
        (lambda data: b"\x80\x02h\x07.", "7"),
        (lambda data: b"\x80\x02.", "takes more"),
        (lambda data: b"\x80\x02}]Q.", "refers to something"),
        (lambda data: b"", "ends too early"),
    ],
)
def test_a_pickle_that_lies_is_a_clear_error(tmp_path: Path, change: Any, message: str) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "c.pt")
    with pytest.raises((CheckpointDamagedError, ForeignFormatError), match=f"changed-c.pt.*({message})"):
        ce.load(rewritten(tmp_path / "c.pt", change))


def test_a_pickle_that_refers_to_one_list_over_and_over_takes_no_more_memory_than_its_bytes(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "c.pt")
    items = b"\x80\x02}X\x01\x00\x00\x00a](cbuiltins\nlist\nq\x00](" + b"K\x01" * 50_000 + b"eq\x010"
    copies = b"(" + b"h\x00h\x01\x85R" * 20_000 + b"le" + b"s."
    with pytest.raises(CheckpointDamagedError, match="over and over|pickle"):
        ce.load(rewritten(tmp_path / "c.pt", lambda _: items + copies))


def unfolded(first: bytes, begin: bytes, end: bytes, levels: int = 40) -> bytes:
    """Return the pickle of something that holds twice what holds twice …: 2 to the 40 items in 300 bytes."""
    steps = (begin + b"h" + bytes([level - 1]) + b"h" + bytes([level - 1]) + end for level in range(1, levels))
    return b"0".join(step + b"q" + bytes([level]) for level, step in enumerate((first, *steps)))


UNREAD = b"c__main__\nX\n"
TWICE = unfolded(b"(K\x01K\x01l", b"(", b"l")
PAIRS = unfolded(b"K\x01K\x01\x86", b"", b"\x86")
MANY = b"(" + b"K\x01" * 20_000 + b"l"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TWICE, "nested without end"),
        (unfolded(b"(K\x01" + UNREAD + b"l", b"(", b"l"), "nested without end"),
        (unfolded(UNREAD + b"K\x01\x86", b"", b"\x86"), "nested without end"),
        (b"}" + PAIRS + b"K\x01s", "over and over"),
        (b"\x8f(" + PAIRS + b"\x90", "over and over"),
        (b"(" + PAIRS + b"\x91", "over and over"),
        (b"cbuiltins\nset\n(" + PAIRS + b"l\x85R", "over and over"),
        (b"ctorch\nSize\n" + TWICE + b"\x85R", "is no shape"),
        (b"ctorch\ndevice\n" + TWICE + b"K\x00\x86R", "is no device"),
        (b"cbuiltins\nint\n(" + MANY + b"q\x000(" + b"h\x00" * 20_000 + b"l" + UNREAD + b"tR", "over and over"),
        (b"((" + MANY + UNREAD + b"tq\x000" + b"h\x00Q0" * 20_000 + b"N", "over and over"),
    ],
    ids=[
        "lists",
        "lists unread",
        "tuples unread",
        "key",
        "in a set",
        "frozenset",
        "set()",
        "size",
        "device",
        "args",
        "ids",
    ],
)
def test_a_pickle_that_unfolds_without_end_is_an_error_soon(tmp_path: Path, value: bytes, message: str) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "c.pt")
    data = b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."
    with pytest.raises(CheckpointError, match=message):
        ce.load(rewritten(tmp_path / "c.pt", lambda _: data))


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a"]),
        np.array([None]),
        np.str_("a"),
        defaultdict(Namespace, a=1),
        defaultdict(Namespace, a=torch.ones(1)),
    ],
    ids=["array of texts", "array of objects", "numpy text", "factory", "factory and tensor"],
)
def test_numpy_objects_and_factories_are_left_unread_and_the_rest_is_read(tmp_path: Path, value: Any) -> None:
    torch.save({"m": {"w": torch.ones(2)}, "x": value}, tmp_path / "c.pt")
    with pytest.raises(ForeignFormatError, match=r"c.pt: x holds (numpy|argparse)\.\S+, which is not among"):
        ce.load(tmp_path / "c.pt")
    same(ce.load(tmp_path / "c.pt", only=["m"], as_torch=True), {"m": {"w": torch.ones(2)}})


def test_any_changed_bytes_of_the_pickle_give_what_torch_gives_or_an_error(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3), "v": torch.zeros(2, 2), "n": 5, "s": "text"}, tmp_path / "c.pt")
    generator = np.random.default_rng(0)
    for _ in range(300):
        place, value = generator.random(), int(generator.integers(256))

        def change(data: bytes, place: float = place, value: int = value) -> bytes:
            at = int(place * len(data))
            return data[:at] + bytes([value]) + data[at + 1 :]

        path = rewritten(tmp_path / "c.pt", change)
        try:
            loaded = ce.load(path, as_torch=True)
        except CheckpointError:
            continue
        try:
            expected = torch.load(path, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, Exception):
            continue
        same(loaded, expected)
