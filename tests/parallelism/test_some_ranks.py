"""What only some ranks have is part of the one checkpoint, and comes back to whoever has a place for it."""

import json
import logging
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from stages import StageJob
from torch import nn

import ckptengine as ce
import ckptengine.dcp
from ckptengine import inspect
from ckptengine.differences import diff
from ckptengine.errors import LoadMismatchError, ReplicaMismatchError, SaveFailedError
from ckptengine.load.choose import newest_checkpoint
from ckptengine.storage.open import open_storage


def manifest(run: Path):
    return newest_checkpoint(open_storage(run)).manifest


def part(rank: int) -> dict:
    """The state of one of three ranks: something of its own, something of two, something of all."""
    state = {"all": 5, "words": {"all": "w", f"only{rank}": [rank, (1.5, None)]}, "deep": {f"stage{rank}": {"n": rank}}}
    if rank:
        tied = torch.full((3,), 7.0)
        state |= {"two": {"queue": deque([torch.tensor([1.0]), 2], maxlen=4), "a": tied, "b": tied}}
    if rank == 2:
        state |= {"table": np.arange(6.0), "norm": nn.BatchNorm1d(2), "pair": (np.ones(2), "x")}
    return state


def empty(state):
    """The same state with nothing in it."""
    if isinstance(state, dict):
        return {key: empty(value) for key, value in state.items()}
    if isinstance(state, deque):
        return deque([torch.zeros(1), 0], maxlen=4)
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, np.ndarray):
        return np.zeros_like(state)
    if isinstance(state, nn.Module):
        return nn.BatchNorm1d(2)
    return (np.zeros(2), "x") if isinstance(state, tuple) else 0


@pytest.fixture
def saved(tmp_path):
    with StageJob(tmp_path / "run", 3) as job:
        job.save(map(part, range(3)))
        job.save(map(part, range(3)))
    return tmp_path / "run"


