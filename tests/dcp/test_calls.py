"""The calls of `ckptengine.dcp` in one process: what they take, give back, fill and refuse."""

from __future__ import annotations

import inspect
import logging
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torchs
from buckets import Bucket
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.planner import SavePlanner

import ckptengine as ce
import ckptengine.dcp as dcp
from ckptengine.errors import CheckpointNotFoundError, StorageError


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Torch warns that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.1))
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {
        "model": net.state_dict(),
        "optim": optimizer.state_dict(),
        "mixed": [torch.arange(3), 5, {"a": "x"}],
        "list": [1, 2, 3],
        "pair": (torch.arange(2), "y"),
        "nothing": None,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "half": torch.arange(4, dtype=torch.bfloat16),
    }


def zeroed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: zeroed(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, (torch.Tensor, dict)) for item in value):
        return [zeroed(item) for item in value]
    return "another"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", ["save", "load", "async_save"])
def test_each_call_takes_what_torchs_takes(name: str) -> None:
    theirs = inspect.signature(inspect.unwrap(getattr(torchs, name))).parameters
    ours = inspect.signature(getattr(dcp, name)).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_what_is_saved_comes_back_in_place(tmp_path: Path) -> None:
    metadata = dcp.save(state(), checkpoint_id=tmp_path)
    assert isinstance(metadata, torchs.Metadata)
    target = zeroed(state())
    weight = target["model"]["weight"]
    dcp.load(target, checkpoint_id=tmp_path)
    assert same(target, state())
    assert target["model"]["weight"] is weight


def test_what_the_reader_tells_is_what_the_writer_was_told(tmp_path: Path) -> None:
    written = dcp.save(state(), checkpoint_id=tmp_path)
    read = dcp.Reader(tmp_path).read_metadata()
    assert read.planner_data == written.planner_data
    assert set(read.state_dict_metadata) == set(written.state_dict_metadata)
    for name, told in written.state_dict_metadata.items():
        found = read.state_dict_metadata[name]
        assert type(found) is type(told), name
        if isinstance(told, torchs.TensorStorageMetadata):
            assert (found.size, found.properties.dtype, found.chunks) == (told.size, told.properties.dtype, told.chunks)


def test_an_asynchronous_save_has_the_state_of_the_call(tmp_path: Path) -> None:
    saved = state()
    future = dcp.async_save(saved, checkpoint_id=tmp_path)
    response = getattr(future, "staging_completion", None)
    if response is not None:
        response.result()
    saved["model"]["weight"].zero_()
    getattr(future, "upload_completion", future).result()
    target = zeroed(state())
    dcp.load(target, checkpoint_id=tmp_path)
    assert same(target, state())


def test_each_of_several_asynchronous_saves_has_the_state_of_its_call(tmp_path: Path) -> None:
    tensor, futures = torch.zeros(1 << 20), []
    for number in range(4):
        tensor.fill_(number)
        futures.append(dcp.async_save({"x": tensor}, checkpoint_id=tmp_path / str(number)))
    tensor.fill_(9)
    for number, future in enumerate(futures):
        getattr(future, "upload_completion", future).result()
        assert set(ce.load(tmp_path / str(number))["x"].tolist()) == {number}


def test_an_asynchronous_save_that_fails_leaves_nothing_and_the_next_one_is_made(tmp_path: Path) -> None:
    future = dcp.async_save({"x": torch.ones(2), "odd": {"y": object()}}, checkpoint_id=tmp_path)
    with pytest.raises(torchs.CheckpointException, match="odd.y: object can't be saved"):
        getattr(future, "upload_completion", future).result()
    future = dcp.async_save({"x": torch.ones(2)}, checkpoint_id=tmp_path)
    getattr(future, "upload_completion", future).result()
    assert len(list(tmp_path.iterdir())) == 2


def test_writer_and_reader_plug_into_torchs_own_calls(tmp_path: Path) -> None:
    torchs.save(state(), storage_writer=dcp.Writer(tmp_path))
    target = zeroed(state())
    torchs.load(target, storage_reader=dcp.Reader(tmp_path))
    assert same(target, state())


