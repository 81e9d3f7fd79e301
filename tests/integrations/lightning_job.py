"""A training with Lightning's Trainer, as a script: `lightning_job.py OPTIONS`, a JSON object.

It notes each step's samples and loss in `log`, kills itself at batch `kill` of all (once a checkpoint is committed),
and writes a digest of all that was trained to `end` when it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from agreed import Agreed
from dying import die
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import ckptengine as ce
from ckptengine.integrations.lightning import CheckpointIO, Resume

OPTIONS: dict[str, Any] = json.loads(sys.argv[1])
RANK = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
AGREED = Agreed()
warnings.filterwarnings("ignore")


class Samples(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """40 samples; the main process adds noise from the global stream, as augmentation does."""

    def __len__(self) -> int:
        return OPTIONS.get("samples", 40)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        x = torch.tensor(np.random.RandomState(index).rand(8), dtype=torch.float32)
        if OPTIONS.get("noise") and torch.utils.data.get_worker_info() is None:
            x += 0.01 * torch.rand(8) + 0.01 * random.random()
        return x, x.sum().reshape(1), index


class Model(pl.LightningModule):
    """Two layers with dropout and batch norm, a metric of the epoch, AdamW, a warm-up and a plateau."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)
        )
        self.error = torchmetrics.MeanSquaredError()
        self.count = 0

    def configure_model(self) -> None:
        if OPTIONS.get("strategy") == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            if not isinstance(self.net[0].weight, torch.distributed.tensor.DTensor):
                for layer in (self.net[0], self.net[3], self.net):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if OPTIONS.get("loader") == "combined":
            batch = [*batch[0][:2], torch.cat([batch[0][2], batch[1][2]])]
        x, y, indices = batch
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if total == OPTIONS.get("kill") and not Path(OPTIONS["killed"]).exists():
            die(OPTIONS)
        if total == OPTIONS.get("tell") and not Path(OPTIONS["killed"]).exists():
            if RANK == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            else:  # rank 1 waits for its gradients
                AGREED.wait()
                Path(OPTIONS["killed"]).touch()
        out = self.net(x)
        loss = torch.nn.functional.mse_loss(out, y)
        self.error(out.detach(), y)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("error", self.error, on_step=False, on_epoch=True)
        self.count += 1
        with open(f"{OPTIONS['log']}.{RANK}", "a") as file:
            file.write(json.dumps([total, self.current_epoch, batch_idx, indices.tolist(), loss.item().hex()]) + "\n")
        return loss

    def on_train_epoch_end(self) -> None:
        seen = {name: value.item().hex() for name, value in self.trainer.callback_metrics.items()}
        with open(f"{OPTIONS['log']}.epochs.{RANK}", "a") as file:
            file.write(json.dumps([self.current_epoch, seen]) + "\n")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(x), y), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["count"] = self.count

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.count = checkpoint["count"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if OPTIONS.get("one_cycle"):  # which has the trainer make the loaders before anything is restored
            steps = self.trainer.estimated_stepping_batches
            one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
            return [optimizer], [{"scheduler": one_cycle, "interval": "step"}]
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return [optimizer], [
            {"scheduler": warm, "interval": "step"},
            {"scheduler": plateau, "interval": "epoch", "monitor": "loss_epoch"},
        ]

    def on_train_start(self) -> None:
        torch.rand(3)  # what is drawn between the restore and the first batch changes nothing


class Manual(Model):
    """Two optimizers that are stepped by hand, the second every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 3 == 0:
            second.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.net[0].parameters(), lr=0.01), torch.optim.SGD(self.net[3].parameters(), 0.01)]


class Bad(Model):
    """A module whose hook can't be kept."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if OPTIONS["bad"] == "replaces":
            checkpoint["state_dict"]["net.0.weight"] = torch.zeros(16, 8)
        if OPTIONS["bad"] == "object":
            checkpoint["thing"] = object()


class Endless(IterableDataset[torch.Tensor]):
    """Samples without a position."""

    def __iter__(self) -> Any:
        return iter(Samples()[number] for number in range(40))


def train_loader(workers: int) -> Any:
    """Return the training loader that is asked for."""
    kind, options = OPTIONS.get("loader"), {"batch_size": 4, "shuffle": True, "num_workers": workers}
    if kind == "stateful":
        return StatefulDataLoader(Samples(), **options)
    if kind == "stateful with a generator":
        return StatefulDataLoader(Samples(), generator=torch.Generator().manual_seed(9), **options)
    if kind == "generator":
        return DataLoader(Samples(), generator=torch.Generator().manual_seed(9), **options)
    if kind == "weighted":
        sampler = WeightedRandomSampler([1.0] * 40, 40, generator=torch.Generator().manual_seed(9))
        return DataLoader(Samples(), batch_size=4, sampler=sampler, num_workers=workers)
    if kind == "combined":
        return CombinedLoader([DataLoader(Samples(), **options), DataLoader(Samples(), **options)], "min_size")
    return DataLoader(Samples(), **options)


def strategy() -> Any:
    kind = OPTIONS.get("strategy", "auto")
    if OPTIONS.get("bad") == "fsdp1":
        trainer = type("FSDPStrategy", (pl.strategies.SingleDeviceStrategy,), {})  # the real one wants a GPU
        return trainer(device=torch.device("cpu"))
    if kind == "fsdp2":
        return pl.strategies.ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        )
    return pl.strategies.DDPStrategy(process_group_backend="gloo") if kind == "ddp" else kind