def test_values_containers_and_tied_tensors_of_some_ranks_come_back_to_them(saved):
    found = [empty(part(rank)) for rank in range(3)]
    with StageJob(saved, 3) as job:
        job.load(found)
    for rank, state in enumerate(found):
        assert state["all"] == 5
        assert state["words"] == part(rank)["words"]
        assert state["deep"] == part(rank)["deep"]
        if rank:
            queue = state["two"]["queue"]
            assert (type(queue), queue.maxlen, queue[0].tolist(), queue[1]) == (deque, 4, [1.0], 2)
            assert state["two"]["a"].tolist() == state["two"]["b"].tolist() == [7.0] * 3
    assert found[2]["table"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found[2]["pair"][0].tolist() == [1, 1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_number_of_ranks_takes_all_of_it_among_them(saved, ranks):
    whole = empty(part(0)) | empty(part(2))
    whole["words"] = {"all": 0, "only0": 0, "only1": 0, "only2": 0}
    whole["deep"] = {f"stage{rank}": {"n": 0} for rank in range(3)}
    found = [whole] if ranks == 1 else [{"words": whole.pop("words"), "all": 0}, whole]
    with StageJob(saved, ranks) as job:
        job.load(found)
    assert found[0]["words"] == {"all": "w", **{f"only{rank}": [rank, (1.5, None)] for rank in range(3)}}
    assert found[-1]["deep"] == {f"stage{rank}": {"n": rank} for rank in range(3)}
    assert found[-1]["table"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_load_without_a_state_and_the_command_see_the_union(saved):
    state = ce.load(saved)
    assert list(state["words"]) == ["all", "only0", "only1", "only2"]
    assert state["words"]["only2"] == [2, (1.5, None)]
    assert list(state["deep"]) == ["stage0", "stage1", "stage2"]
    assert type(state["two"]["queue"]) is deque
    assert state["two"]["a"] is state["two"]["b"]
    assert isinstance(state["pair"], tuple)
    shown = inspect.describe(saved)
    assert shown.values["words.only1"] == [1, (1.5, None)]
    assert shown.values["deep.stage2.n"] == 2
    assert inspect.verify(saved) == []


def test_an_export_and_a_comparison_see_the_union(saved, tmp_path):
    ce.export(saved, tmp_path / "out.pt", to="torch")
    exported = torch.load(tmp_path / "out.pt", weights_only=False)
    assert exported["words"]["only2"] == [2, (1.5, None)]
    assert exported["deep"] == {f"stage{rank}": {"n": rank} for rank in range(3)}
    other = ce.load(saved)
    other["words"]["only2"] = "other"
    ce.save(tmp_path / "other", other)
    found = diff(saved, tmp_path / "other")
    assert [(one.name, one.kind) for one in found.differences] == [("words.only2", "value")]


def test_torchs_distributed_checkpoint_reads_the_union(saved):
    state = {"table": torch.zeros(6, dtype=torch.float64), "words": {"only2": None}, "deep": {"stage1": {"n": 0}}}
    dcp.load(state, storage_reader=ckptengine.dcp.Reader(saved))
    assert state["table"].tolist() == [0, 1, 2, 3, 4, 5]
    assert state["words"]["only2"] == [2, (1.5, None)]
    assert state["deep"]["stage1"]["n"] == 1


def test_only_the_lowest_ranks_that_have_something_are_read_for_it(saved):
    assert manifest(saved).value_ranks == (1, 2)


def test_ranks_with_equal_states_write_what_they_always_wrote(tmp_path):
    with StageJob(tmp_path / "run", 3) as job:
        for step in range(2):
            job.save([{"a": np.arange(3), "n": step, "deep": {"x": [1, {}]}} for _ in range(3)])
    assert "value_ranks" not in json.loads(next((tmp_path / "run").glob("step-*/manifest-*")).read_text())
    checkpoint = newest_checkpoint(open_storage(tmp_path / "run"))
    assert [checkpoint.own(rank).keys() for rank in range(3)] == [{"values", "containers", "structure"}] * 3


def test_ranks_that_share_something_must_have_the_same_of_it(tmp_path):
    with StageJob(tmp_path / "run", 4) as job:
        with pytest.raises(ReplicaMismatchError, match="step: not rank 2's on rank 3"):
            job.save([{}, {"a": 1}, {"step": 1}, {"step": 2}])
        job.save([{"b": 0}, {"a": 1}, {"step": 2}, {"step": 2}])
        with pytest.raises(ReplicaMismatchError, match="step: not rank 2's on rank 3"):
            job.save([{"b": 0}, {"a": 1}, {"step": 3}, {"step": 4}])
        assert ce.load(tmp_path / "run") == {"b": 0, "a": 1, "step": 2}
        job.save([{"b": 0}, {"a": 1}, {"step": 5}, {"step": 5}])


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"x": [np.ones(1)]}, {"x": (np.ones(1),)}, "x: .*list.*tuple"),
        ({"x": {}}, {"x": {"a": 1}}, "x: a plain value .* in which x.a lies"),
        ({"x": np.ones(1)}, {"x": 1.0}, "x: an array on one rank, a plain value on another"),
        ({"x": np.ones(1)}, {"x": {"a": np.ones(1)}}, "x: an array on one rank"),
        ({"x": nn.Linear(1, 1)}, {"x": {"weight": torch.ones(1, 1), "bias": torch.ones(1)}}, "x: module .*dict"),
    ],
)
def test_different_things_under_one_name_are_refused_before_anything_is_written(tmp_path, one, other, said):
    with StageJob(tmp_path / "run", 2) as job, pytest.raises(ReplicaMismatchError, match=said):
        job.save([one, other])
    assert not list((tmp_path / "run").glob("step-*/manifest-*"))


def test_what_appears_on_one_rank_between_saves_is_saved(tmp_path):
    with StageJob(tmp_path / "run", 3) as job:
        job.save([{"a": 1}, {"a": 1}, {"a": 1}])
        job.save([{"a": 2}, {"a": 2}, {"a": 2, "late": {"value": [1], "t": 4}}])
        assert ce.load(tmp_path / "run") == {"a": 2, "late": {"value": [1], "t": 4}}
        assert manifest(tmp_path / "run").value_ranks == (2,)
        job.save([{"a": 3, "new": 1}, {"a": 3, "new": 1}, {"a": 3, "new": 1}])
    assert ce.load(tmp_path / "run") == {"a": 3, "new": 1}
    assert manifest(tmp_path / "run").value_ranks == ()


