"""Directories as Hugging Face writes them, against files of the safetensors package and of torch's own writers."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from buckets import Bucket
from foreign_models import model, same

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointNotFoundError, ForeignFormatError, LoadMismatchError

INDEX = "model.safetensors.index.json"


def shards(folder: Path, *parts: dict[str, torch.Tensor], index: bool = True) -> dict[str, torch.Tensor]:
    """Write tensors in so many files with their index; return them all."""
    weights, names = {}, []
    for number, part in enumerate(parts, 1):
        names.append(f"model-{number:05}-of-{len(parts):05}.safetensors")
        safetensors.torch.save_file(part, folder / names[-1], {"format": "pt"})
        weights |= dict.fromkeys(part, names[-1])
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    return {name: tensor for part in parts for name, tensor in part.items()}


def halves() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    tensors = list(model(1).state_dict().items())
    return dict(tensors[:4]), dict(tensors[4:])


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    whole = shards(tmp_path, *halves())
    same(ce.load(tmp_path, as_torch=True), whole)
    same(ce.load(tmp_path / INDEX, as_torch=True), whole)
    filled = model(2)
    assert ce.load(tmp_path, into={"m": filled}, rename={"": "m"}).complete
    same(filled.state_dict(), dict(whole))


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors", "pytorch_model.bin"])
def test_a_directory_with_one_file_of_weights_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = dict(model(1).state_dict())
    if name.endswith("bin"):
        torch.save(tensors, tmp_path / name)
    else:
        safetensors.torch.save_file(tensors, tmp_path / name)
    same(ce.load(tmp_path, as_torch=True), tensors)


def test_shards_in_a_bucket_are_read(tmp_path: Path, bucket: Bucket) -> None:
    whole = shards(tmp_path, *halves())
    for file in tmp_path.iterdir():
        bucket.fs.put_file(str(file), f"{bucket.url}/org/model/{file.name}")
    same(ce.load(f"{bucket.url}/org/model", storage_options=bucket.options, as_torch=True), whole)


def test_older_shards_that_torch_save_wrote_are_read(tmp_path: Path) -> None:
    one, two = halves()
    tied = {"head": two.pop("3.weight")} if "3.weight" in two else {}
    two |= tied | {"tied": next(iter(tied.values()))}
    torch.save(one, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(two, tmp_path / "pytorch_model-00002-of-00002.bin")
    weights = dict.fromkeys(one, "pytorch_model-00001-of-00002.bin")
    weights |= dict.fromkeys(two, "pytorch_model-00002-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    same(ce.load(tmp_path, as_torch=True), one | two)


def test_what_torchs_own_writer_of_this_format_wrote_is_read(tmp_path: Path) -> None:
    tensors = dict(model(1).state_dict())
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), fqn_to_index_mapping=dict.fromkeys(tensors, 1))
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    same(ce.load(tmp_path, as_torch=True), tensors)


def test_an_index_that_names_a_missing_file_is_an_error(tmp_path: Path) -> None:
    shards(tmp_path, *halves())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"index.json: names model-00002.*missing, for 5 of 9 tensors"):
        ce.load(tmp_path)


def test_an_index_that_names_a_tensor_which_its_file_lacks_is_an_error(tmp_path: Path) -> None:
    shards(tmp_path, *halves())
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointDamagedError, match=r"'lost' is in model-00001.*, which has no tensor of that name"):
        ce.load(tmp_path)


def test_a_name_that_two_files_have_is_an_error_unless_the_index_settles_it(tmp_path: Path) -> None:
    whole = shards(tmp_path, {"a": torch.ones(3), "b": torch.ones(2)}, {"a": torch.zeros(3), "c": torch.ones(1)})
    index = json.loads((tmp_path / INDEX).read_text())
    same(ce.load(tmp_path, as_torch=True), whole)
    del index["weight_map"]["a"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointDamagedError, match="'a' is in model-00001.* and in model-00002"):
        ce.load(tmp_path)


def test_two_names_that_rename_makes_one_are_an_error(tmp_path: Path) -> None:
    shards(tmp_path, {"a.w": torch.ones(3)}, {"b.w": torch.zeros(3)})
    with pytest.raises(LoadMismatchError, match=r"'a.w' and 'b.w' would both be called 'x.w'"):
        ce.load(tmp_path, rename={"a": "x", "b": "x"})
    with pytest.raises(LoadMismatchError, match=r"two leaves of the checkpoint are called 'x.w'"):
        ce.load(tmp_path, into={"x": {"w": torch.zeros(3)}}, rename={"a": "x", "b": "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "must have a weight_map"),
        ('{"weight_map": {}}', "must have a weight_map"),
        ('{"weight_map": {"a": 1}}', "must have a weight_map"),
        ('{"weight_map": {"a": "../secret"}}', "'../secret' is no file beside the index"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "'/etc/passwd' is no file beside the index"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_an_index_that_is_none_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointDamagedError, match=message):
        ce.load(tmp_path)


def test_several_files_without_an_index_are_an_error_that_says_what_to_fetch(tmp_path: Path) -> None:
    shards(tmp_path, *halves(), index=False)
    with pytest.raises(CheckpointDamagedError, match="2 safetensors files and no index"):
        ce.load(tmp_path)


def test_two_indexes_are_an_error(tmp_path: Path) -> None:
    shards(tmp_path, *halves())
    (tmp_path / f"other.{INDEX}").write_text((tmp_path / INDEX).read_text())
    with pytest.raises(ForeignFormatError, match="has 2 indexes"):
        ce.load(tmp_path)


def test_a_directory_of_something_else_is_none(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        ce.load(tmp_path)


def test_parts_of_tensors_that_each_rank_of_dcp_wrote_are_put_together(tmp_path: Path) -> None:
    whole = torch.randn(10, 6)
    for rank, part, offset in ((1, whole[:4], [0, 0]), (2, whole[4:], [4, 0])):
        name = f"shard-{rank:05}-model-00001-of-00001"
        metadata = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": offset}})}
        safetensors.torch.save_file({"w": part.contiguous()}, tmp_path / f"{name}.safetensors", metadata)
    same(ce.load(tmp_path, as_torch=True), {"w": whole})
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointDamagedError, match="w: element .* lies in no stored box"):
        ce.load(tmp_path)


def test_a_distributed_save_of_torchs_own_writer_is_read(tmp_path: Path) -> None:
    tensors = dict(model(1).state_dict())
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    same(ce.load(tmp_path, as_torch=True), tensors)


def test_shards_of_torch_save_keep_values_and_tied_tensors_and_tell_what_is_not_read(tmp_path: Path) -> None:
    tied, other = torch.ones(2), torch.full((2,), 7.0)
    shards = {
        "one.bin": {"embed": tied, "head": tied, "epoch": 3, "quantized": Namespace()},
        "two.bin": {"embed": other, "args": Namespace()},
    }
    for name, held in shards.items():
        torch.save(held, tmp_path / name)
    weights = {"embed": "two.bin", "head": "one.bin", "quantized": "one.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    for name in ("quantized", "args"):
        with pytest.raises(ForeignFormatError, match=f"{name} holds argparse.Namespace"):
            ce.load(tmp_path, only=[name, "head"])
    loaded = ce.load(tmp_path, only=["embed", "head", "epoch"])
    assert loaded["epoch"] == 3
    assert np.array_equal(
        loaded["head"], tied
    )  # the index says whose it is, though the first of its names is another's
    assert np.array_equal(loaded["embed"], other)
