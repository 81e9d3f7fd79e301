"""What people do by mistake with a run: each is told at once, with what to do, and nothing is lost by it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forkserver import fork
from launch import environment

import ckptengine as ce
import ckptengine.zarr
from ckptengine.catalog import life as life_module
from ckptengine.comm.process import Process
from ckptengine.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    RunInUseError,
    StateError,
)
from ckptengine.inspect import describe, list_run


def state_at(step: int) -> dict[str, Any]:
    return {"a": np.arange(3000.0) + step, "step": step}


def save_steps(run: Path, *steps: int) -> None:
    with ce.Checkpointer(run, every=1) as ckpt:
        for step in steps:
            ckpt.step(step, state_at(step))


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=100, check=False, **options
    )


# The end of a job.


class Unsaveable:
    """An object whose `state_dict` fails on demand."""

    fails = False

    def state_dict(self) -> dict[str, Any]:
        if self.fails:
            raise RuntimeError("not now")
        return {"value": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


FAILS_AT_THE_END = """
import sys
import numpy as np
import ckptengine as ce

class Object:
    fails = False
    def state_dict(self):
        if self.fails:
            raise RuntimeError("not now")
        return {"value": 1}
    def load_state_dict(self, state):
        pass

one = Object()
with ce.Checkpointer(sys.argv[1], every=1) as ckpt:
    ckpt.step(1, {"one": one})
    one.fails = True
    ckpt.step(2, {"one": one})
"""


def test_a_job_whose_last_save_failed_ends_with_an_error(tmp_path: Path) -> None:
    job = python(FAILS_AT_THE_END, tmp_path)
    assert job.returncode == 1
    assert "SaveFailedError: the last save of this job failed" in job.stderr
    assert "not now" in job.stderr
    assert "step 1 is the last one committed" in job.stderr


def test_a_failed_save_that_a_later_one_made_good_is_no_error_at_the_end(tmp_path: Path) -> None:
    one = Unsaveable()
    with ce.Checkpointer(tmp_path, every=1) as ckpt:
        ckpt.step(1, {"one": one})
        one.fails = True
        assert ckpt.step(2, {"one": one}) is None, "a state that can't be saved in mid-run is a failed save"
        one.fails = False
        ckpt.step(3, {"one": one})
    assert [each.step for each in list_run(tmp_path)] == [1, 3]


def test_what_can_never_be_saved_is_raised_at_the_first_save(tmp_path: Path) -> None:
    one = Unsaveable()
    one.fails = True
    with ce.Checkpointer(tmp_path, every=1) as ckpt, pytest.raises(StateError, match="not now"):
        ckpt.step(1, {"one": one})


def test_a_closed_checkpointer_says_so(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path, every=1) as ckpt:
        ckpt.step(1, state_at(1))
    for call in (
        lambda: ckpt.step(2, state_at(2)),
        lambda: ckpt.save(2, state_at(2)),
        lambda: ckpt.restore(state_at(0)),
        lambda: ckpt.warm_start(tmp_path, state_at(0)),
    ):
        with pytest.raises(CheckpointError, match="this Checkpointer is closed"):
            call()
    ckpt.close()  # once more does nothing


# Where things lie.


def test_places_of_a_run_that_lie_in_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_steps(tmp_path / "run", 1, 2, 3)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for local in ("run", "run/../run", "link", "link/local", tmp_path):
        with pytest.raises(ValueError, match="run=.*(is the same directory as|lies inside of)|local=.*(same|inside)"):
            ce.Checkpointer("run", every=1, keep_last=1, local=local)
    with pytest.raises(ValueError, match="memory=.* lies inside of run="):
        shm = Path(f"/dev/shm/life-{os.getpid()}")
        ce.Checkpointer(shm, memory=shm) if shm.mkdir() is None else None
    os.rmdir(shm)
    assert [one.step for one in list_run("run")] == [1, 2, 3]
    assert not (tmp_path / "run" / "local").exists()
    with ce.Checkpointer("run", every=1, local="other") as ckpt:
        assert ckpt.restore(state_at(0)) == 3


def test_the_home_directory_is_expanded_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with ce.Checkpointer("~/run", every=1, local="~/local", preemption=ce.Preemption(file="~/stop")) as ckpt:
        ckpt.step(1, state_at(1))
    ce.save("~/single", state_at(2))
    assert ce.load("~/single")["step"] == 2
    assert ce.load("~/run/step-1")["step"] == 1
    assert ckptengine.zarr.open("~/run")["state/a"][0] == 1
    assert call("ls", "~/run").exit_code == 0
    assert call("prefetch", "~/run", "~/fetched").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["fetched", "local", "run", "single"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_a_checkpoint_has_one_name_everywhere(tmp_path: Path, call: Any) -> None:
    run = tmp_path / "run"
    save_steps(run, 39, 40, 41)
    for name in (run / "step-40", f"{run}/step-40/", run / "step-00000040"):
        assert ce.load(name)["step"] == 40
        assert ckptengine.zarr.open(name)["state/a"][0] == 40
        assert describe(name).step == 40
        assert call("show", name).exit_code == 0
    assert ce.load(run, step=40)["step"] == 40
    assert ckptengine.zarr.open(run, step=40)["state/a"][0] == 40
    into = state_at(0)
    ce.load(run, into=into, step=39)
    assert into["step"] == 39
    with ce.Checkpointer(tmp_path / "other") as ckpt:
        ckpt.warm_start(run / "step-39", into := state_at(0), only=["a"])
    assert into["a"][0] == 39
    with pytest.raises(CheckpointNotFoundError, match="step-00000007"):
        ce.load(run, step=7)
    with pytest.raises(ValueError, match="names a step itself"):
        ce.load(run / "step-39", step=40)


# Runs that can't be written to, and those that another job writes to.

READ_ONLY = """
import os, sys
import numpy as np
import ckptengine as ce