def test_torchs_own_tools_read_it_through_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dcp.save({"model": state()["model"], "n": [1, 2]}, checkpoint_id=tmp_path / "c")
    monkeypatch.setattr("torch.distributed.checkpoint.format_utils.FileSystemReader", dcp.Reader)
    dcp_to_torch_save(tmp_path / "c", tmp_path / "c.pt")
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    assert same(loaded["model"], dict(sorted(state()["model"].items())))
    assert loaded["n"] == [1, 2]


def test_a_run_of_the_engine_is_read_at_a_step(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": torch.full((3,), step)})
    for step, reader in ((2, dcp.Reader(tmp_path)), (1, dcp.Reader(tmp_path, step=1))):
        target = {"x": torch.zeros(3, dtype=torch.int64)}
        dcp.load(target, storage_reader=reader)
        assert target["x"].tolist() == [step] * 3


def test_what_torchs_own_save_has_written_is_loaded(tmp_path: Path) -> None:
    saved = {name: value for name, value in state().items() if name != "pair"}
    torchs.save(saved, checkpoint_id=tmp_path)
    target = zeroed(saved)
    dcp.load(target, checkpoint_id=tmp_path)
    assert same(target, saved)


def test_a_key_that_is_not_there_is_an_error_unless_partial_loads_are_allowed(tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path)
    with pytest.raises(torchs.CheckpointException, match="Missing key in checkpoint state_dict: y"):
        dcp.load({"y": torch.zeros(2)}, checkpoint_id=tmp_path)
    target = {"x": torch.zeros(2), "y": torch.zeros(2)}
    dcp.load(target, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert target["x"].tolist() == [1, 1]
    assert target["y"].tolist() == [0, 0]


def test_another_dtype_is_converted_as_torch_does_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dcp.save({"x": torch.tensor([1.0, 2.0])}, checkpoint_id=tmp_path)
    target = {"x": torch.zeros(2, dtype=torch.float64)}
    with caplog.at_level(logging.WARNING, "ckptengine"):
        dcp.load(target, checkpoint_id=tmp_path)
    assert target["x"].tolist() == [1, 2]
    assert "x (torch.float32 to torch.float64)" in caplog.text


def test_one_memory_under_two_names_is_never_filled_with_two_different_tensors(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(4), "b": torch.ones(4), "c": torch.zeros(4)}, checkpoint_id=tmp_path)
    one = torch.zeros(4)
    dcp.load({"a": one, "b": one}, checkpoint_id=tmp_path)
    assert one.tolist() == [1] * 4
    with pytest.raises(torchs.CheckpointException, match="shares memory with another tensor"):
        dcp.load({"a": one, "c": one[:]}, checkpoint_id=tmp_path)


def test_what_is_neither_tensor_nor_plain_value_is_refused_by_name(tmp_path: Path) -> None:
    for value, words in (
        (object(), "odd: object can't be saved"),
        (torch.nn.Linear(2, 2), "odd: module is neither a tensor nor a plain value"),
        ([torch.Generator()], "odd"),
        (ce.PerRank(torch.ones(1)), "odd: PerRank is neither"),
    ):
        with pytest.raises(torchs.CheckpointException, match=words):
            dcp.save({"good": torch.ones(2), "odd": value if not isinstance(value, torch.nn.Module) else (value,)},
                     checkpoint_id=tmp_path / "c")  # fmt: skip
        assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir()), words


def test_a_checkpoint_is_replaced_or_kept_as_it_is_told(tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path)
    dcp.save({"x": torch.zeros(2)}, checkpoint_id=tmp_path)
    assert ce.load(tmp_path)["x"].tolist() == [0, 0]
    with pytest.raises(torchs.CheckpointException, match="overwrite=True"):
        dcp.save({"x": torch.ones(2)}, storage_writer=dcp.Writer(tmp_path, overwrite=False))
    assert ce.load(tmp_path)["x"].tolist() == [0, 0]


def test_a_checkpoint_of_torchs_own_format_or_a_run_is_not_written_over(tmp_path: Path) -> None:
    torchs.save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "torchs")
    with pytest.raises(torchs.CheckpointException, match="holds a checkpoint of torch's own format"):
        dcp.save({"x": torch.zeros(2)}, checkpoint_id=tmp_path / "torchs")
    with ce.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"x": torch.ones(2)})
    with pytest.raises(torchs.CheckpointException, match="which a single checkpoint must not replace"):
        dcp.save({"x": torch.zeros(2)}, checkpoint_id=tmp_path / "run")


