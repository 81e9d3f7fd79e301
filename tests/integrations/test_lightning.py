"""Lightning's Trainer, killed and started again by the same command."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from forkserver import start_server
from jobs import run_job

from ckptengine.audit import audit

JOB = Path(__file__).with_name("lightning_job.py")


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Have a process that forks jobs: Lightning's import takes seconds."""
    start_server("lightning.pytorch,torchmetrics,ckptengine.integrations.lightning")


def start(options: dict[str, Any]) -> set[int]:
    """Run the job on its ranks; return their exit codes."""
    return run_job(JOB, options, options.get("ranks", 1))[0]


def run(place: Path, options: dict[str, Any], kills: int = 0) -> dict[str, Any]:
    """Run the job to its end, `kills` times started again; return what it noted."""
    place.mkdir()
    given = {"run": f"{place}/run", "log": f"{place}/log", "end": f"{place}/end", "killed": f"{place}/killed"} | options
    for _ in range(kills):
        assert start(given) == {-signal.SIGKILL}
    assert start(given) == {0}
    return noted(place, options.get("ranks", 1))


def noted(place: Path, ranks: int) -> dict[str, Any]:
    """Return, per rank, each batch's samples and losses (the last time it was trained), each epoch's means, the end."""
    said: dict[str, Any] = {}
    for rank in range(ranks):
        lines = [json.loads(line) for line in (place / f"log.{rank}").read_text().splitlines()]
        epochs = [json.loads(line) for line in (place / f"log.epochs.{rank}").read_text().splitlines()]
        said[f"batches {rank}"] = {line[0]: line[1:] for line in lines}
        for line in lines:  # what was trained twice was the same both times
            assert said[f"batches {rank}"][line[0]] == line[1:]
        said[f"epochs {rank}"] = {epoch: seen for epoch, seen in epochs}
        said[f"end {rank}"] = json.loads((place / f"end.{rank}").read_text())
        said[f"start {rank}"] = said[f"end {rank}"].pop("start")
    return said


def killed_as_whole(tmp_path: Path, kill: int, start_step: int, **options: Any) -> None:
    """Check that a job killed at a batch ends as the one that ran through."""
    whole = run(tmp_path / "whole", options)
    again = run(tmp_path / "again", options | {"kill": kill, "committed": start_step}, kills=1)
    for rank in range(options.get("ranks", 1)):
        assert whole.pop(f"start {rank}") is None
        assert again.pop(f"start {rank}") == start_step
    assert again == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_killed_in_mid_epoch_ends_as_the_one_that_ran_through(tmp_path: Path, workers: int) -> None:
    killed_as_whole(tmp_path, kill=16, start_step=15, workers=workers, noise=True)


def test_a_save_after_an_epochs_last_batch_counts_that_epoch_as_done(tmp_path: Path) -> None:
    killed_as_whole(tmp_path, kill=11, start_step=10, resume={"every": 10}, trainer={"max_steps": 27})


def test_an_elastic_sampler_goes_on_and_its_samples_stand_in_the_audit(tmp_path: Path) -> None:
    killed_as_whole(tmp_path, kill=16, start_step=15, elastic=4, workers=2)
    report = audit(tmp_path / "again/run")
    assert report.clean, report.findings
    assert [cursor.batches for cursor in report.cursors] == [30]


def test_gradients_that_accumulate_are_never_cut_by_a_save(tmp_path: Path) -> None:
    """Killed in the third batch after the fourth step; the last step of an epoch of 10 batches has two."""
    killed_as_whole(tmp_path, kill=17, start_step=4, resume={"every": 1}, trainer={"accumulate_grad_batches": 4})


def test_sigterm_to_one_rank_has_all_ranks_save_one_step_and_leave(tmp_path: Path) -> None:
    options = {"ranks": 2, "strategy": "ddp", "tell": 7, "resume": {"every": 100}}
    place = tmp_path / "job"
    with pytest.raises(AssertionError, match="75"):
        run(place, options)
    again = {"run": f"{place}/run", "log": f"{place}/log", "end": f"{place}/end", "killed": f"{place}/killed"}
    assert start(again | options) == {0}
    said = noted(place, 2)
    assert said["start 0"] == said["start 1"] == 7
    assert sorted(said["batches 0"]) == list(range(1, 16))  # none was lost


def test_another_number_of_ranks_goes_on_with_an_elastic_sampler_and_is_refused_with_torchs(tmp_path: Path) -> None:
    for name, elastic in (("elastic", 4), ("own", 0)):
        place = tmp_path / name
        place.mkdir()
        places = {"run": f"{place}/run", "log": f"{place}/log", "end": f"{place}/end", "killed": f"{place}/killed"}
        options = places | {"kill": 8, "committed": 6, "strategy": "ddp", "elastic": elastic}
        assert start(options | {"ranks": 2}) == {-signal.SIGKILL}
        codes, text = run_job(JOB, options | {"ranks": 1, "strategy": "auto"})
        if elastic:
            assert codes == {0}
            assert json.loads((place / "end.0").read_text())["start"] == 6
            report = audit(f"{place}/run")
            assert report.clean, report.findings
        else:
            assert codes == {1}
            assert "saved in the middle of an epoch by 2 ranks, here are 1" in text