ce.load(sys.argv[1]), ce.Checkpointer  # what is imported late: the other user may not be able to read it
os.setgid(65534)
os.setuid(65534)
state = {"a": np.zeros(3000), "step": 0}
assert ce.load(sys.argv[1])["step"] == 2
ckpt = ce.Checkpointer(sys.argv[1], every=10)
assert ckpt.restore(state) == 2
assert state["a"][0] == 2
try:
    ckpt.step(3, state)
except ce.errors.StorageError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up its rights")
def test_a_run_that_can_be_read_only_is_restored_from_and_the_first_step_says_what_is_wrong() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # other users may look into it
        run = Path(folder) / "run"
        save_steps(run, 1, 2)
        Path(folder).chmod(0o755)
        for path in (run, *run.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        job = python(READ_ONLY, run)
    assert job.returncode == 0, job.stderr
    assert "was opened only to restore from it" in job.stdout
    assert "Permission denied" in job.stdout


WRITES = """
import sys, time
import numpy as np
import ckptengine as ce

ckpt = ce.Checkpointer(sys.argv[1], every=1)
ckpt.step(1, {"a": np.arange(3000.0), "step": 1})
ckpt.wait()
print("saved", flush=True)
time.sleep(300)
"""


def test_a_second_job_is_told_of_a_living_one_and_takes_over_at_once_when_that_has_died(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path)], env=environment(), stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"saved\n"
        with ce.Checkpointer(tmp_path, every=100) as ckpt:
            assert ckpt.restore(state_at(0)) == 1, "reading beside a writer is fine"
            with pytest.raises(RunInUseError, match=f"process {first.pid} on {Process.this().host} has been writing"):
                ckpt.step(2, state_at(2))
        first.kill()
        # Not waited for: what is left of a process that has ended is no living writer.
        deadline = time.monotonic() + 60
        while Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with ce.Checkpointer(tmp_path, every=1) as ckpt:
            assert ckpt.restore(state_at(0)) == 1
            ckpt.step(2, state_at(2))
    finally:
        first.kill()
        first.wait()
        assert first.stdout is not None
        first.stdout.close()
    assert [one.step for one in list_run(tmp_path)] == [1, 2]
    assert not (tmp_path / "writer.json").exists(), "a job that has ended lets go of its run"


