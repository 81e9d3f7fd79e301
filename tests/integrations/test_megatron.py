"""Sharded state dicts of Megatron-Core's, saved at one tensor × pipeline parallel size and loaded at others."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import run_job

pytest.importorskip("megatron.core")

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
