"""`ckptengine audit`: clean runs are proven clean over restarts, planted skips and repeats are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audited import LENGTH, findings_of, moved, report_of, train
from cli_run import Call
from numpy.typing import NDArray

import ckptengine as ce
from ckptengine.catalog.manifest import Manifest
from ckptengine.data.digest import digest_of
from ckptengine.data.ledger import Ledger, Run
from ckptengine.data.order import Order


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three lives on 3, 2 and 4 ranks, in three epochs of 12 batches; each dies after its last save."""
    run = tmp_path_factory.mktemp("runs") / "gpt"
    for ranks, upto in ((3, 12), (2, 23), (4, 40)):
        train(run, ranks=ranks, upto=upto)
    return run


def test_a_run_with_two_restarts_at_other_world_sizes_is_clean(clean_run: Path, call: Call) -> None:
    report = report_of(call, clean_run, 0)
    [cursor] = report["cursors"]
    # 90 samples are 11 batches of 8 and 2 more, which on 3 and 4 ranks join the one before them.
    assert [(life["generation"], life["steps"], life["world_size"]) for life in cursor["lives"]] == [
        (1, [5, 10], 3),
        (2, [15, 20], 2),
        (3, [25, 40], 4),
    ]
    assert [life["batches"] for life in cursor["lives"]] == [[0, 9], [10, 19], [20, 39]]
    assert sum(life["samples"] for life in cursor["lives"]) == LENGTH * cursor["epoch"] + cursor["consumed"]
    assert cursor["finished_epochs"] == 3
    assert [checkpoint["step"] for checkpoint in report["checkpoints"]] == [5, 10, 15, 20, 25, 30, 35, 40]
    text = call("audit", clean_run, "--deep")
    assert text.exit_code == 0
    assert "each of the 90 samples was used once in each of 3 finished epochs" in text.output
    assert "nothing lost, nothing repeated" in text.output


def test_what_retention_has_deleted_is_proven_by_the_newest_ledger(clean_run: Path, call: Call, tmp_path: Path) -> None:
    run = tmp_path / "gpt"
    shutil.copytree(clean_run, run)
    for step in (15, 20):  # all of the second life: its claim still tells which checkpoint it came from
        shutil.rmtree(run / f"step-{step:08d}")
    [cursor] = report_of(call, run, 0)["cursors"]
    assert [life["generation"] for life in cursor["lives"]] == [1, None, 3]
    for step in (5, 10, 25, 35):  # all of two lives
        shutil.rmtree(run / f"step-{step:08d}")
    [cursor] = report_of(call, run, 0)["cursors"]
    assert [(life["generation"], life["steps"]) for life in cursor["lives"]] == [
        (None, None),
        (None, None),
        (3, [30, 40]),
    ]
    assert any("by the ledger of step 40, from the start" in line for line in cursor["proven"])
    assert any("by the digests of step 40" in line for line in cursor["proven"])
    assert any("by the 2 checkpoints from step 30 on" in line for line in cursor["proven"])


def test_a_skip_by_a_job_that_moves_the_cursor_is_found(tmp_path: Path, call: Call) -> None:
    """Seventeen steps on two ranks are one epoch (12 batches) and 40 samples."""
    train(tmp_path, ranks=2, upto=26, meddle=moved(8))
    [(kind, between, message)] = findings_of(call, tmp_path)
    assert (kind, between) == ("gap", [15, 20])
    first = ce.ElasticSampler(LENGTH, 8, seed=4, rank=0, world_size=1)._cursor.order.at(1, np.arange(40, 45)).tolist()
    numbers = ", ".join(map(str, first))
    assert message == f"epoch 1: 8 samples never used, positions 40 to 47, samples {numbers}, …"
    output = call("audit", tmp_path).output
    assert "GAP data: between steps 15 and 20: epoch 1: 8 samples never used" in output
    assert "was used once" not in output  # what has a finding is not said to be proven


def test_a_repeat_by_a_job_that_moves_the_cursor_is_found(tmp_path: Path, call: Call) -> None:
    train(tmp_path, ranks=2, upto=26, meddle=moved(-5))
    [(kind, between, message)] = findings_of(call, tmp_path)
    assert (kind, between) == ("repeat", [15, 20])
    assert message.startswith("epoch 1: 5 samples used 2 times, positions 35 to 39, samples ")