def of_another_machine(run: Path) -> Path:
    run.mkdir()
    lease = run / "writer.json"
    elsewhere = dataclasses.replace(Process.this(), host="node-7", boot="another", pid=4711)
    lease.write_text(json.dumps({**elsewhere.to_json(), "id": "x"}))
    return lease


def test_a_writer_on_another_machine_is_taken_over_when_its_lease_has_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(life_module, "LIFE_SECONDS", 3.0)
    lease = of_another_machine(tmp_path / "run")
    save_steps(tmp_path / "run", 1)
    assert "process 4711 on node-7 was writing to it and may have ended" in caplog.text
    assert [one.step for one in list_run(tmp_path / "run")] == [1]
    assert not lease.exists()


def test_a_writer_on_another_machine_that_renews_its_lease_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = of_another_machine(tmp_path / "run")
    monkeypatch.setattr(life_module.time, "sleep", lambda seconds: os.utime(lease, (time.time() + 5,) * 2))
    with (
        pytest.raises(RunInUseError, match="process 4711 on node-7"),
        ce.Checkpointer(tmp_path / "run", every=1) as ckpt,
    ):
        ckpt.step(1, state_at(1))
    assert lease.exists()


# Another format's directory.

FOREIGN = {
    "DCP": [".metadata", "__0_0.distcp"],
    "DCP in a step": ["step-1000/.metadata", "step-1000/__0_0.distcp"],
    "Hugging Face Trainer": ["checkpoint-500/trainer_state.json", "checkpoint-500/model.safetensors"],
    "Lightning": ["lightning_logs/version_0/checkpoints/epoch=3-step=100.ckpt"],
    "torch.save": ["checkpoint_10.pt"],
    "Orbax": ["100/_CHECKPOINT_METADATA", "100/default/manifest.ocdbt"],
    "Megatron-LM": ["latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"],
    "DeepSpeed": ["latest", "global_step10/mp_rank_00_model_states.pt"],
    "Accelerate": ["checkpoints/checkpoint_0/random_states_0.pkl"],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_librarys_checkpoint_where_the_run_should_be_is_told(name: str, tmp_path: Path) -> None:
    for file in FOREIGN[name]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    library = name.removesuffix(" in a step")
    with (
        ce.Checkpointer(tmp_path) as ckpt,
        pytest.raises(CheckpointNotFoundError, match=f"holds .*{library}.*does not read it. To go on with it"),
    ):
        ckpt.restore(state_at(0))
    # A load reads DCP's directories: it says what is wrong with this one.
    error, words = (CheckpointDamagedError, ".metadata") if name == "DCP" else (CheckpointNotFoundError, "holds .*")
    with pytest.raises(error, match=words if name == "DCP" else f"{words}{library}"):
        ce.load(tmp_path, into=state_at(0))


def test_weights_where_the_run_should_be_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "config.json").write_bytes(b"{}")
    with ce.Checkpointer(tmp_path, every=1) as ckpt:
        assert ckpt.restore(state_at(0)) is None
        ckpt.step(1, state_at(1))
    assert "holds weights as safetensors (model.safetensors)" in caplog.text
    caplog.clear()
    with ce.Checkpointer(tmp_path, every=1) as ckpt:
        assert ckpt.restore(state_at(0)) == 1
    assert not caplog.records, "once there is a checkpoint of ours there is nothing to tell"


def test_a_file_in_place_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointNotFoundError, match=r"model.gguf holds weights as GGUF"):
        ce.load(tmp_path / "model.gguf")


# Steps, lives, arguments.


def test_steps_that_begin_anew_in_each_epoch_are_told_to_be_counted_over_epochs(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path, every=10) as ckpt, pytest.raises(ValueError, match="count them over all epochs"):
        for _ in range(2):
            for step in range(1, 16):
                ckpt.step(step, state_at(step))
    assert [one.step for one in list_run(tmp_path)] == [10]


