"""A job that dies again and again ends with the same bits as one that was never disturbed."""

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from gpt_job import GLOBAL_BATCH, SAMPLES
from gpt_lives import Life, events, final, starts, steps_of

from ckptengine.audit import audit
from ckptengine.catalog.listing import newest
from ckptengine.storage.local import LocalStorage

STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt") / "undisturbed"
    Life(folder, 4, "--mode=ddp").finish()
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job, killed after a random step, within a save, within a restore, and at whatever moment."""
    folder = tmp_path_factory.mktemp("gpt") / "killed"
    seed = int(os.environ.get("RESUME_SEED", time.time_ns() % 10**6))
    chance = random.Random(seed)
    moments = [chance.randint(10, 11), 12, chance.randint(18, 27)]
    operation = chance.choice(["create", "write_memory", "sync", "rename", "publish"])
    print(f"RESUME_SEED={seed}: killed after the steps {moments}, within a save before its first {operation}")
    arguments = ("--mode=ddp", "--every=3", "--pause=0.05")

    def reached(step: int, committed: int) -> bool:
        trained = any(event["event"] == "step" and event["step"] >= step for event in events(folder))
        return trained and bool(list((folder / "run").glob(f"step-{committed:08d}/manifest-*")))

    def saving(step: int) -> bool:
        """Whether a save of this or a later step has begun and is not committed."""
        places = [p for p in (folder / "run").glob("step-*") if int(p.name[5:]) >= step]
        return any(list(p.glob("data-*")) and not list(p.glob("manifest-*")) for p in places)

    def restoring() -> bool:
        return events(folder)[-1]["event"] == "restoring"

    Life(folder, 4, *arguments, f"--stay={moments[0]}").kill_when(lambda: reached(moments[0], committed=9))
    Life(folder, 4, *arguments, "--hold-save", str(moments[1]), operation).kill_when(lambda: saving(moments[1]))
    Life(folder, 4, *arguments, "--hold-restore").kill_when(restoring)
    Life(folder, 4, *arguments).kill_when(lambda: reached(moments[2], committed=15))
    Life(folder, 4, *arguments).finish()
    return folder


def test_every_loss_and_every_sample_is_that_of_the_undisturbed_job(undisturbed: Path, killed: Path) -> None:
    for rank in range(4):
        expected, found = steps_of(undisturbed, rank), steps_of(killed, rank)
        assert list(expected) == list(range(1, STEPS + 1))
        assert sorted(found) == sorted(expected)
        for step, records in found.items():
            for record in records:  # also those that were trained more than once
                for key in ("losses", "samples", "rate"):
                    assert record[key] == expected[step][0][key], (rank, step, key)


def test_weights_optimizer_schedule_average_and_random_streams_end_equal(undisturbed: Path, killed: Path) -> None:
    streams = set()
    for rank in range(4):
        assert final(killed, rank) == final(undisturbed, rank)
        streams.add(final(killed, rank)["random"])
    assert len(streams) == 4, "each rank has streams of its own"


def test_the_kills_hit_what_they_were_to_hit(killed: Path) -> None:
    """One at a random moment, one within a save, one within a restore, one more; two restarts in mid-epoch."""
    came = [event["event"] for event in events(killed) if event["event"] in ("restoring", "start")]
    assert came == ["restoring", "start"] * 2 + ["restoring"] + ["restoring", "start"] * 2
    resumed = [start["step"] for start in starts(killed)]
    epoch_steps = -(-SAMPLES // GLOBAL_BATCH)
    assert resumed[:2] == [None, 9]
    assert [step // epoch_steps for step in resumed[1:3]] == [1, 1], "two restarts in one epoch"
    assert all(step % epoch_steps for step in resumed[1:3]), "in its middle"


def test_the_audit_of_the_killed_job_is_clean(killed: Path) -> None:
    report = audit(killed / "run")
    assert report.clean, report


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job in fixed order by one rank, and the same by 4, 2, 3 and 1 ranks, killed in between."""
    folder = tmp_path_factory.mktemp("gpt")
    alone, many = folder / "alone", folder / "many"
    Life(alone, 1, "--mode=fixed").finish()
    return alone, through_ranks(many, "--mode=fixed")


def through_ranks(folder: Path, *arguments: str) -> Path:
    def reached(step: int) -> bool:
        """Whether a step was trained, and there is a checkpoint to go on from."""
        trained = any(event["event"] == "step" and event["step"] >= step for event in events(folder))
        return trained and newest(LocalStorage(folder / "run")) is not None

    for ranks, step in ((4, 7), (2, 14), (3, 22)):
        Life(folder, ranks, "--pause=0.03", *arguments).kill_when(lambda step=step: reached(step))
    Life(folder, 1, *arguments).finish()
    return folder


def by_step(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Return, for each step, what all ranks of each life that trained it did together: losses and samples in order."""
    found: dict[int, list[dict[str, Any]]] = {}
    lives: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
    for rank in range(4):
        life = -1
        for event in events(folder, rank):
            if event["event"] == "restoring":
                life += 1
            if event["event"] == "step":
                ranks = event["ranks"]
                lives.setdefault((event["step"], ranks), {})[rank] = event
    for (step, ranks), parts in sorted(lives.items()):
        if len(parts) == ranks:  # a rank may have been killed before it wrote its line
            losses = [value for rank in range(ranks) for value in parts[rank]["losses"]]
            samples = [value for rank in range(ranks) for value in parts[rank]["samples"]]
            found.setdefault(step, []).append({"losses": losses, "samples": samples})
    return found


def test_over_4_2_3_and_1_ranks_in_fixed_order_everything_is_equal_bit_for_bit(resized: tuple[Path, Path]) -> None:
    alone, many = resized
    expected, found = by_step(alone), by_step(many)
    assert list(found) == list(range(1, STEPS + 1))
    for step, records in found.items():
        for record in records:
            assert record == expected[step][0], step
    ours, theirs = final(many, 0), final(alone, 0)
    for key in ("weights", "optimizer", "scheduler", "average", "epoch", "step"):
        assert ours[key] == theirs[key], key
    assert [start["ranks"] for start in starts(many)] == [4, 2, 3, 1]


def test_the_audit_over_4_2_3_and_1_ranks_is_clean(resized: tuple[Path, Path]) -> None:
    report = audit(resized[1] / "run")
    assert report.clean, report


def test_with_fsdp2_state_and_samples_are_exact_over_4_2_3_and_1_ranks(tmp_path: Path) -> None:
    """FSDP2 adds gradients in an order of its own: the losses may differ in their last bits, and are printed."""
    folder = through_ranks(tmp_path / "many", "--mode=fsdp", "--digests")
    Life(tmp_path / "alone", 1, "--mode=fsdp").finish()
    saved: dict[int, Any] = {}
    restarts = 0
    for event in events(folder):
        if event["event"] == "saved":
            saved[event["step"]] = event["state"]
        elif event["event"] == "start" and event["step"] is not None:
            restarts += 1
            assert event["state"] == saved[event["step"]], f"step {event['step']}, by {event['ranks']} ranks"
    assert restarts == 3
    expected, found = by_step(tmp_path / "alone"), by_step(folder)
    worst = 0.0
    for step, records in found.items():
        for record in records:
            assert record["samples"] == expected[step][0]["samples"]
            ours, theirs = (sum(float.fromhex(value) for value in one["losses"]) for one in (record, expected[step][0]))
            worst = max(worst, abs(ours - theirs) / abs(theirs))
    print(f"largest relative difference of a step's loss over 4, 2, 3 and 1 ranks: {worst:.2e}")
    assert worst < 1e-4
    assert audit(folder / "run").clean