def test_a_cursor_that_was_moved_right_before_a_save_is_found(tmp_path: Path, call: Call) -> None:
    def meddle(sampler: ce.ElasticSampler, step: int) -> bool:
        sampler._cursor.consumed += 8 * (step == 20)
        return step == 20

    train(tmp_path, ranks=1, upto=20, meddle=meddle)
    [(kind, between, message)] = findings_of(call, tmp_path)
    assert (kind, between) == ("cursor", [15, 20])
    assert (
        "the cursor is at epoch 1, sample 72, after 20 global batches; its ledger ends at epoch 1, sample 64" in message
    )


class Doubled(Order):
    """An order that gives the sample of one position at another one, too: what counters can't see."""

    def __init__(self, order: Order, at: int, instead: int) -> None:
        self.order, self.length, self.where = order, order.length, (at, instead)

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        given = np.where((positions == self.where[1]) & (epoch == 1), self.where[0], positions)
        return self.order.at(epoch, given)

    def describe(self) -> dict[str, Any]:
        return self.order.describe()


def test_a_sample_that_is_handed_out_twice_behind_the_counters_is_found(tmp_path: Path, call: Call) -> None:
    def meddle(sampler: ce.ElasticSampler, step: int) -> bool:
        if step == 11:
            sampler._cursor.order = Doubled(sampler._cursor.order, 3, 50)
        return False

    [sampler] = train(tmp_path, ranks=1, upto=26, meddle=meddle)
    twice, never = (int(sampler._cursor.order.order.at(1, np.array([n]))[0]) for n in (3, 50))
    [(kind, between, message)] = findings_of(call, tmp_path)
    assert (kind, between) == ("digest", [15, 20])  # position 50 is in the 19th batch
    assert message.endswith(f"sample {twice} of epoch 1 was handed out in place of sample {never}")


@pytest.mark.parametrize(
    ("sign", "what"), [(1, "handed out once more"), (-1, "not handed out")], ids=["once more", "not at all"]
)
def test_one_sample_too_many_or_too_few_is_named(tmp_path: Path, call: Call, sign: int, what: str) -> None:
    def meddle(sampler: ce.ElasticSampler, step: int) -> bool:
        if step == 9 and sampler._cursor.rank == 1:
            cursor = sampler._cursor
            cursor._tally = cursor._tally.plus(sign * digest_of(0, np.array([42])), True)
        return False

    train(tmp_path, ranks=3, upto=15, meddle=meddle)
    [(kind, between, message)] = findings_of(call, tmp_path)
    assert (kind, between) == ("digest", [5, 10])
    assert message.endswith(f": sample 42 of epoch 0 was {what}")


def forged(run: Path, target: Path, change: Callable[[list[Run]], list[Run]]) -> Path:
    """Copy a run with a further checkpoint whose ledger was changed; its files are whole."""
    shutil.copytree(run, target)
    sampler = ce.ElasticSampler(LENGTH, 8, seed=4, rank=0, world_size=1)
    with ce.Checkpointer(target) as ckpt:
        ckpt.restore({"model": np.zeros(3), "data": sampler}, strict=False)
        state = sampler.state_dict()
        runs = change(list(sampler._cursor.ledger.runs()))
        rows = [[1, [one.first, one.last, one.epoch, one.begin, one.end, one.padding, one.world_size, one.life]]
                for one in runs]  # fmt: skip
        Ledger.from_plain(rows)
        ckpt.save(45, {"model": np.zeros(3), "data": {**state, "ledger": rows}})
    return target


def test_a_forged_ledger_is_found(clean_run: Path, tmp_path: Path, call: Call) -> None:
    """Batches of the first epoch are claimed that never were, in place of those that were."""

    def shift(runs: list[Run]) -> list[Run]:
        assert (runs[0].first, runs[0].begin, runs[0].end) == (0, 0, 80)
        return [replace(runs[0], last=8, end=72), replace(runs[0], first=9, last=9, begin=80, end=88), *runs[1:]]

    found = findings_of(call, forged(clean_run, tmp_path / "gpt", shift))
    kinds = [kind for kind, _, _ in found]
    assert sorted(kinds) == ["digest", "gap", "ledger", "repeat"]
    where = {kind: between for kind, between, _ in found}
    assert where == {"gap": [5, 10], "repeat": [10, 15], "ledger": [40, 45], "digest": [40, 45]}
    [ledger] = [message for kind, _, message in found if kind == "ledger"]
    assert "the ledger of step 45 does not continue that of step 40: where that has (global batches 0 to 9" in ledger


def test_a_forged_ledger_that_contradicts_nothing_but_the_digests_is_found(
    clean_run: Path, tmp_path: Path, call: Call
) -> None:
    """It claims a batch that was never used, so that all counters agree, and moves its cursor to it."""

    def longer(runs: list[Run]) -> list[Run]:
        last = runs[-1]
        return [*runs, replace(last, first=last.last + 1, last=last.last + 1, begin=last.end, end=last.end + 8)]

    run = forged(clean_run, tmp_path / "gpt", longer)
    kinds = {kind for kind, _, _ in findings_of(call, run)}
    assert {"digest", "cursor"} <= kinds


