"""What users get wrong: each is told by name, at once, and harms nothing."""

import datetime
import re
import socket
from collections import deque, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import committed_steps, same, state_at

import ckptengine as ce
from ckptengine.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    LoadMismatchError,
    SaveFailedError,
    StateError,
    StorageError,
)

Pair = namedtuple("Pair", "a b")

UNSAVABLE = [
    ({1, object()}, "object"),
    (frozenset({range(3)}), "range"),
    (lambda: None, "function"),
    (object(), "object"),
    (Pair(1, socket.socket), "type"),
    (deque([bytearray(b"x")]), "bytearray"),
    (bytearray(b"x"), "bytearray"),
    (datetime.date(2025, 1, 1), "date"),
    ({Path: 1}, "type"),
    (np.array([object()]), "object"),
    (np.array(["text"]), "U4"),
    (range(3), "range"),
    (socket.socket, "type"),
    (1j * np.longdouble(1), "clongdouble|complex256"),
]


@pytest.mark.parametrize(
    ("value", "kind"), UNSAVABLE, ids=[f"{type(value).__name__}-{kind}" for value, kind in UNSAVABLE]
)
@pytest.mark.parametrize("first", [True, False])
def test_what_cannot_be_saved_is_named_with_path_and_type(
    tmp_path: Path, value: Any, kind: str, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with ce.Checkpointer(tmp_path / "run", every=1) as checkpointer:
        if not first:
            checkpointer.step(1, {"model": {"deep": [1, 2]}})
        state = {"model": {"deep": [1, value]}}
        if first:
            with pytest.raises(StateError) as caught:
                checkpointer.step(2, state)
            said = str(caught.value)
        else:  # in mid-run it is a failed save, and training goes on
            assert checkpointer.step(2, state) is None
            said = caplog.text
        assert "model.deep.1" in said
        assert re.search(kind, said), said
        checkpointer.step(3, {"model": {"deep": [1, 3]}})
    assert ce.load(tmp_path / "run") == {"model": {"deep": [1, 3]}}


@pytest.mark.parametrize(
    "state", [None, 5, [np.zeros(3)], np.zeros(3), "model", {("a", "b"): 1}, {1.5: 2}, {None: 3}], ids=repr
)
def test_a_state_that_is_no_dict_of_plain_keys_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(StateError):
        ce.save(tmp_path / "point", state)
    with pytest.raises(CheckpointNotFoundError):
        ce.load(tmp_path / "point")


def test_a_state_inside_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": np.zeros(3)}
    state["again"] = state
    with pytest.raises(StateError, match="again"):
        ce.save(tmp_path / "point", state)
    values: list[Any] = [1]
    values.append(values)
    with pytest.raises(StateError, match="values"):
        ce.save(tmp_path / "point", {"values": values})


def test_an_object_whose_state_dict_fails_says_so_and_the_next_save_succeeds(tmp_path: Path) -> None:
    class Broken:
        broken = True

        def state_dict(self) -> dict[str, int]:
            if self.broken:
                raise RuntimeError("the loader is closed")
            return {"n": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    broken = Broken()
    said = r"data: state_dict\(\) of .*\.Broken raised RuntimeError: the loader is closed"
    with pytest.raises(StateError, match=said) as caught:
        ce.save(tmp_path, {"data": broken})
    assert isinstance(caught.value.__cause__, RuntimeError)
    broken.broken = False
    ce.save(tmp_path, {"data": broken})
    assert ce.load(tmp_path) == {"data": {"n": 1}}


def test_everything_that_does_not_fit_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    saved = {"a": np.ones((2, 3)), "b": np.ones(4), "c": np.ones(5), "d": 1, "old": np.ones(2)}
    ce.save(tmp_path, {**saved, "same": 7, "fits": np.ones(6)})
    state = {
        "a": np.zeros((3, 2)), "b": np.zeros(4, np.float32), "c": 5, "d": np.zeros(1), "new": np.zeros(2),
        "plain": 3, "same": 0, "fits": np.zeros(6),
    }  # fmt: skip
    with pytest.raises(LoadMismatchError) as caught:
        ce.load(tmp_path, into=state)
    text = str(caught.value)
    assert str(tmp_path) in text
    for line in (
        r"a: shape \(3, 2\) here, \(2, 3\) in the checkpoint",
        r"b: dtype float32 here, float64 in the checkpoint",
        r"c: int here, a tensor of shape \(5,\)",
        r"d: a tensor here, .*plain value",
        r"missing in the checkpoint:\n  new\n  plain\n",
        r"unexpected in the checkpoint:\n  old\n",
    ):
        assert re.search(line, text), (line, text)
    assert not state["a"].any()
    assert not state["fits"].any()
    assert state["same"] == 0
    report = ce.load(tmp_path, into=state, strict=False)
    assert (report.missing, report.unexpected, len(report.mismatched)) == (("new", "plain"), ("old",), 4)
    assert state["same"] == 7
    assert state["fits"].all()


@pytest.mark.parametrize("load", [ce.load, lambda path: ce.load(path, into={"a": 1})])
def test_where_no_checkpoint_is_the_message_says_where_it_looked(tmp_path: Path, load: Any) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointNotFoundError, match=f"{place}: no committed checkpoint"):
            load(place)
    (tmp_path / "step-00000005" / "data-0123456789ab-1").mkdir(parents=True)
    with pytest.raises(CheckpointNotFoundError, match=f"{tmp_path}: no committed checkpoint"):
        load(tmp_path)


def test_a_step_that_was_never_committed_is_told_with_those_that_were(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore({"a": 0}) is None
        checkpointer.save(3, {"a": 3})
        checkpointer.save(7, {"a": 7})
        with pytest.raises(CheckpointNotFoundError, match="step 5; there are steps 3, 7"):
            checkpointer.restore({"a": 0}, step=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": -5}, "every=-5"),
        ({"every": True}, "every=True"),
        ({"every": 1.5}, "every=1.5"),
        ({"every": "soon"}, "every='soon'"),
        ({"every": "0s"}, "every='0s'"),
        ({"every": "10 days"}, "every='10 days'"),
        ({"keep_last": 0}, "keep_last=0"),
        ({"keep_last": -1}, "keep_last=-1"),
        ({"keep_every": 0}, "keep_every=0"),
        ({"max_failures": 0}, "max_failures=0"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"when_busy": "queue"}, "when_busy='queue'"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ce.Checkpointer(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


METADATA = [{"x": {1}}, {"x": np.int64(3)}, {"x": float("nan")}, {1: "x"}, {"x": [object()]}, {"x": 1 << 70}]


@pytest.mark.parametrize("metadata", METADATA, ids=["set", "np.int64", "nan", "int key", "object", "2**70"])
def test_metadata_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(StateError, match="metadata"):
        ce.save(tmp_path / "point", {"a": 1}, metadata=metadata)
    with pytest.raises(StateError, match="metadata"):
        ce.Checkpointer(tmp_path / "run", metadata=metadata)
    assert not list(tmp_path.glob("*/data-*"))


def test_steps_are_whole_numbers_from_zero_on(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="step -1"):
            checkpointer.save(-1, {"a": 1})
        with pytest.raises(TypeError):
            checkpointer.save(1.5, {"a": 1})  # type: ignore[arg-type]
        checkpointer.save(0, {"a": 0})
        checkpointer.save(np.int64(3), {"a": 1})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="step 2: .* has saved step 3 already"):
            checkpointer.save(2, {"a": 2})
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000000", "step-00000003"]


def test_a_failed_save_is_told_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from faulty_disk import install

    disk = install(monkeypatch)
    checkpointer = ce.Checkpointer(tmp_path / "run", every=1, on_error="raise")
    checkpointer.step(1, state_at(1, 100))
    checkpointer.wait()
    disk.fail_always("write_memory")
    failing = checkpointer.step(2, state_at(2, 100))
    assert failing is not None
    assert failing.durable.wait(60)
    disk.fail_always()  # before the call that raises: it begins to save its own step
    with pytest.raises(SaveFailedError, match=r"step-00000002 was not saved \(1 failure"):
        checkpointer.step(3, state_at(3, 100))
    assert checkpointer.step(3, state_at(3, 100)) is not None
    checkpointer.close()
    assert committed_steps(tmp_path / "run") == [1, 3]


def test_a_step_whose_save_failed_may_be_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from faulty_disk import install

    disk = install(monkeypatch)
    with ce.Checkpointer(tmp_path / "run") as checkpointer:
        disk.fail_always("write_memory")
        first = checkpointer.save(1, state_at(1, 100))
        with pytest.raises(CheckpointError):
            first.durable.result()
        disk.fail_always()
        second = checkpointer.save(1, state_at(1, 100))
        assert second is not first
        second.durable.result()
        assert checkpointer.save(1, state_at(1, 100)) is second
    assert committed_steps(tmp_path / "run") == [1]


def test_closing_twice_is_fine_and_saving_afterwards_is_an_error(tmp_path: Path) -> None:
    checkpointer = ce.Checkpointer(tmp_path / "run")
    checkpointer.save(1, {"a": np.ones(3)})
    checkpointer.close()
    # A file that gets the number of the closed arena must not be touched.
    with (tmp_path / "innocent").open("w+b") as innocent:
        innocent.write(b"mine")
        innocent.flush()
        checkpointer.close()
        with pytest.raises(CheckpointError, match="this Checkpointer is closed"):
            checkpointer.save(2, {"a": np.ones(3)})
        checkpointer._saver.settle(60)
        innocent.seek(0)
        assert innocent.read() == b"mine"
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-00000001"]


def test_a_single_checkpoint_never_replaces_those_of_a_run(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path / "run") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_at(step, 10))
    for place in (tmp_path / "run", tmp_path / "run" / "step-00000002"):
        with pytest.raises(StorageError, match=f"{place} holds step 2 of a run|{place} holds step 1 of a run"):
            ce.save(place, state_at(9, 10))
    assert committed_steps(tmp_path / "run") == [1, 2]


def test_a_single_checkpoint_is_no_run(tmp_path: Path) -> None:
    ce.save(tmp_path / "point", state_at(1, 10))
    with pytest.raises(StorageError, match=f"{tmp_path}/point is a single checkpoint"):
        ce.Checkpointer(tmp_path / "point")
    assert same(ce.load(tmp_path / "point"), state_at(1, 10))


def test_a_damaged_single_checkpoint_may_be_replaced(tmp_path: Path) -> None:
    ce.save(tmp_path, state_at(1, 10))
    (tmp_path / "manifest-0001.json").write_text("{}")
    with pytest.raises(CheckpointDamagedError):
        ce.load(tmp_path)
    ce.save(tmp_path, state_at(2, 10))
    assert same(ce.load(tmp_path), state_at(2, 10))


def test_only_takes_one_name_too_and_refuses_unknown_ones(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": {"a": np.ones(3)}, "step": 1})
        state = {"model": {"a": np.zeros(3)}, "step": 0}
        assert checkpointer.restore(state, only="model") == 1
    assert state["model"]["a"].all()
    assert state["step"] == 0
    with pytest.raises(LoadMismatchError, match="modle"):
        ce.load(tmp_path, only=["modle"])
    with pytest.raises(LoadMismatchError, match="modle"):
        ce.load(tmp_path, into=state, only=["modle"])


def test_one_name_of_a_tied_array_can_be_loaded_alone(tmp_path: Path) -> None:
    tied = np.arange(5.0)
    ce.save(tmp_path, {"model": {"embedding": tied, "head": tied}, "step": 1})
    loaded = ce.load(tmp_path, only=["model.head"])
    assert same(loaded, {"model": {"head": np.arange(5.0)}})


@pytest.mark.parametrize("place", ["", "s3://bucket/run", "gs://bucket", "file://other-host/run", "a\0b"])
def test_a_place_that_this_version_cannot_use_is_refused(place: str) -> None:
    for call in (ce.load, ce.Checkpointer, lambda where: ce.save(where, {"a": 1})):
        with pytest.raises(StorageError):
            call(place)
