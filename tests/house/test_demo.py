"""The demo's account believes nothing: every claim that does not hold is found."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ckptengine as ce

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

TOTAL = 10


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("account")


def good_events() -> list[dict[str, Any]]:
    """Four ranks train 1 to 7, two resume at 5 and train to the end."""
    events: list[dict[str, Any]] = [{"event": "start", "time": 0.0, "resumed": None, "world_size": 4, "seconds": 0.1}]
    events += [
        {"event": "step", "time": 1.0 + step, "step": step, "loss": 6 / step, "world_size": 4} for step in range(1, 8)
    ]
    events += [{"event": "start", "time": 20.0, "resumed": 5, "world_size": 2, "seconds": 0.1}]
    events += [
        {"event": "step", "time": 20.0 + step, "step": step, "loss": 6 / step, "world_size": 2}
        for step in range(6, TOTAL + 1)
    ]
    return [*events, {"event": "end", "time": 40.0, "world_size": 2}]


class Folder:
    """A demo's folder after a good course; tests spoil one thing."""

    def __init__(self, path: Path) -> None:
        self.log, self.run = path / "log", path / "run"
        self.log.mkdir()
        for step in (5, 10):
            (self.run / f"step-{step:08d}").mkdir(parents=True)
            (self.run / f"step-{step:08d}" / "manifest-0001.json").touch()
        self.events = good_events()
        self.saved = {"model.w": "a", "optimizer.w.exp_avg": "b"}
        self.restored = dict(self.saved)
        self.killed = (1, 2, 3)

    def failed(self, account: ModuleType) -> list[str]:
        """Return the claims that don't hold."""
        text = "".join(json.dumps(event) + "\n" for event in self.events)
        (self.log / "events.jsonl").write_text(text + '{"event": "ste')
        (self.log / "saved-step-00000005-world-4.json").write_text(json.dumps(self.saved))
        (self.log / "restored-step-00000005-world-2.json").write_text(json.dumps(self.restored))
        course = account.Course.read(self.log, self.run, 5, killed=self.killed, at_kill=(5,))
        return [one.claim for one in account.check(course, TOTAL) if not one.good]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_good_course_passes(account: ModuleType, folder: Folder) -> None:
    assert folder.failed(account) == []


def test_one_differing_leaf_is_found(account: ModuleType, folder: Folder) -> None:
    folder.restored["optimizer.w.exp_avg"] = "c"
    assert folder.failed(account) == ["state before and after re-sharding is equal, leaf by leaf"]


def test_a_missing_leaf_is_found(account: ModuleType, folder: Folder) -> None:
    del folder.restored["model.w"]
    assert folder.failed(account) == ["state before and after re-sharding is equal, leaf by leaf"]


def test_an_older_checkpoint_is_found(account: ModuleType, folder: Folder) -> None:
    for event in folder.events:
        if event.get("resumed") == 5:
            event["resumed"] = 3
    assert "it resumed from the newest checkpoint" in folder.failed(account)


def test_a_skipped_step_is_found(account: ModuleType, folder: Folder) -> None:
    folder.events = [event for event in folder.events if event.get("step") != 9]
    assert folder.failed(account) == ["every step was trained"]


def test_a_course_without_an_end_is_found(account: ModuleType, folder: Folder) -> None:
    folder.events.pop()
    assert folder.failed(account) == ["every step was trained"]


def test_another_loss_after_the_restart_is_found(account: ModuleType, folder: Folder) -> None:
    for event in folder.events:
        if event.get("step") == 6 and event["world_size"] == 2:
            event["loss"] += 0.01
    assert folder.failed(account) == ["steps trained twice agree"]


def test_a_missing_last_checkpoint_is_found(account: ModuleType, folder: Folder) -> None:
    (folder.run / "step-00000010" / "manifest-0001.json").unlink()
    assert folder.failed(account) == ["the last step is committed"]


def test_a_node_that_was_not_killed_is_found(account: ModuleType, folder: Folder) -> None:
    folder.killed = (1,)
    assert folder.failed(account) == ["one node of two was killed"]


def test_a_course_that_never_came_back_fails_without_an_exception(account: ModuleType, folder: Folder) -> None:
    folder.events = folder.events[:8]
    failed = folder.failed(account)
    assert "the job came back with the ranks left" in failed
    assert "state before and after re-sharding is equal, leaf by leaf" in failed


def run_with(path: Path, *, skipped: int) -> Path:
    """Make a run of one epoch of 12 samples and a half; `skipped` samples are passed over behind the counters."""
    sampler = ce.ElasticSampler(12, 4, seed=3)
    with ce.Checkpointer(path, every=None) as ckpt:
        for step, samples in zip(range(1, 4), sampler.batches(), strict=False):
            if step == 2 and skipped:
                sampler.load_state_dict(sampler.state_dict() | {"consumed": sampler.consumed + skipped})
                break
            assert samples
        for _ in sampler.batches():
            pass
        ckpt.save(sampler.global_batches, {"data": sampler})
    return path


def test_the_data_is_audited(account: ModuleType, tmp_path: Path) -> None:
    assert account.audited(run_with(tmp_path / "good", skipped=0)).good
    found = account.audited(run_with(tmp_path / "bad", skipped=2))
    assert not found.good
    assert "epoch 0" in found.found
