"""Train a small network on scikit-learn's digits; started again, on any machine, it goes on with the very next sample.

    RUN=s3://bucket/runs/digits LOCAL=/ckpt torchrun --nproc-per-node=2 train.py --epochs 8

`--warm-start s3://bucket/runs/OTHER` begins from the weights of another run (incremental training), `--classes` takes
only the digits below a number. An error that no other machine can mend is noted in the file STOP, if that is given.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import ckptengine as ce

BATCH, SEED = 128, 1

UNMENDABLE = (ce.errors.StateError, ce.errors.LoadMismatchError, ce.errors.FormatVersionError)
"""The job itself is wrong: its state can't be saved, or does not fit what the run has."""


class Net(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.head = nn.Linear(16 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def digits(classes: int, *, test: bool) -> TensorDataset:
    """Return images and labels of the digits below `classes`: every fifth of all is for the test."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    chosen = (labels < classes) & ((torch.arange(len(labels)) % 5 == 0) == test)
    return TensorDataset(images[chosen].float().view(-1, 1, 8, 8) / 16, labels[chosen])


def arrange_buckets(model: nn.Module) -> None:
    """Let DDP arrange its gradients: it does so in a process's second step and adds in another order from then on."""
    for _ in range(2):
        model(torch.zeros(1, 1, 8, 8)).sum().backward()
    model.zero_grad()


def train(args: argparse.Namespace) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dataset = digits(args.classes, test=False)
    torch.manual_seed(SEED)  # the same weights on all ranks
    net = Net(args.classes, args.width)
    model = DistributedDataParallel(net)
    arrange_buckets(model)
    torch.manual_seed(SEED + 1 + rank)  # and each rank's own dropout
    sampler = ce.ElasticSampler(len(dataset), BATCH, seed=SEED)
    loader = DataLoader(dataset, batch_sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * len(dataset) // BATCH)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": sampler, "rng": ce.RNG()}

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    run, local = os.environ["RUN"], os.environ["LOCAL"]
    with ce.Checkpointer(run, local=local, every=args.every, keep_last={"local": 2, "s3": 3}, timeout=120) as ckpt:
        start = ckpt.restore(state)
        if start is not None:
            say(f"resumed at step {start}")
        elif args.warm_start:
            say(f"warm start from {args.warm_start}\n{ckpt.warm_start(args.warm_start, state).table()}")
            say(f"features {digest(net.features)}")
        else:
            say("a fresh start")
        while sampler.epoch < args.epochs:
            for images, labels in sampler.batches(loader):  # the rest of the epoch
                loss = F.cross_entropy(model(images), labels, reduction="sum") / sampler.size
                (loss * ranks).backward()  # DDP takes the mean over the ranks, whose shares may differ
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                ckpt.step(sampler.global_batches, state)
                total = loss.detach()
                dist.all_reduce(total)
                say(f"step {sampler.global_batches}: loss {total:.4f}")
        if sampler.global_batches != start:
            ckpt.save(sampler.global_batches, state)  # the end, whatever `every` is
    # The block has waited until the newest checkpoint was in the bucket.
    images, labels = digits(args.classes, test=True).tensors
    found = net.eval()(images).argmax(dim=1)
    say(f"trained to step {sampler.global_batches}, output in {run}: accuracy {(found == labels).float().mean():.3f}")


def digest(module: nn.Module) -> str:
    """Return a SHA-256 of a module's weights, in the order of their names."""
    return hashlib.sha256(b"".join(value.numpy() for _, value in sorted(module.state_dict().items()))).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--width", type=int, default=32, help="channels of the first layer")
    parser.add_argument("--warm-start", metavar="RUN")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    try:
        train(args)
    except UNMENDABLE as error:
        # torchrun ends with 1 whatever its ranks end with: the job learns of it by a file.
        if "STOP" in os.environ:
            Path(os.environ["STOP"]).write_text(f"{type(error).__name__}: {error}\n")
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