def test_parts_that_are_read_again_begin_no_other_life(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    with ce.Checkpointer(tmp_path, every=1) as ckpt:
        state = state_at(0)
        assert ckpt.restore(state, step=2) == 2
        state["a"][:] = 0
        assert ckpt.restore(state, only=["a"]) == 2, "what the job stands at, not the newest of an abandoned branch"
        assert state["a"][0] == 2
        ckpt.step(3, state_at(3))
        ckpt.wait()
        assert ckpt.restore(state, only="a") == 3
        ckpt.step(4, state_at(4))
    found = {(one.generation, one.step): one.parent for one in list_run(tmp_path)}
    assert found[2, 3] == found[2, 4] == (1, 2)
    assert max(generation for generation, _ in found) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": "3"}, "keep_last='3': give how many checkpoints to keep"),
        ({"keep_last": {"run": 0}}, r"keep_last\['run'\]=0"),
        ({"keep_every": "3"}, "keep_every='3'"),
        ({"timeout": "5"}, "timeout='5': give a number of seconds"),
        ({"timeout": 0}, "timeout=0: give a number of seconds above 0"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"preemption": False}, "preemption=False: give a ckptengine.Preemption, or None"),
        ({"comm": "gloo"}, "comm='gloo': give ckptengine.SingleProcess"),
        ({"max_failures": None}, "max_failures=None"),
        ({"on_error": "ignore"}, "on_error='ignore': give 'warn' or 'raise'"),
        ({"when_busy": True}, "when_busy=True"),
        ({"local": 3}, "local=3: give a directory"),
        ({"memory": 3}, "memory=3: give a directory"),
        ({"arena_nbytes": 1.5}, "arena_nbytes=1.5"),
    ],
)
def test_an_argument_that_makes_no_sense_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ce.Checkpointer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_arguments_of_step_that_make_no_sense_are_named(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path, every=1) as ckpt:
        with pytest.raises(TypeError, match=r"the two are swapped: write step\(number, state\)"):
            ckpt.step({"a": 1}, 3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="state is of type list: give a dict"):
            ckpt.step(3, [1])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="step='3' is of type str"):
            ckpt.save("3", {"a": 1})  # type: ignore[arg-type]
    for wrong in ("5", -1):
        with pytest.raises((TypeError, ValueError), match="timeout="):
            ce.save(tmp_path / "single", {"a": 1}, timeout=wrong)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match="timeout="):
            ce.load(tmp_path, timeout=wrong)  # type: ignore[arg-type]


def test_a_single_process_meets_nobody(tmp_path: Path) -> None:
    with ce.Checkpointer(tmp_path, every=1, comm=ce.SingleProcess()) as ckpt:
        ckpt.step(1, state_at(1))
    ce.save(tmp_path / "single", state_at(2), comm=ce.SingleProcess())
    assert ce.load(tmp_path / "single")["step"] == 2


SPAWNED = """
import os, sys
import torch.distributed as dist
import torch.multiprocessing as mp
import ckptengine as ce

def train(rank, folder):
    ckpt = ce.Checkpointer(folder + "/run", every=1)
    dist.init_process_group("gloo", init_method="file://" + folder + "/meeting", rank=rank, world_size=2)
    try:
        ckpt.step(1, {"a": 1})
    except ce.errors.CheckpointError as error:
        open(f"{folder}/said-{rank}", "w").write(str(error))
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(train, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_a_checkpointer_made_before_the_ranks_have_met_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "job.py").write_text(SPAWNED)
    command = [str(tmp_path / "job.py"), str(tmp_path)]
    with fork(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        printed, _ = job.communicate(150)
        assert job.wait() == 0, printed
    for rank in (0, 1):
        said = (tmp_path / f"said-{rank}").read_text()
        assert f"was made for 1 rank(s), and now there are 2, of which this is rank {rank}" in said
        assert "pass comm=ckptengine.SingleProcess()" in said
    assert not list((tmp_path / "run").glob("step-*"))
