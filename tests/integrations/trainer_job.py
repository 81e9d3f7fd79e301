"""A small training by the Trainer of Transformers, with random masks, dropout and logs; one job of one or more ranks.

`trainer_job.py RUN OUT SETTINGS`: SETTINGS is JSON, with `args` for TrainingArguments and `kill`, the step after which
the process gets SIGKILL, once a checkpoint is committed. OUT gets what the training ended with.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch
import transformers
from agreed import Agreed
from torch.utils.data import Dataset

from ckptengine.integrations.transformers import Resume

torch.set_num_threads(1)


class Texts(Dataset):  # type: ignore[type-arg]
    """Made texts: sample n is a function of n."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self._samples:
            raise IndexError(index)
        length = 4 + index % 5
        words = np.random.default_rng(index).integers(1, 60, length)
        return {"input_ids": words.tolist(), "number": index}


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """The same texts without a place to go back to."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def __iter__(self) -> Any:
        return iter(self._texts)


class Collator:
    """Pads, hides words at random, from torch's global stream, and writes down the numbers of the samples."""

    def __init__(self, masks: bool, seen: Path | None) -> None:
        self._masks, self._seen = masks, seen

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(one["input_ids"]) for one in samples)
        words = torch.tensor([one["input_ids"] + [0] * (width - len(one["input_ids"])) for one in samples])
        if self._seen is not None:
            with self._seen.open("a") as file:
                file.write(json.dumps([one["number"] for one in samples]) + "\n")
        hidden = torch.rand(words.shape) < 0.2 if self._masks else torch.zeros_like(words, dtype=torch.bool)
        return {"input_ids": words.masked_fill(hidden, 0), "labels": words, "attention_mask": (words > 0).long()}


class Kill(transformers.TrainerCallback):  # type: ignore[misc]
    """Sends the process a signal after a step, once something is committed, and waits until it has heard it."""

    def __init__(self, trainer: Any, step: int, number: int) -> None:
        self._trainer, self._step, self._signal = trainer, step, number

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)

    def _look(self, step: int) -> None:
        if step >= self._step:
            if isinstance(self._trainer, Resume):
                self._trainer._checkpointer.wait()
            agreed = Agreed()
            os.kill(os.getpid(), self._signal)
            agreed.wait()
            self._step = sys.maxsize


class Trainer(Resume, transformers.Trainer):  # type: ignore[misc]
    """What a user writes."""


def tiny_model() -> Any:
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, task_type="CAUSAL_LM"))


def train(run: Path, out: Path, settings: dict[str, Any]) -> None:
    """Train, and write what came out."""
    rank = int(os.environ.get("RANK", "0"))
    args = {
        "output_dir": str(run), "per_device_train_batch_size": 2, "num_train_epochs": 3, "logging_steps": 3,
        "save_steps": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
        "learning_rate": 1e-2,
    }  # fmt: skip
    seen = out.with_name(f"{out.name}-{rank}.samples") if settings.get("seen") else None
    texts = Texts(settings.get("samples", 22))
    kind = transformers.Trainer if settings.get("plain") else Trainer
    trainer = kind(
        adapted(tiny_model()) if settings.get("peft") else tiny_model(),
        transformers.TrainingArguments(**args | settings.get("args", {})),
        train_dataset=Stream(texts) if settings.get("stream") else texts,
        eval_dataset=Texts(6),
        data_collator=Collator(settings.get("masks", True), seen),
        callbacks=[transformers.EarlyStoppingCallback(**one) for one in settings.get("early", [])],
        **settings.get("resume", {}),
    )
    kill, again = settings.get("kill"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if kill is not None and rank == settings.get("rank", 0) and not again:
        trainer.add_callback(Kill(trainer, kill, settings.get("signal", signal.SIGKILL)))
    result = trainer.train(settings.get("from"))
    optimizer = trainer.optimizer.optimizer.state_dict()["state"]
    tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    tensors |= {
        f"optimizer.{n}.{name}": torch.as_tensor(value) for n, one in optimizer.items() for name, value in one.items()
    }
    torch.save(
        {
            "tensors": tensors,
            "log": [{k: v for k, v in one.items() if not timing(k)} for one in trainer.state.log_history],
            "step": trainer.state.global_step,
            "loss": result.training_loss,
            "random": torch.get_rng_state(),
            "scheduler": trainer.lr_scheduler.state_dict()["last_epoch"],
        },
        out.with_name(f"{out.name}-{rank}.pt"),
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def timing(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
