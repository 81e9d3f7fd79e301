"""The Trainer of Transformers: killed in mid-epoch and started again, it ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_job as job
import transformers
from lives import KILLED, life, lives

import ckptengine as ce
from ckptengine.errors import CheckpointNotFoundError, StateError
from ckptengine.integrations.trainer_place import checked_arguments
from ckptengine.integrations.transformers import Resume


def run(place: Path, name: str, settings: dict[str, Any], code: int = 0) -> str:
    """Run a life of the job `name` and return what it has printed."""
    log = place / f"{name}.log"
    ended = life(lambda: job.train(place / name, place / f"{name}.out", settings), log)
    text = log.read_text()
    assert ended == code, text
    return text


def result(place: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(place / f"{name}.out-{rank}.pt", weights_only=False)
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what differs by a bit."""
    tensors, others = one.pop("tensors"), other.pop("tensors")
    assert tensors.keys() == others.keys()
    assert any(name.startswith("optimizer") for name in tensors)
    wrong = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    wrong += ["random"] if not torch.equal(one.pop("random"), other.pop("random")) else []
    return wrong + [name for name in one if one[name] != other[name]]


def ends_alike(place: Path, settings: dict[str, Any], kills: Sequence[int]) -> None:
    """Run a job through, and once more with a SIGKILL at some steps, and compare."""
    run(place, "through", settings)
    for step in kills:
        run(place, "killed", settings | {"kill": step}, KILLED)
    run(place, "killed", settings)
    assert differing(result(place, "through"), result(place, "killed")) == []


def test_a_job_that_is_killed_in_three_epochs_ends_with_the_weights_losses_and_random_streams_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    """Dropout and random masks draw from one stream, of which the loader is a batch ahead; logs are every 3 steps."""
    ends_alike(tmp_path, {}, [6, 17, 25])


ACCUMULATION = {"gradient_accumulation_steps": 3, "save_steps": 3, "logging_steps": 2}
EDGES = {"save_steps": 11, "eval_strategy": "epoch", "logging_strategy": "epoch"}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1}


@pytest.mark.parametrize(
    ("args", "kill"),
    [
        pytest.param(ACCUMULATION, 5, id="gradient-accumulation"),
        pytest.param({"train_sampling_strategy": "group_by_length"}, 17, id="grouped-by-length"),
        pytest.param({"accelerator_config": {"use_seedable_sampler": False}}, 17, id="torch's-own-random-sampler"),
        pytest.param(EDGES, 11, id="killed-between-an-epoch's-last-step-and-its-end"),
        pytest.param(EPOCHS, 17, id="saves-and-evaluations-at-the-ends-of-epochs"),
    ],
)
def test_so_it_does_with(tmp_path: Path, args: dict[str, Any], kill: int) -> None:
    ends_alike(tmp_path, {"args": args}, [kill])


def test_so_it_does_with_a_stream_that_gives_the_same_samples_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"stream": True, "masks": False, "args": {"max_steps": 16}}
    ends_alike(tmp_path, settings, [13])  # in the second pass over the data
    args = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
    job.Trainer(job.tiny_model(), args, train_dataset=job.Stream(job.Texts(4)))
    assert "IterableDataset" in caplog.text