def test_a_run_s_own_checkpoint_wins_over_a_ckpt_path(tmp_path: Path) -> None:
    said = run(tmp_path / "old", {"plugin": "lightning", "epochs": 1})
    assert said["start 0"] is None
    given = {"ckpt_path": f"{tmp_path}/old/run/last.ckpt", "epochs": 2, "kill": 16, "committed": 15}
    said = run(tmp_path / "new", given, kills=1)
    assert said["start 0"] == 15
    assert min(said["batches 0"]) == 10  # the first life has begun from the other checkpoint


def test_model_checkpoint_with_the_plugin_saves_under_ddp_where_only_rank_0_calls_it(tmp_path: Path) -> None:
    options = {"plugin": "ours", "ranks": 2, "strategy": "ddp", "epochs": 1}
    run(tmp_path / "job", options)
    names = {path.name for path in (tmp_path / "job/run").iterdir()}
    assert names == {"epoch=0-step=3.ckpt", "last.ckpt"}
    assert list((tmp_path / "job/run/last.ckpt").glob("manifest-*.json"))
    places = {name: f"{tmp_path}/job/{name}" for name in ("run", "log", "end", "killed")}
    assert start(places | options | {"epochs": 2, "ckpt_path": f"{tmp_path}/job/run/last.ckpt"}) == {0}
    for rank in range(2):
        end = json.loads((tmp_path / f"job/end.{rank}").read_text())
        assert (end["step"], end["epoch"]) == (10, 2)


def test_a_finished_job_trains_nothing_more_and_goes_on_for_more_epochs(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", {"epochs": 2})
    first = run(tmp_path / "again", {"epochs": 1})
    places = {name: f"{tmp_path}/again/{name}" for name in ("run", "log", "end", "killed")}
    assert start(places | {"epochs": 1}) == {0}
    assert noted(tmp_path / "again", 1)["batches 0"] == first["batches 0"]
    assert start(places | {"epochs": 2}) == {0}
    again = noted(tmp_path / "again", 1)
    assert (whole.pop("start 0"), again.pop("start 0")) == (None, 10)
    assert again == whole


KINDS: dict[str, dict[str, Any]] = {
    "validation within the epoch": {"kill": 17, "start_step": 15, "trainer": {"val_check_interval": 3}},
    "averaged weights": {"kill": 16, "start_step": 15, "averaging": True},
    "manual optimization of two": {"kill": 16, "start_step": 21, "manual": True, "resume": {"every": 1}},
    "a stateful loader with workers": {"kill": 16, "start_step": 15, "loader": "stateful", "workers": 2},
    "a generator of its own at an epoch's end": {"kill": 11, "start_step": 10, "loader": "generator", "resume": {}},
    "a schedule that asks for the number of steps": {"kill": 16, "start_step": 15, "one_cycle": True},
    "two loaders": {"kill": 16, "start_step": 15, "loader": "combined"},
    "an elastic sampler in short epochs": {
        "kill": 12, "start_step": 9, "elastic": 4, "trainer": {"limit_train_batches": 7}
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_training_goes_on_exactly(tmp_path: Path, kind: str) -> None:
    killed_as_whole(tmp_path, **KINDS[kind])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("iterable", "training loader 0: DataLoader over Endless has no position that could be saved"),
        ("replaces", "Bad.on_save_checkpoint puts other values into 'state_dict' (net.0.weight)"),
        ("object", "hooks.thing: object can't be saved"),
        ("cycle", "training loaders of different lengths are cycled within an epoch"),
        ("twice", "the trainer has several Resume callbacks"),
        ("name", "Resume(state=…): the names model are reserved"),
        ("fsdp1", "Resume does not work with FSDPStrategy: it is not supported yet; use ModelParallelStrategy"),
    ],
)
def test_what_could_not_be_restored_is_refused_by_name(tmp_path: Path, bad: str, message: str) -> None:
    places = {name: f"{tmp_path}/{name}" for name in ("run", "log", "end", "killed")}
    codes, text = run_job(JOB, places | {"bad": bad, "epochs": 1})
    assert codes == {1}
    assert message in text


def test_changed_data_is_refused_in_mid_epoch(tmp_path: Path) -> None:
    places = {name: f"{tmp_path}/{name}" for name in ("run", "log", "end", "killed")}
    assert start(places | {"kill": 8, "committed": 6}) == {-signal.SIGKILL}
    codes, text = run_job(JOB, places | {"samples": 48})
    assert codes == {1}
    assert "an epoch had 10 batches on each rank when it was saved in the middle of one, now it has 12" in text