def test_what_the_rank_that_stored_it_has_no_more_is_told_and_the_next_save_has_it(tmp_path):
    with StageJob(tmp_path / "run", 3) as job:
        job.save([{"a": 1, "x": 0}, {"a": 1, "b": 1}, {"a": 1, "b": 1}])
        with pytest.raises(SaveFailedError, match="b: rank 1 had it before .* rank 2 still has it"):
            job.save([{"a": 2, "x": 0}, {"a": 2}, {"a": 2, "b": 2}])
        job.save([{"a": 3, "x": 0}, {"a": 3}, {"a": 3, "b": 3}])
    assert ce.load(tmp_path / "run") == {"a": 3, "x": 0, "b": 3}


def test_what_the_rank_that_stored_a_container_has_no_more_of_is_told_and_not_lost(tmp_path):
    def with_list(has):
        return {"x": 1, "a": torch.arange(4.0), **({"z": [torch.arange(4.0)]} if has else {})}

    with StageJob(tmp_path / "run", 2) as job:
        job.save([with_list(True)] * 2)
        with pytest.raises(SaveFailedError, match="z: rank 0 had it when the ranks last told each other.*save again"):
            job.save([with_list(False), with_list(True)])
        job.save([with_list(False), with_list(True)])
        assert type(ce.load(tmp_path / "run")["z"]) is list
        job.save([with_list(False)] * 2)  # what all have no more is no failure


def test_what_is_said_of_a_tensor_outlives_the_rank_that_said_it(tmp_path):
    def with_weight(rank, has):
        weight = {"weight": nn.Parameter(torch.arange(16.0).reshape(4, 4).t(), requires_grad=False)} if has else {}
        return {"x": 1, **({"first": torch.ones(8)} if rank == 0 else {}), **weight,
                **({"large": torch.ones(4096)} if rank == 1 else {})}  # fmt: skip

    with StageJob(tmp_path / "run", 3) as job:
        job.save([with_weight(0, False), with_weight(1, True), with_weight(2, True)])
        later = [with_weight(0, False), with_weight(1, False), with_weight(2, True)]
        with pytest.raises(SaveFailedError, match="weight: rank 1 had it"):
            job.save(later)
        job.save(later)
    found = {"weight": None}
    ce.load(tmp_path / "run", into=found, only=["weight"])
    assert isinstance(found["weight"], nn.Parameter)
    assert found["weight"].stride() == (1, 4)


def test_later_saves_exchange_nothing_more_than_before(tmp_path):
    counts = []
    with StageJob(tmp_path / "run", 2) as job:
        for step in range(3):
            before = job.operations
            job.save([{"model": torch.ones(2) * step, "n0": step}, {"other": torch.ones(2), "n1": step}])
            counts.append(job.operations - before)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]
    assert ce.load(tmp_path / "run")["n1"] == 2


# Missing and unexpected.


def test_what_any_rank_takes_is_not_unexpected_to_the_others(saved):
    found = [{"all": 0}, {"all": 0}, {"words": {"all": 0, "only0": 0, "only1": 0, "only2": 0}}]
    with StageJob(saved, 3) as job:
        with pytest.raises(LoadMismatchError, match="unexpected") as raised:
            job.load(found)
        reports = job.load(found, strict=False)
    names = set(raised.value.report.unexpected)
    assert {"deep.stage0.n", "table", "norm.weight", "two.a"} <= names
    assert not {"all", "words.only1"} & names
    assert {report.unexpected for report in reports} == {raised.value.report.unexpected}
    assert found[2]["words"]["only0"] == [0, (1.5, None)]


def test_what_one_rank_misses_is_an_error_on_all(saved):
    found = [empty(part(rank)) for rank in range(3)]
    found[1]["nowhere"] = np.zeros(2)
    errors = []
    with StageJob(saved, 3) as job:

        def load(rank):
            with pytest.raises(LoadMismatchError) as raised:
                ce.load(saved, into=found[rank], comm=job.comm(rank), timeout=20)
            errors.append((rank, str(raised.value)))

        job.each(load)
    for rank, text in errors:
        assert "nowhere" in text, rank
        assert "only0" not in text, rank
        assert rank == 1 or "rank 1" in text
    assert found[0]["all"] == 0, "nothing was set"