def test_damage_is_told_with_the_file(tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(300_000)}, checkpoint_id=tmp_path)
    archive = next(tmp_path.glob("data-*/*rank*.zip"))
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(bytes(data))
    with pytest.raises(torchs.CheckpointException, match=archive.name):
        dcp.load({"x": torch.zeros(300_000)}, checkpoint_id=tmp_path)


def test_a_writer_travels_to_another_process(tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(dcp.Writer(tmp_path, metadata={"a": 1}, timeout=9)))
    torchs.save({"x": torch.ones(2)}, storage_writer=writer)
    assert ce.load(tmp_path)["x"].tolist() == [1, 1]


def test_all_other_names_are_torchs() -> None:
    assert dcp.DefaultSavePlanner is torchs.DefaultSavePlanner
    assert dcp.CheckpointException is torchs.CheckpointException
    with pytest.raises(AttributeError, match="neither ckptengine.dcp nor torch.distributed.checkpoint has 'nothing'"):
        dcp.nothing  # noqa: B018


def test_without_a_place_the_error_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="checkpoint_id"):
        dcp.save({"x": torch.ones(2)})


def test_numpy_arrays_come_back_as_numpy_arrays_wherever_they_lie(tmp_path: Path) -> None:
    name, keys, *rest = np.random.RandomState(3).get_state()
    dcp.save({"array": np.arange(3), "random": (name, keys, *rest), "list": [np.ones(2)]}, checkpoint_id=tmp_path)
    target: dict[str, Any] = {"array": np.zeros(3), "random": None, "list": None}
    dcp.load(target, checkpoint_id=tmp_path)
    assert type(target["array"]) is type(target["list"][0]) is type(target["random"][1]) is np.ndarray
    assert target["array"].tolist() == [0, 1, 2]
    assert target["list"][0].tolist() == [1, 1]
    again = np.random.RandomState(0)
    again.set_state(target["random"])
    assert again.rand() == np.random.RandomState(3).rand()


def test_what_a_planner_has_not_flattened_is_loaded_unflattened(tmp_path: Path) -> None:
    saved = {"model": {"x": torch.ones(2), "n": {"m": 3}, "e": {}}, "none": {}, "y": torch.ones(1)}
    dcp.save(saved, checkpoint_id=tmp_path, planner=DefaultSavePlanner(False, False))
    target: dict[str, Any] = {"model": None, "none": None, "y": torch.zeros(1)}
    dcp.load(target, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(False, False))
    assert torch.equal(target["model"].pop("x"), torch.ones(2))
    assert target == {"model": {"n": {"m": 3}, "e": {}}, "none": {}, "y": torch.ones(1)}


def test_two_names_of_one_memory_are_told_where_their_tensors_are_converted(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(4), "b": torch.ones(4), "c": torch.zeros(4)}, checkpoint_id=tmp_path)
    one = torch.zeros(4, dtype=torch.float64)
    dcp.load({"a": one, "b": one}, checkpoint_id=tmp_path)
    assert one.tolist() == [1] * 4
    with pytest.raises(torchs.CheckpointException, match="c: shares memory with another tensor"):
        dcp.load({"a": one, "c": one}, checkpoint_id=tmp_path)


def test_asynchronous_saves_of_several_threads_never_take_one_another_s_memory(tmp_path: Path) -> None:
    def saves(of: int) -> None:
        for number in range(5):
            tensor = torch.full((1 << 18,), float(10 * of + number))
            future = dcp.async_save({"x": tensor}, checkpoint_id=tmp_path / str(of))
            getattr(future, "upload_completion", future).result()
            assert set(ce.load(tmp_path / str(of))["x"].tolist()) == {10 * of + number}

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(saves, range(4)))


