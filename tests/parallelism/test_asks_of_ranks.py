"""Ranks that ask for different things are told so, all of them the same; nothing of their states was changed."""

import os
import shutil

import pytest
import torch
from stages import StageJob
from thread_ranks import Ranks

import ckptengine as ce
from ckptengine.errors import CheckpointError
from ckptengine.save.saver import Saver
from ckptengine.save.single import single_checkpoint
from ckptengine.storage.open import open_storage


@pytest.fixture
def run(tmp_path):
    """A run of two ranks that has two steps, with a metric."""
    with StageJob(tmp_path / "run", 2) as job:
        for step in (1, 2):
            job.each(
                lambda rank, step=step: (
                    job.checkpointers[rank]
                    .save(step, {"x": torch.full((2,), float(step))}, {"loss": step, "error": -step})
                    .durable.result(20)
                )
            )
    return tmp_path / "run"


def told(job, call):
    """Return what each rank is told by a call of all, once its state was found as it was."""
    states = [{"x": torch.zeros(2)} for _ in range(job.size)]

    def tell(rank):
        with pytest.raises((ValueError, CheckpointError)) as found:
            call(rank, states[rank])
        return type(found.value), str(found.value)

    said = job.each(tell)
    assert all(not state["x"].any() for state in states)
    return said


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"step": 1}, {"step": 2}, r"restore: step is 1 on rank 0, 2 on rank 1\. .*give all the same"),
        ({}, {"step": 1}, r"restore: step is None on rank 0, 1 on rank 1"),
        ({"step": 9}, {"step": 1}, r"restore: step is 9 on rank 0, 1 on rank 1"),
        ({"best": "loss"}, {"best": "error"}, r"best is Best\(metric='loss'.* on rank 0, .*'error'.* on rank 1"),
        ({"best": "loss"}, {}, r"best is Best\(metric='loss'.* on rank 0, None on rank 1"),
    ],
)  # fmt: skip
def test_restores_of_different_steps_or_metrics_are_refused(run, first, second, words):
    """Rank 0's was taken, without a word to the others."""
    with StageJob(run, 2) as job:
        said = told(job, lambda rank, state: job.checkpointers[rank].restore(state, **(second if rank else first)))
        assert said[0] == said[1]
        with pytest.raises(ValueError, match=words):
            raise said[0][0](said[0][1])
        states = [{"x": torch.zeros(2)} for _ in range(2)]
        assert job.restore(states, step=1) == [1, 1]
        assert [state["x"].tolist() for state in states] == [[1.0, 1.0]] * 2


def test_a_step_that_only_some_ranks_ask_for_is_refused_where_nothing_was_saved(tmp_path):
    with StageJob(tmp_path / "run", 3) as job:
        said = told(
            job, lambda rank, state: job.checkpointers[rank].restore(state, **({"step": 4} if rank == 1 else {}))
        )
        assert len(set(said)) == 1
        assert "step is None on ranks 0, 2, 4 on rank 1" in said[0][1]


def test_parts_that_only_some_ranks_read_again_are_refused_once_the_job_has_begun(run):
    """With `only` the job goes on; without it a new life begins, which all ranks have to share."""
    with StageJob(run, 2) as job:
        job.restore([{"x": torch.zeros(2)} for _ in range(2)])
        said = told(
            job, lambda rank, state: job.checkpointers[rank].restore(state, **({"only": ["x"]} if rank else {}))
        )
        assert said[0] == said[1]
        assert "restore: only is None on rank 0, given on rank 1" in said[0][1]


def test_a_first_restore_may_load_other_parts_on_some_ranks(run):
    with StageJob(run, 2) as job:
        states = [{"x": torch.zeros(2), "y": torch.zeros(1)}, {"x": torch.zeros(2)}]
        job.each(lambda rank: job.checkpointers[rank].restore(states[rank], **({} if rank else {"only": "x"})))
        assert [state["x"].tolist() for state in states] == [[2.0, 2.0]] * 2


@pytest.mark.parametrize("other", ["step", "path", "missing"])
@pytest.mark.parametrize("who", [0, 1])
def test_loads_of_different_steps_or_paths_are_refused(run, tmp_path, other, who):
    """They read as damaged, or as missing."""
    shutil.copytree(run, tmp_path / "other")
    for name in os.listdir(tmp_path / "other"):
        if name.startswith("step-") and name.endswith("2"):
            shutil.rmtree(tmp_path / "other" / name)
    place = {"step": (run, 1), "path": (tmp_path / "other", None), "missing": (tmp_path / "nothing", None)}[other]
    with StageJob(tmp_path / "own", 2) as job:

        def load(rank, state):
            path, step = place if rank == who else (run, None)
            ce.load(path, into=state, step=step, comm=job.comm(rank), timeout=20)

        said = told(job, load)
    assert said[0] == said[1]
    assert said[0][0] is ValueError
    assert "the path is " in said[0][1]
    for part in (f"{run} on rank {1 - who}", f" on rank {who}", "not one checkpoint", "give all the same path"):
        assert part in said[0][1]