def test_a_rank_that_loads_what_fits_hears_of_the_strict_ones_in_time(tmp_path):
    """As where `strict` is read from an argument that not all ranks were given."""
    with StageJob(tmp_path / "run", 2) as job:
        job.save([{"a": np.ones(2)}] * 2)
        found = [{"a": np.zeros(2), "nowhere": np.zeros(1)}, {"a": np.zeros(2)}]

        def load(rank, strict):
            return ce.load(tmp_path / "run", into=found[rank], comm=job.comm(rank), timeout=20, strict=strict)

        reports = job.each(lambda rank: load(rank, strict=rank == 1))
        assert (reports[0].missing, reports[1].missing) == (("nowhere",), ())
        assert [state["a"].tolist() for state in found] == [[1, 1], [1, 1]]

        def refused(rank):
            with pytest.raises(LoadMismatchError, match="nowhere"):
                load(rank, strict=rank == 0)

        job.each(refused)


# What is said.


def test_stages_are_noted_and_a_rank_that_lacks_something_is_warned_of(tmp_path, caplog):
    def said(run, states):
        caplog.clear()
        with caplog.at_level(logging.INFO, "ckptengine"), StageJob(run, 2) as job:
            for _ in range(2):
                job.save(states)
        found = [one for one in caplog.records if "of the state" in one.message or "only some ranks" in one.message]
        return [(one.levelname, one.message) for one in found]

    ((level, text),) = said(tmp_path / "stages", [{"a": 1, "x": np.ones(1)}, {"a": 1, "y": np.ones(1)}])
    assert level == "INFO"
    assert "x on rank 0; y on rank 1" in text
    ((level, text),) = said(tmp_path / "forgot", [{"a": 1, "x": 1}, {"a": 1}])
    assert level == "WARNING"
    assert "x on rank 0" in text
    assert "rank 1 has nothing that others lack" in text
    assert said(tmp_path / "equal", [{"a": 1}, {"a": 1}]) == []


@pytest.mark.parametrize(
    ("first", "second", "union"),
    [("ca", "bc", "cab"), ("ca", "dac", "cda"), ("ac", "bd", "abcd"), ("ac", "cb", "cba"), ("ca", "cdb", "cadb")],
)
def test_the_keys_of_a_dict_of_several_ranks_have_the_order_that_the_format_says(tmp_path, first, second, union):
    """Keys in sorted order are in no list: they come behind those that a list names."""
    with StageJob(tmp_path / "run", 2) as job:
        job.save([{"d": {key: ord(key) for key in keys}} for keys in (first, second)])
    assert "".join(ce.load(tmp_path / "run")["d"]) == union


# A loss scale for each stage.


def scaled(scale: float, wrap=lambda scaler: scaler) -> dict:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(1))  # its tensors are made at the first call
    return {"scaler": wrap(scaler)}


def scale_of(state: dict) -> float:
    scaler = state["scaler"]
    return getattr(scaler, "value", scaler).get_scale()


def test_a_loss_scale_that_all_stages_share_goes_to_any_number_of_them(tmp_path):
    with StageJob(tmp_path / "run", 3) as job:
        job.save([scaled(32.0) for _ in range(3)])
    of = [scaled(2.0), scaled(4.0)]
    with StageJob(tmp_path / "run", 2) as job:
        job.load(of)
    assert [scale_of(state) for state in of] == [32.0, 32.0]


def test_loss_scales_that_stages_have_of_their_own_are_told_apart_by_per_rank_and_refused_without_it(tmp_path):
    of = [scaled(float(2**rank)) for rank in range(2)]
    with StageJob(tmp_path / "run", 2) as job:
        with pytest.raises(ReplicaMismatchError, match=r"scaler\.scale"):
            job.save(of)
        job.save([scaled(scale_of(state), ce.PerRank) for state in of])
        fresh = [scaled(64.0, ce.PerRank) for _ in range(2)]
        job.load(fresh)
    assert [scale_of(state) for state in fresh] == [1.0, 2.0]


def test_a_part_that_some_ranks_have_is_loaded_by_these(saved):
    found = [empty(part(rank)) for rank in range(3)]
    with StageJob(saved, 3) as job:
        job.load(found, only=["table", "deep.stage1"])
        with pytest.raises(LoadMismatchError, match=r"only=\['nowhere'\]: the state has nothing with that name"):
            job.load(found, only=["table", "nowhere"])
    assert found[2]["table"].tolist() == [0, 1, 2, 3, 4, 5]
    assert [state["deep"] for state in found] == [{"stage0": {"n": 0}}, {"stage1": {"n": 1}}, {"stage2": {"n": 0}}]
    assert [state["all"] for state in found] == [0, 0, 0]