def test_a_tensor_that_is_resized_between_asynchronous_saves_is_saved(tmp_path: Path) -> None:
    tensor = torch.zeros(0)
    for number in range(1, 4):
        tensor.resize_(5 * number).fill_(number)
        future = dcp.async_save({"x": tensor}, checkpoint_id=tmp_path)
        getattr(future, "upload_completion", future).result()
        assert ce.load(tmp_path)["x"].tolist() == [number] * 5 * number


def test_a_save_without_collectives_never_lies_below_a_checkpoint_that_loads_would_take(tmp_path: Path) -> None:
    dcp.save({"n": 1}, checkpoint_id=tmp_path)
    with pytest.raises(StorageError, match="saved with collectives, which a load would take"):
        dcp.save({"n": 2}, checkpoint_id=tmp_path, use_collectives=False, no_dist=True)
    target = {"n": 0}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target == {"n": 1}


def test_a_damaged_checkpoint_is_not_passed_over_for_one_saved_without_collectives(tmp_path: Path) -> None:
    dcp.save({"n": 1}, checkpoint_id=tmp_path, use_collectives=False, no_dist=True)
    dcp.save({"n": 2}, checkpoint_id=tmp_path)
    manifest = next(tmp_path.glob("manifest-*.json"))
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(torchs.CheckpointException) as error:
        dcp.load({"n": 0}, checkpoint_id=tmp_path)
    assert manifest.name in f"{error.value} {error.value.__cause__}"


def test_a_writer_that_is_given_to_two_saves_at_once_never_mixes_them(tmp_path: Path) -> None:
    writer = dcp.Writer(tmp_path / "first")

    class Interrupted(DefaultSavePlanner):
        """Another save begins with the same writer when this one has written its data."""

        def finish_plan(self, new_plan: Any) -> Any:
            torchs.save({"n": 2}, checkpoint_id=tmp_path / "second", storage_writer=writer)
            return super().finish_plan(new_plan)

    with pytest.raises(torchs.CheckpointException):
        torchs.save({"n": 1}, storage_writer=writer, planner=Interrupted())
    assert ce.load(tmp_path / "second")["n"] == 2
    with pytest.raises(CheckpointNotFoundError):
        ce.load(tmp_path / "first")


FORKS = """
import atexit, gc, os, sys
import torch
import ckptengine.dcp as dcp


class Forks(dcp.Writer):
    def finish(self, metadata, results):
        child = os.fork()
        if child == 0:
            gc.collect()
            atexit._run_exitfuncs()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        super().finish(metadata, results)


dcp.save({"x": torch.ones(2)}, storage_writer=Forks(sys.argv[1]))
"""


def test_a_process_forked_during_a_save_leaves_the_save_alone(tmp_path: Path) -> None:
    # In a process of its own: the exit functions of all that the other tests have imported can't run in a fork.
    done = subprocess.run(
        [sys.executable, "-c", FORKS, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ce.load(tmp_path)["x"].tolist() == [1, 1]


def test_a_writer_of_ones_own_class_travels_as_what_it_is(tmp_path: Path) -> None:
    writer = Numbered(tmp_path, 7)
    again = pickle.loads(pickle.dumps(writer))
    assert type(again) is Numbered
    assert (again.number, again.checkpoint_id) == (7, tmp_path)


class Numbered(dcp.Writer):
    def __init__(self, path: Path, number: int) -> None:
        super().__init__(path)
        self.number = number


def test_an_object_store_takes_the_same_calls(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for kept in ("save_plan", "all_plans", "global_plan", "metadata", "final_save_plan"):
        monkeypatch.setattr(SavePlanner, f"_cached_{kept}", {})
    url = f"{bucket.url}/c"
    for number in range(3):
        saved = {"x": torch.full((1 << 18,), float(number)), "n": number}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(saved, storage_writer=dcp.Writer(url, storage_options=bucket.options), planner=planner)
        target = {"x": torch.zeros(1 << 18), "n": None}
        dcp.load(target, storage_reader=dcp.Reader(url, storage_options=bucket.options))
        assert same(target, saved)
    with pytest.raises(torchs.CheckpointException, match="object can't be saved"):
        dcp.save({"odd": (object(),)}, storage_writer=dcp.Writer(url, storage_options=bucket.options))
    assert len({name.split("/")[1] for name in bucket.names()}) == 2
    assert not bucket.uploads()