def test_so_it_does_with_persistent_loader_workers_that_draw_nothing(tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    ends_alike(tmp_path, {"args": workers, "masks": False}, [17])


def run_ranks(place: Path, name: str, settings: dict[str, Any], codes: list[int]) -> None:
    log = place / f"{name}.log"
    jobs = [lambda: job.train(place / name, place / f"{name}.out", settings)] * 2
    assert lives(jobs, log) == codes, log.read_text()


def test_two_ranks_of_which_one_is_killed_are_restarted_by_torchrun_and_end_alike(tmp_path: Path) -> None:
    settings = {"args": {"save_steps": 2, "num_train_epochs": 2, "ddp_backend": "gloo"}}
    run_ranks(tmp_path, "through", settings, [0, 0])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--max-restarts=1"]
    command += [job.__file__, str(tmp_path / "killed"), str(tmp_path / "killed.out")]
    command += [json.dumps(settings | {"kill": 9, "rank": 1})]
    tests = Path(__file__).parents[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    env["PYTHONPATH"] = f"{tests.parent}:{tests / 'support'}"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exitcode: -9" in done.stderr
    for rank in range(2):
        assert differing(result(tmp_path, "through", rank), result(tmp_path, "killed", rank)) == []


def test_on_one_rank_with_batches_of_twice_the_size_the_data_goes_on_at_the_same_sample(tmp_path: Path) -> None:
    """With 20 samples: two ranks stop 12 samples into an epoch; where 12 samples are no whole batches it is refused."""
    settings = {"samples": 20, "masks": False, "args": {"save_steps": 3, "num_train_epochs": 2, "ddp_backend": "gloo"}}
    assert KILLED in lives(
        [lambda: job.train(tmp_path / "run", tmp_path / "out", settings | {"kill": 8})] * 2, tmp_path / "two.log"
    )
    args = {"save_steps": 3, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    assert "no place in this data" in run(tmp_path, "run", settings | {"args": args}, 1)
    args["per_device_train_batch_size"] = 4
    run(tmp_path, "run", settings | {"args": args, "seen": True})
    order = torch.randperm(20, generator=torch.Generator().manual_seed(43)).tolist()  # the seed, and epoch 1
    seen = [json.loads(line) for line in (tmp_path / "run.out-0.samples").read_text().splitlines()]
    assert seen == [order[4:8], order[8:12], order[12:16], order[16:20]]


def test_a_job_that_gets_sigterm_ends_with_75_and_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = {"args": {"save_strategy": "no", "num_train_epochs": 2}}
    run(tmp_path, "through", settings)
    run(tmp_path, "killed", settings | {"kill": 14, "signal": signal.SIGTERM}, 75)
    (saved,) = (tmp_path / "killed").glob("step-*")
    assert int(saved.name[5:]) == 15  # the next step
    run(tmp_path, "killed", settings)
    assert differing(result(tmp_path, "through"), result(tmp_path, "killed")) == []


def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_taken_with_its_place_in_the_data(
    tmp_path: Path,
) -> None:
    settings = {"args": {"num_train_epochs": 2}}
    run(tmp_path, "through", settings)
    run(tmp_path, "killed", settings | {"kill": 17}, KILLED)
    newest = tmp_path / "killed" / "step-00000016"
    (archive,) = newest.glob("data-*/rank-*.zip")
    data, weight = bytearray(archive.read_bytes()), ce.load(newest)["model"]["transformer.ln_f.weight"].tobytes()
    data[data.index(weight)] ^= 1  # the Trainer's place in the data is sound, and read first
    archive.write_bytes(data)
    assert run(tmp_path, "killed", settings).count("'epoch': '1.364'") == 2  # step 15, in both lives
    assert differing(result(tmp_path, "through"), result(tmp_path, "killed")) == []


def test_a_job_that_was_stopped_early_trains_nothing_when_it_is_started_again(tmp_path: Path) -> None:
    """The callback's patience is resumed as well; and the weights at the end are those of the best checkpoint."""
    args: dict[str, Any] = {
        "save_steps": 4,
        "eval_steps": 4,
        "eval_strategy": "steps",
        "learning_rate": 0.3,
        "save_total_limit": 1,
    }
    args |= {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    settings = {"args": args, "early": [{"early_stopping_patience": 2}]}
    run(tmp_path, "through", settings)
    run(tmp_path, "killed", settings | {"kill": 9}, KILLED)
    for _ in range(2):
        run(tmp_path, "killed", settings)
        assert differing(result(tmp_path, "through"), result(tmp_path, "killed")) == []
    found = result(tmp_path, "killed")
    losses = {one["step"]: one["eval_loss"] for one in found["log"] if "eval_loss" in one}
    best = min(losses, key=lambda step: losses[step])
    assert found["step"] == best + 8 < 33
    # Of a checkpoint that was being deleted when the process was killed, data may be left.
    kept = sorted(path.parent.name for path in (tmp_path / "killed").glob("step-*/manifest-*"))
    assert kept == [f"step-{step:08d}" for step in (best, best + 8)]
    weights = ce.load(tmp_path / "killed" / f"step-{best:08d}", as_torch=True)["model"]
    assert all(torch.equal(weights[name], found["tensors"][f"model.{name}"]) for name in weights)


def test_adapters_alone_are_kept_of_a_peft_model(tmp_path: Path) -> None:
    ends_alike(tmp_path, {"peft": True, "args": {"num_train_epochs": 2}}, [17])
    assert set(ce.load(tmp_path / "killed")["adapters"]) == {"default"}
    assert "model" not in ce.load(tmp_path / "killed")


def test_transformers_own_checkpoint_is_where_a_run_begins_once_and_only_if_asked(tmp_path: Path) -> None:
    settings = {"args": {"num_train_epochs": 2}, "masks": False}
    run(tmp_path, "run", settings | {"plain": True, "kill": 9}, KILLED)  # checkpoint-4, checkpoint-8
    assert "CheckpointNotFoundError" in run(tmp_path, "run", settings, 1)
    run(tmp_path, "run", settings | {"from": True, "kill": 13}, KILLED)
    assert os.path.isdir(tmp_path / "run" / "step-00000012")
    assert not os.path.isdir(tmp_path / "run" / "step-00000008")
    run(tmp_path, "run", settings | {"from": True})
    run(tmp_path, "through", settings | {"plain": True})
    ours, theirs = result(tmp_path, "run"), result(tmp_path, "through")
    assert [name for name in ours["tensors"] if not torch.equal(ours["tensors"][name], theirs["tensors"][name])] == []


def test_a_run_goes_back_to_a_step_that_is_named_or_begins_anew(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"args": {"num_train_epochs": 2}}
    run(tmp_path, "through", settings)
    for begin in (str(tmp_path / "killed" / "step-00000008"), False):
        run(tmp_path, "killed", settings | {"kill": 17}, KILLED)
        run(tmp_path, "killed", settings | {"from": begin})
        assert differing(result(tmp_path, "through"), result(tmp_path, "killed")) == []
        shutil.rmtree(tmp_path / "killed")


def test_a_run_that_has_ended_in_mid_epoch_trains_the_rest_of_it_when_it_gets_more_steps(tmp_path: Path) -> None:
    args = {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
    run(tmp_path, "through", {"args": args | {"max_steps": 14}})
    run(tmp_path, "killed", {"args": args | {"max_steps": 5}})
    run(tmp_path, "killed", {"args": args | {"max_steps": 14}})
    through, killed = result(tmp_path, "through"), result(tmp_path, "killed")
    assert all(torch.equal(value, killed["tensors"][name]) for name, value in through["tensors"].items())


def test_what_a_job_cannot_be_resumed_with_is_refused_by_name(tmp_path: Path) -> None:
    def made(**args: Any) -> Any:
        settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        return job.Trainer(job.tiny_model(), transformers.TrainingArguments(**settings | args), train_dataset=[])

    for name in ("save_only_model", "ignore_data_skip", "auto_find_batch_size", "enable_jit_checkpoint"):
        with pytest.raises(StateError, match=name):
            made(**{name: True})
    trainer = made()
    trainer.is_fsdp_enabled = True  # Accelerate enables it on devices only
    with pytest.raises(StateError, match="fsdp: it is not supported yet; FSDP1 and FSDP2 are, in a loop of your own"):
        checked_arguments(trainer)
    with pytest.raises(StateError, match="hyperparameter search"):
        made().train(trial=object())
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        made().train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointNotFoundError, match="neither a step of"):
        made().train(resume_from_checkpoint="elsewhere/step-00000004")
    with pytest.raises(TypeError, match="Resume must come first"):
        type("Wrong", (transformers.Trainer, Resume), {})