def test_a_checkpoint_that_names_another_parent_is_found(clean_run: Path, tmp_path: Path, call: Call) -> None:
    run = tmp_path / "gpt"
    shutil.copytree(clean_run, run)
    for step in (30, 35, 40):
        (file,) = (run / f"step-{step:08d}").glob("manifest-*.json")
        manifest = replace(Manifest.decode(file.read_bytes(), str(file)), parent=(1, 10))
        file.write_bytes(manifest.encode())
    [(kind, between, message)] = findings_of(call, run)
    assert (kind, between) == ("lineage", [25, 30])
    assert "comes from step 20 of generation 2 by the manifest of step 25, from step 10 of generation 1" in message


def test_damaged_files_are_found(clean_run: Path, tmp_path: Path, call: Call) -> None:
    run = tmp_path / "gpt"
    shutil.copytree(clean_run, run)
    [archive] = (run / "step-00000015").glob("data-*/rank-00000.zarr.zip")
    archive.write_bytes(archive.read_bytes()[:-1])
    (manifest,) = (run / "step-00000035").glob("manifest-*.json")
    manifest.write_text(manifest.read_text().replace('"step":35', '"step":36'))
    found = findings_of(call, run)
    assert [(kind, between) for kind, between, _ in found] == [("damage", [35, 35]), ("damage", [15, 15])]
    assert archive.name in found[1][2]


def test_flipped_bits_are_found_by_a_deep_audit(clean_run: Path, tmp_path: Path, call: Call) -> None:
    run = tmp_path / "gpt"
    shutil.copytree(clean_run, run)
    [archive] = (run / "step-00000030").glob("data-*/rank-00000.zarr.zip")
    data = bytearray(archive.read_bytes())
    data[100] ^= 1
    archive.write_bytes(data)
    assert call("audit", run).exit_code == 0  # the tables are whole
    result = call("audit", run, "--deep")
    assert result.exit_code == 1
    assert "DAMAGE step 30" in result.output


def test_padding_and_dropped_samples_are_told_apart_from_repeats_and_skips(tmp_path: Path, call: Call) -> None:
    for last, padding, left_out in (("pad", 12, 0), ("drop", 0, 4), ("ragged", 0, 0)):
        run = tmp_path / last
        train(run, ranks=2, upto=15, last=last)
        train(run, ranks=4, upto=30, last=last)
        [cursor] = report_of(call, run, 0)["cursors"]
        assert sum(life["padding"] for life in cursor["lives"]) == padding, last
        assert sum(life["left_out"] for life in cursor["lives"]) == left_out, last
    assert 'but for 4 that last="drop" left out' in call("audit", tmp_path / "drop").output


def test_steps_that_are_not_global_batches_are_noted(tmp_path: Path, call: Call) -> None:
    sampler = ce.ElasticSampler(LENGTH, 8, rank=0, world_size=1)
    with ce.Checkpointer(tmp_path) as ckpt:
        for step, _ in zip((10, 20, 21), steps(sampler), strict=False):
            ckpt.save(step, {"data": sampler})
    [cursor] = report_of(call, tmp_path, 0)["cursors"]
    assert cursor["notes"] == ["from step 10 to step 20 training used 1 global batches"]


def test_a_ledger_of_more_epochs_than_can_be_gone_through_is_not_unfolded(tmp_path: Path, call: Call) -> None:
    sampler = ce.ElasticSampler(20, 20)
    epochs = 1 << 40
    state = {**sampler.state_dict(), "ledger": [[epochs, [0, 0, 0, 0, 20, 0, 1, 0]]], "epoch": epochs}
    with ce.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"data": {**state, "batches": epochs}})
    [(kind, _, message)] = findings_of(call, tmp_path)
    assert kind == "cursor"
    assert f"its ledger stands for {epochs} runs of batches; more than 4194304 are not audited" in message


def steps(sampler: ce.ElasticSampler) -> Iterator[Any]:
    yield from sampler.batches()


def test_a_run_without_a_cursor_or_without_checkpoints_is_no_clean_run(tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    with ce.Checkpointer(run, preemption=None) as ckpt:
        ckpt.save(1, {"model": np.zeros(3)})
    for path, message in ((run, "no data cursor in any checkpoint"), (tmp_path / "none", "no committed checkpoint")):
        result = call("audit", path)
        assert result.exit_code == 2
        assert message in result.stderr
