"""Processes that are forked after the packages were imported, so that each trial begins in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "support"))

from entry import Entry, World
from ports import free_port
from trial import (
    BROKEN,
    EXACT,
    LIMIT,
    NOT_APPLICABLE,
    OWN,
    REFUSED,
    Outcome,
    Past,
    first_life,
    second_life,
)

__all__ = ["LIMIT_S", "import_all", "on_one_process", "on_two_ranks"]

LIMIT_S = 120.0
"""Seconds that one entry may take; it takes one or two."""

_PATIENCE_S = 30.0
"""Seconds that one rank waits for the other once an entry has ended; on a busy machine one may be far behind."""

_fork = multiprocessing.get_context("fork")


class Child:
    """A forked process that leads a group of its own, and a pipe to it."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self.pipe, theirs = _fork.Pipe()
        self.process = _fork.Process(target=_lead, args=(function, theirs, *arguments))
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """Kill it and those that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL) if self.process.is_alive() else None
        self.process.join()
        self.pipe.close()

    def receive(self) -> Any:
        """Return what it sends; raises `EOFError` where it has died."""
        return self.pipe.recv()


def _lead(function: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    os.setpgid(0, 0)
    function(pipe, *arguments)


def import_all() -> None:
    """Import what every child needs, so that it is done once; starts no thread."""
    for name in (
        "numcodecs",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "ckptengine.api",
        "ckptengine.comm.torch",
        "ckptengine.storage.local",
        "ckptengine.torch.adapter",
    ):
        importlib.import_module(name)
    gc.freeze()  # a child's first collection would look at all that was imported, and copy it: a second for each child


def on_one_process(entries: Sequence[Entry], at_once: int = 2) -> Iterator[tuple[Entry, Outcome]]:
    """Try each entry in processes of its own: one that saves, and one that restores. Yield outcomes as they come."""
    waiting, running = list(entries), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            entry = waiting.pop(0)
            child = Child(_both_lives, entry)
            running[child.pipe] = (entry, child, time.monotonic() + LIMIT_S)
        ready = wait(list(running), timeout=0.2)
        for pipe, (entry, child, deadline) in list(running.items()):
            if pipe in ready:
                yield entry, _received(child)
            elif time.monotonic() > deadline:
                yield entry, Outcome(LIMIT, f"stopped after {LIMIT_S:.0f} s")
            else:
                continue
            child.end()
            del running[pipe]


def _received(child: Child) -> Outcome:
    try:
        outcome: Outcome = child.receive()
    except EOFError:
        child.process.join()
        return Outcome(BROKEN, f"the process ended with {child.process.exitcode}")
    return outcome


def _both_lives(pipe: Connection, entry: Entry) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        past = _in_child(first_life, entry, World(), folder)
        outcome = past if isinstance(past, Outcome) else _in_child(second_life, entry, World(), folder, past)
    pipe.send(outcome)


def _in_child(life: Callable[..., Past | Outcome], *arguments: Any) -> Any:
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=_live, args=(theirs, life, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return Outcome(BROKEN, f"the process ended with {process.exitcode}")
    finally:
        process.join()


def _live(pipe: Connection, life: Callable[..., Past | Outcome], *arguments: Any) -> None:
    pipe.send(life(*arguments))


def on_two_ranks(entries: Sequence[Entry]) -> Iterator[tuple[Entry, Outcome]]:
    """Try each entry on two ranks under gloo; one job tries them all, and a new one follows one that is out of step."""
    yield from ((entry, Outcome(NOT_APPLICABLE, entry.alone)) for entry in entries if entry.alone)
    waiting = [entry for entry in entries if not entry.alone]
    while waiting:
        with tempfile.TemporaryDirectory() as name:
            port = free_port()
            ranks = [Child(_rank, rank, port, waiting, Path(name)) for rank in range(2)]
            try:
                in_step = True
                while waiting and in_step:
                    entry = waiting.pop(0)
                    outcome, in_step = _one_on_two(ranks)
                    yield entry, outcome
            finally:
                for rank in ranks:
                    rank.end()


def _one_on_two(ranks: Sequence[Child]) -> tuple[Outcome, bool]:
    """Return what both ranks say of the next entry, and whether they may go on together."""
    for rank in ranks:
        with contextlib.suppress(BrokenPipeError):
            rank.pipe.send("next")
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + LIMIT_S
    while len(outcomes) < len(ranks) and time.monotonic() < deadline:
        for number, rank in enumerate(ranks):
            if number not in outcomes and rank.pipe.poll(0.02):
                outcomes[number] = _received(rank)
                deadline = min(deadline, time.monotonic() + _PATIENCE_S)
    if not outcomes:
        return Outcome(LIMIT, f"stopped after {LIMIT_S:.0f} s"), False
    if len(outcomes) < len(ranks):
        outcome = next(iter(outcomes.values()))
        return Outcome(outcome.status, f"{outcome.words} (one rank; the other waits)", outcome.details), False
    worst = max((outcomes[rank] for rank in sorted(outcomes)), key=lambda outcome: _order(outcome.status))
    same = len({(outcome.status, outcome.words) for outcome in outcomes.values()}) == 1
    return worst, same or worst.status not in (NOT_APPLICABLE, BROKEN)


def _order(status: str) -> int:
    order = (EXACT, OWN, NOT_APPLICABLE, REFUSED)
    return order.index(status) if status in order else len(order)


def _rank(pipe: Connection, rank: int, port: int, entries: Sequence[Entry], folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch.distributed as dist

    dist.init_process_group("gloo")
    world = World(rank, 2)
    for number, entry in enumerate(entries):
        pipe.recv()
        past = first_life(entry, world, folder / str(number))
        pipe.send(past if isinstance(past, Outcome) else second_life(entry, world, folder / str(number), past))
    dist.destroy_process_group()
