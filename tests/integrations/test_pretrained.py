"""A model that was trained sharded is one of Hugging Face's, and one of Hugging Face's is loaded sharded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretrained_job import configured, logits
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import ckptengine as ce

HERE = Path(__file__).parent
RANKS = 4


def run(folder: Path, *arguments: str) -> list[dict[str, int]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{HERE.parents[1]}:{HERE}",
    }
    job = subprocess.run(
        [*command, str(HERE / "pretrained_job.py"), str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-5000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("tied", ["tied", "untied"])
def test_a_llama_trained_under_fsdp_is_opened_by_from_pretrained_and_loaded_sharded_again(
    tmp_path: Path, tied: str
) -> None:
    reports = run(tmp_path, tied)
    assert all(report["equal"] for report in reports)
    assert sum(report["read"] for report in reports) <= reports[0]["node"]  # each byte once for the node
    assert (tmp_path / "hub" / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert torch.equal(logits(model), torch.load(tmp_path / "logits.pt", weights_only=True))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_save_pretrained_wrote_comes_into_a_model_and_out_again_as_it_was(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(3)
    LlamaForCausalLM(configured(tied)).to(torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    torch.manual_seed(4)
    model = LlamaForCausalLM._from_config(configured(tied), dtype=torch.bfloat16)
    assert ce.load(tmp_path / "theirs", into={"model": model}, rename={"": "model"}).complete
    assert torch.equal(logits(model), logits(expected))
    ce.save(tmp_path / "point", {"model": model})
    ce.export(tmp_path / "point", tmp_path / "ours", rename={"model": ""}, max_shard_size="60KB")
    model.config.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(expected))
