"""Sharded state dicts of Megatron-Core's, saved at one tensor × pipeline parallel size and loaded at others."""

from __future__ import annotations

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