def main() -> None:
    """Train, or go on."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    pl.seed_everything(3)
    bad = OPTIONS.get("bad")
    model = Bad() if bad in ("replaces", "object") else Manual() if OPTIONS.get("manual") else Model()
    ranks = OPTIONS.get("ranks", 1)
    resume = Resume(
        OPTIONS["run"], **OPTIONS.get("resume", {"every": 3}), state={"model": model} if bad == "name" else None
    )
    keep = OPTIONS.get("plugin") and ModelCheckpoint(OPTIONS["run"], every_n_train_steps=3, save_last=True)
    more = [Resume(f"{OPTIONS['run']} 2")] if bad == "twice" else []
    averaging = [EMAWeightAveraging(decay=0.9)] if OPTIONS.get("averaging") else []
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy(),
        max_epochs=OPTIONS.get("epochs", 3),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=not OPTIONS.get("elastic"),
        callbacks=[keep or resume, EarlyStopping("val_loss", patience=50), *averaging, *more],
        plugins=[CheckpointIO(background=True)] if OPTIONS.get("plugin") == "ours" else [],
        **OPTIONS.get("trainer", {}),
    )
    workers = OPTIONS.get("workers", 0)
    if OPTIONS.get("elastic"):
        if ranks > 1:
            trainer.strategy.setup_environment()
        sampler = ce.ElasticSampler(
            len(Samples()), OPTIONS["elastic"], seed=5, rank=trainer.global_rank, world_size=ranks
        )
        loader = DataLoader(Samples(), batch_sampler=sampler, num_workers=workers)
    else:
        loader = train_loader(workers)
    if bad == "iterable":
        loader = DataLoader(Endless(), batch_size=4)
    if bad == "cycle":
        loader = CombinedLoader([loader, DataLoader(Samples(), batch_size=8)], "max_size_cycle")
    trainer.fit(model, loader, DataLoader(Samples(), batch_size=8), ckpt_path=OPTIONS.get("ckpt_path"))
    end(trainer, model, resume)


def end(trainer: Any, model: Model, resume: Resume) -> None:
    """Write what was trained, to be compared."""
    digest = hashlib.sha256()
    optimizer = trainer.optimizers[0]
    tensors = list(model.state_dict().values())
    tensors += [
        t for one in trainer.optimizers[1:] for value in one.state.values() for t in value.values() if t is not None
    ]
    tensors += [value for one in optimizer.state.values() for value in one.values()]
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(local.detach().cpu().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    said = {
        "digest": digest.hexdigest(),
        "lr": [group["lr"].hex() for group in optimizer.param_groups],
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "count": model.count,
        "stopping": trainer.early_stopping_callback.wait_count,
        "best": trainer.early_stopping_callback.best_score.item().hex(),
        "batches": trainer.fit_loop.epoch_loop.batch_progress.total.ready,
        "stepped": trainer.fit_loop.epoch_loop._batches_that_stepped,
        "start": resume.start,
    }
    Path(f"{OPTIONS['end']}.{RANK}").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
