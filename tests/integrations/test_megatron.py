"""Sharded state dicts of Megatron-Core's, saved at one tensor × pipeline parallel size and loaded at others."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from jobs import run_job
from thread_ranks import Ranks

from ckptengine.errors import LoadMismatchError

pytest.importorskip("megatron.core")
from ckptengine.integrations import megatron

JOB = Path(__file__).with_name("megatron_job.py")
VOCAB = 64


def run(folder: Path, tensor: int, pipeline: int, ranks: int, *, save: bool, distributed: bool) -> None:
    options = {"path": str(folder / "saved"), "save": save, "tensor": tensor, "pipeline": pipeline,
               "distributed": distributed, "stored": VOCAB + 8 * 2}  # fmt: skip
    codes, text = run_job(JOB, options, ranks, timeout=240)
    assert codes == {0}, text[-4000:]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "optimizer"])
def test_model_and_optimizer_come_back_at_another_tensor_and_pipeline_parallel_size(tmp_path, distributed):
    run(tmp_path, 2, 2, 4, save=True, distributed=distributed)
    run(tmp_path, 4, 1, 4, save=False, distributed=distributed)
    run(tmp_path, 1, 2, 4, save=False, distributed=distributed)  # and two replicas of the data


def trained(folder: Path, lives: list[tuple[int, int, int]]) -> dict[int, float]:
    """Train in lives of tensor and pipeline parallel size and the step of the kill; return the losses."""
    folder.mkdir()
    for tensor, pipeline, kill in lives:
        options = {"run": str(folder), "tensor": tensor, "pipeline": pipeline, "kill": kill}
        codes, text = run_job(JOB.with_name("megatron_train_job.py"), options, 2, timeout=240)
        assert codes == {-signal.SIGKILL if kill else 0}, text[-4000:]
    told = [json.loads(line) for line in (folder / "losses").read_text().splitlines()]
    assert [step for step, *_ in told] == [1, 2, 3, 4, 5, 6]
    return {step: loss for step, *_, loss in told}


@pytest.mark.timeout(900)
def test_a_training_is_killed_at_one_tensor_and_pipeline_parallel_size_and_goes_on_at_another(tmp_path):
    alone = trained(tmp_path / "alone", [(2, 1, 0)])
    changed = trained(tmp_path / "changed", [(2, 1, 2), (1, 2, 4), (2, 1, 0)])
    assert changed == pytest.approx(alone, rel=1e-5)


def test_a_padded_tensor_comes_from_a_file_system_with_options_of_its_own():
    core = pytest.importorskip("megatron.core.dist_checkpointing.mapping")
    memory = pytest.importorskip("fsspec.implementations.memory")

    class Guarded(memory.MemoryFileSystem):
        protocol = "guarded"
        cachable = False

        def __init__(self, *args, token=None, **more):
            assert token == "t", "no token"
            super().__init__(*args, **more)

    sys.modules["fsspec"].register_implementation("guarded", Guarded, clobber=True)
    options = {"storage_options": {"token": "t"}}

    def padded(length):
        return {"w": core.ShardedTensor.from_rank_offsets("w", torch.ones(length), allow_shape_mismatch=True)}

    megatron.save(padded(4), "guarded://run/saved", **options)
    found = megatron.load(padded(6), "guarded://run/saved", **options)
    assert found["w"].tolist() == [1, 1, 1, 1, 0, 0]


def test_a_tensor_that_the_checkpoint_lacks_is_an_error_on_all_ranks_whichever_asks_for_it(tmp_path):
    core = pytest.importorskip("megatron.core.dist_checkpointing.mapping")
    ranks = Ranks(2)

    def tensors(rank, *names):
        return {name: core.ShardedTensor.from_rank_offsets(name, torch.ones(2), replica_id=rank) for name in names}

    def load(rank):
        with pytest.raises(LoadMismatchError, match="missing: tensors.nowhere"):
            asked = tensors(rank, "here", *["nowhere"] * rank)
            megatron.load(asked, tmp_path / "saved", comm=ranks.comms[rank], timeout=20)

    megatron.save(tensors(0, "here"), tmp_path / "saved")
    ranks.run(load)
    asked = [tensors(rank, "here") for rank in range(2)]
    for one in asked:
        one["here"].data.zero_()
    found = ranks.run(lambda rank: megatron.load(asked[rank], tmp_path / "saved", comm=ranks.comms[rank], timeout=20))
    assert [one["here"].tolist() for one in found] == [[1, 1], [1, 1]]
    ranks.end()
