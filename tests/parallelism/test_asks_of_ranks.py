"""Ranks that ask for different things are told so, all of them the same; nothing of their states was changed."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from stages import StageJob
from thread_ranks import Ranks

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from ckptengine.save.saver import Saver
from ckptengine.save.single import single_checkpoint
from ckptengine.storage.open import open_storage

LOCAL = {"local": "local"}
WRITER = """
import sys
from pathlib import Path
import numpy as np
import ckptengine as ce
state = {"x": np.zeros(2)}
with ce.Checkpointer(sys.argv[1], keep_last=3, preemption=None) as checkpointer:
    while not Path(sys.argv[2]).exists():
        state["x"] += 1
        checkpointer.save(int(state["x"][0]), state).durable.result()
        print("committed", flush=True)
"""


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


@pytest.mark.parametrize(("first", "second"), [(1, 2), (1, None), (None, 2), (9, 1), (9, 8)])
def test_loads_of_different_steps_are_refused(run, tmp_path, first, second):
    """They read as damaged, or as missing."""
    with StageJob(tmp_path / "own", 2) as job:

        def load(rank, state):
            ce.load(run, into=state, step=second if rank else first, comm=job.comm(rank), timeout=20)

        said = told(job, load)
    assert said[0] == said[1]
    assert said[0][0] is ValueError
    assert f"load: step is {first} on rank 0, {second} on rank 1. " in said[0][1]


def test_loads_of_one_step_that_is_not_there_are_told_so(run, tmp_path):
    with StageJob(tmp_path / "own", 2) as job:
        said = told(job, lambda rank, state: ce.load(run, into=state, step=9, comm=job.comm(rank), timeout=20))
    assert [kind for kind, _ in said] == [CheckpointNotFoundError] * 2


def test_ranks_may_load_a_checkpoint_under_different_names(run, tmp_path):
    """As where a shared directory is mounted elsewhere on another node, or was copied to it."""
    (tmp_path / "elsewhere").symlink_to(run)
    shutil.copytree(run, tmp_path / "copied")
    paths = [run, tmp_path / "elsewhere", tmp_path / "copied"]
    with StageJob(tmp_path / "own", 3) as job:
        states = [{"x": torch.zeros(2)} for _ in range(3)]
        job.each(lambda rank: ce.load(paths[rank], into=states[rank], comm=job.comm(rank), timeout=20))
        assert [state["x"].tolist() for state in states] == [[2.0, 2.0]] * 3
        for manifest in run.glob("*/manifest-*.json"):
            manifest.write_bytes(b"{}")
        said = told(job, lambda rank, state: ce.load(paths[rank], into=state, comm=job.comm(rank), timeout=20))
    assert [kind for kind, _ in said] == [CheckpointDamagedError] * 3


def test_ranks_may_load_under_different_names_while_another_process_commits(tmp_path):
    """Each looks at another moment, and finds another newest step."""
    (tmp_path / "name").symlink_to(tmp_path / "run")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), str(tmp_path / "end")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    ranks, seen = Ranks(2), set()

    def load(rank):
        state = {"x": np.zeros(2)}
        ce.load(tmp_path / ("name" if rank else "run"), into=state, comm=ranks.comms[rank], timeout=20)
        return state["x"].tolist()

    try:
        while len(seen) < 10 and writer.stdout.readline():  # one or more were committed since the last load
            first, second = ranks.run(load)
            assert first == second
            seen.add(first[0])
    finally:
        (tmp_path / "end").touch()
        writer.communicate()
    assert writer.returncode == 0
    assert len(seen) == 10
    ranks.end()


def test_ranks_may_save_under_different_names_of_one_directory(tmp_path):
    ranks = Ranks(2)
    for made in ("run", "one"):
        (tmp_path / made).mkdir()
    (tmp_path / "name").symlink_to(tmp_path / "run")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    savers = [Saver(comm, 20) for comm in ranks.comms]

    def save(rank):
        with ce.Checkpointer(
            tmp_path / ("name" if rank else "run"), comm=ranks.comms[rank], timeout=20, preemption=None
        ) as ckpt:
            for step in (1, 2):
                ckpt.save(step, {"x": torch.full((2,), float(step))}).durable.result(20)
        target = single_checkpoint(open_storage(tmp_path / ("other" if rank else "one")), None)
        savers[rank].start(target, {"x": torch.full((2,), 3.0)}).durable.result(20)
        savers[rank].settle(20)

    ranks.run(save)
    assert ce.load(tmp_path / "run")["x"].tolist() == [2.0, 2.0]
    assert ce.load(tmp_path / "one")["x"].tolist() == [3.0, 3.0]
    for saver in savers:
        saver.close()
    ranks.end()


def test_ranks_that_ask_alike_exchange_no_more_for_it(run):
    """What they ask for travels with what rank 0 tells the others."""
    with StageJob(run, 2) as job:
        counts = []
        for options in ({"step": 2}, {"best": "error"}, {}):
            before = job.operations
            job.restore([{"x": torch.zeros(2)} for _ in range(2)], **options)
            counts.append(job.operations - before)
        assert len(set(counts)) == 1
        before = job.operations
        told(job, lambda rank, state: job.checkpointers[rank].restore(state, step=1 + rank))
        assert job.operations - before < counts[0]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"every": 1}, {"every": 2}, r"every .* is every 1 steps on rank 0, every 2 steps on rank 1"),
        ({"every": "10min"}, {}, r"every .* is every 600 s on rank 0, None on rank 1"),
        (
            {"every": "auto"},
            {"every": ce.Auto(mtbf="6h")},
            r"every .* is Auto.* on rank 0, Auto\(mtbf=21600\.0.* on rank 1",
        ),
        (
            LOCAL | {"keep_last": 2},
            LOCAL | {"keep_last": 3},
            r"keep_last .* is KeepLast\(count=2\) on rank 0, .*3\) on rank 1",
        ),
        (
            LOCAL | {"keep_last": 1, "keep_best": "loss"},
            LOCAL | {"keep_last": 1},
            r"is Best\(.* and KeepLast.* on rank 0, KeepLast",
        ),
        (
            LOCAL | {"policy": ce.Policy(keep=ce.KeepSteps([7, 3]))},
            LOCAL,
            r"is KeepSteps\(\[3, 7\]\) on rank 0, None on rank 1",
        ),
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


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"every": "10min"}, {"every": "600s"}),
        ({"every": ce.Auto(mtbf="6h")}, {"every": ce.Auto(mtbf=21600)}),
        ({"keep_last": 2}, {"keep_last": 3}),
        ({"policy": ce.Policy(keep=ce.KeepSteps([7, 3]))}, {}),
        ({"policy": ce.Policy(save=ce.AtSteps([7, 3]))}, {"policy": ce.Policy(save=[ce.AtSteps([3, 7, 7])])}),
        ({"keep_last": 2, "local": "one"}, {"keep_last": 2, "local": "two"}),
    ],
)
def test_rules_may_be_written_differently_and_rank_0s_say_what_it_keeps_of_a_run(tmp_path, monkeypatch, first, second):
    monkeypatch.chdir(tmp_path)
    ranks = Ranks(2)

    def make(rank):
        options = second if rank else first
        ce.Checkpointer("run", comm=ranks.comms[rank], timeout=20, preemption=None, **options).close()

    ranks.run(make)
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


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"to": "zarr"}, {}, "to is zarr on rank 0, safetensors on rank 1"),
        ({"only": ["x"]}, {}, r"only is \['x'\] on rank 0, None on rank 1"),
        ({"dtype": torch.bfloat16}, {}, "dtype is bfloat16 on rank 0, None on rank 1"),
        ({"max_shard_size": "1KB"}, {}, "max_shard_size is 1000 on rank 0, 5000000000 on rank 1"),
        ({"rename": {"x": "y"}}, {}, r"rename is \[.*'x': 'y'.*\] on rank 0, None on rank 1"),
    ],
)
def test_exports_of_other_things_are_refused(run, tmp_path, first, second, words):
    """Each rank wrote its files of another set, and the index had one of them."""
    ranks = Ranks(2)

    def export(rank, **options):
        return ce.export(run, tmp_path / options.pop("target", "hub"), comm=ranks.comms[rank], timeout=20, **options)

    def refused(rank):
        with pytest.raises(ValueError, match=words) as found:
            export(rank, **(second if rank else first))
        return str(found.value)

    said = ranks.run(refused)
    assert said[0] == said[1]
    assert [report.arrays for report in ranks.run(lambda rank: export(rank, target="good"))] == [1, 1]
    ranks.end()


def test_exports_options_may_come_in_another_order(run, tmp_path):
    """A set has one of its own in each process."""
    ranks = Ranks(2)
    options = [
        {"only": ["x", "y"], "rename": {"x": "z", "y": "w"}},
        {"only": ("y", "x", "x"), "rename": {"y": "w", "x": "z"}},
    ]
    run_of_two = tmp_path / "two"
    ce.save(run_of_two, {"x": torch.ones(1), "y": torch.ones(2)})
    reports = ranks.run(
        lambda rank: ce.export(run_of_two, tmp_path / "hub", comm=ranks.comms[rank], timeout=20, **options[rank])
    )
    assert [report.arrays for report in reports] == [2, 2]
    ranks.end()