def test_ranks_may_see_a_checkpoint_under_different_names(run, tmp_path):
    """As where a shared directory is mounted elsewhere on another node, or was copied to it."""
    (tmp_path / "elsewhere").symlink_to(run)
    shutil.copytree(run, tmp_path / "copied")
    with StageJob(tmp_path / "own", 3) as job:
        states = [{"x": torch.zeros(2)} for _ in range(3)]
        paths = [run, tmp_path / "elsewhere", tmp_path / "copied"]
        job.each(lambda rank: ce.load(paths[rank], into=states[rank], comm=job.comm(rank), timeout=20))
    assert [state["x"].tolist() for state in states] == [[2.0, 2.0]] * 3


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"every": 1}, {"every": 2}, r"every .* is every 1 steps on rank 0, every 2 steps on rank 1"),
        ({"every": "10min"}, {}, r"every .* is every 10min on rank 0, None on rank 1"),
        (
            {"every": "auto"},
            {"every": ce.Auto(mtbf="6h")},
            r"every .* is Auto.* on rank 0, Auto\(mtbf='6h'.* on rank 1",
        ),
        ({"keep_last": 2}, {"keep_last": 3}, r"keep_last .* is KeepLast\(count=2\) on rank 0, .*3\) on rank 1"),
        ({"keep_last": 1, "keep_best": "loss"}, {"keep_last": 1}, r"is Best\(.* and KeepLast.* on rank 0, KeepLast"),
        ({"policy": ce.Policy(keep=ce.KeepSteps([7, 3]))}, {}, r"is KeepSteps\(\[3, 7\]\) on rank 0, None on rank 1"),
        ({"when_busy": "skip"}, {}, "when_busy is skip on rank 0, wait on rank 1"),
        ({"on_error": "raise"}, {}, "on_error is raise on rank 0, warn on rank 1"),
        ({"max_failures": 1}, {}, "max_failures is 1 on rank 0, 3 on rank 1"),
        ({"local": "local"}, {}, "local is given on rank 0, None on rank 1"),
        ({"memory": True}, {}, "memory is given on rank 0, None on rank 1"),
        ({"preemption": ce.Preemption()}, {}, "preemption is given on rank 0, None on rank 1"),
    ],
)
def test_checkpointers_with_other_rules_are_refused(tmp_path, monkeypatch, first, second, words):
    """Their ranks waited for each other until the timeout, or rank 0's rule held without a word."""
    monkeypatch.chdir(tmp_path)
    ranks = Ranks(2)

    def make(rank):
        with pytest.raises(ValueError, match=words) as found:
            ce.Checkpointer(
                "run", comm=ranks.comms[rank], timeout=20, **({"preemption": None} | (second if rank else first))
            )
        return str(found.value)

    said = ranks.run(make)
    assert said[0] == said[1]
    ranks.end()


def test_checkpointers_of_different_runs_are_refused_and_those_of_one_under_two_names_are_not(tmp_path):
    """No save was committed: the archives of the others were missing."""
    ranks = Ranks(2)
    (tmp_path / "run").mkdir()
    (tmp_path / "name").symlink_to(tmp_path / "run")

    def make(rank, *runs):
        return ce.Checkpointer(runs[rank], comm=ranks.comms[rank], timeout=20, preemption=None)

    def refused(rank):
        with pytest.raises(
            ValueError, match="the run is .*run on rank 0, .*other on rank 1, and .* not one place"
        ) as found:
            make(rank, tmp_path / "run", tmp_path / "other")
        return str(found.value)

    said = ranks.run(refused)
    assert said[0] == said[1]

    def save(rank):
        with make(rank, tmp_path / "run", tmp_path / "name") as ckpt:
            ckpt.save(1, {"x": torch.ones(1)}).durable.result(20)

    ranks.run(save)
    assert ce.load(tmp_path / "run")["x"] == 1
    assert not any("site" in name for name in os.listdir(tmp_path / "run"))
    ranks.end()


def test_rank_0_alone_may_be_called_after_a_commit_and_give_metadata(tmp_path):
    ranks, seen = Ranks(2), []

    def save(rank):
        own = {} if rank else {"on_commit": seen.append, "metadata": {"who": 0}}
        with ce.Checkpointer(
            tmp_path / "run", comm=ranks.comms[rank], timeout=20 + rank, preemption=None, **own
        ) as ckpt:
            ckpt.save(1, {"x": torch.ones(1)}).durable.result(20)

    ranks.run(save)
    assert [commit.step for commit in seen] == [1]
    ranks.end()


def test_saves_to_different_paths_are_refused_and_those_to_one_under_two_names_are_not(tmp_path):
    ranks = Ranks(2)
    (tmp_path / "name").symlink_to(tmp_path / "one")
    savers = [Saver(comm, 20) for comm in ranks.comms]

    def save(rank, *names):
        target = single_checkpoint(open_storage(tmp_path / names[rank]), None)
        savers[rank].start(target, {"x": torch.full((2,), 3.0)}).durable.result(20)
        savers[rank].settle(20)

    def refused(rank):
        with pytest.raises(
            ValueError, match="the path is .*one on rank 0, .*two on rank 1, and .* not one place"
        ) as found:
            save(rank, "one", "two")
        return str(found.value)

    ranks.run(lambda rank: save(rank, "one", "one"))
    said = ranks.run(refused)
    assert said[0] == said[1]
    ranks.run(lambda rank: save(rank, "one", "name"))
    assert ce.load(tmp_path / "one")["x"].tolist() == [3.0, 3.0]
    for saver in savers:
        saver.close()
    ranks.end()
