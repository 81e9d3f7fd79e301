"""One entry's trial: does a training that was saved and restored go on as one that was not interrupted?

Three trainings are compared: one of six steps that the engine knows nothing of; one that saves after three steps and
goes on; and one whose objects are made anew, as a new process makes them, with other weights and other random numbers,
restored, and trained for the last three steps.
"""

from __future__ import annotations

import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from capture import Record, capture, differences
from entry import Entry, Job, World

import ckptengine as ce
from ckptengine.errors import CheckpointError

__all__ = [
    "BROKEN",
    "DIFFERENT",
    "EXACT",
    "FAULTS",
    "LIMIT",
    "NOT_APPLICABLE",
    "OWN",
    "REFUSED",
    "Outcome",
    "Past",
    "first_life",
    "second_life",
]

BEFORE, AFTER = 3, 3

EXACT = "exact"
OWN = "exact through its own `state_dict`"
REFUSED = "refused"
NOT_APPLICABLE = "not applicable"
DIFFERENT = "silently different"
CHANGED = "changed by the save"
LATE = "saved, refused at the restore"
BROKEN = "an error that is not the engine's"
IDLE = "proves nothing"
LIMIT = "no result in time"
RANK_0 = "with rank 0's buffers on all ranks, as from torch's own checkpoints"
FAULTS = (DIFFERENT, CHANGED, LATE, BROKEN, IDLE, LIMIT)
"""What no line of the table may say."""


@dataclass(frozen=True)
class Outcome:
    """What became of an entry, in the words of the table; `details` help to find the cause of a fault."""

    status: str
    words: str = ""
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Past:
    """What the second life is compared with."""

    losses: list[str]
    end: Record
    saved: Record


def first_life(entry: Entry, world: World, folder: Path) -> Past | Outcome:
    """Train without interruption, then save in mid-training and go on; return what the second life must come to."""
    try:
        losses, end = uninterrupted(entry, world)
    except Exception as error:
        return Outcome(NOT_APPLICABLE, words_of(error), (traceback.format_exc(),))
    seed_streams(0)
    job = entry.start(world)
    again = [job.step(number).hex() for number in range(BEFORE)]
    middle = look_at(job)
    state = {"rng": ce.RNG(job.generators), **job.state}
    try:
        ce.save(folder, state)
    except CheckpointError as error:
        return Outcome(REFUSED, words_of(error))
    except Exception as error:
        return Outcome(BROKEN, f"at the save: {words_of(error)}", (traceback.format_exc(),))
    take_buffers_of_rank_0(entry, job)
    again += [job.step(number).hex() for number in range(BEFORE, BEFORE + AFTER)]
    found = differences({**end, "losses": str(losses)}, {**look_at(job), "losses": str(again)})
    if found:
        second_losses, second_end = uninterrupted(entry, world)
        if second_losses != losses or differences(end, second_end):
            return Outcome(NOT_APPLICABLE, "two runs without any checkpoint differ", tuple(found))
        return Outcome(CHANGED, found[0], tuple(found))
    still = parameters_in(end) and not differences(parameters_in(middle), parameters_in(end))
    if still or not all(map(np.isfinite, map(float.fromhex, losses))):
        return Outcome(IDLE, "the training changes nothing, or its losses are not finite")
    return Past(losses, end, states_at_the_save(entry, world))


def second_life(entry: Entry, world: World, folder: Path, past: Past) -> Outcome:
    """Restore into fresh objects, go on, and compare."""
    seed_streams(1)
    job = entry.start(World(world.rank, world.size, seed=world.seed + 1))
    try:
        with calls_of_load_state_dict(job) as called:
            ce.load(folder, into={"rng": ce.RNG(job.generators), **job.state})
    except CheckpointError as error:
        return Outcome(LATE, words_of(error), (str(error),))
    except Exception as error:
        return Outcome(BROKEN, f"at the restore: {words_of(error)}", (traceback.format_exc(),))
    details = [f"after the restore, {line}" for line in differences(past.saved, look_at_states(job))]
    try:
        losses = [job.step(number).hex() for number in range(BEFORE, BEFORE + AFTER)]
    except Exception as error:
        return Outcome(BROKEN, f"after the restore: {words_of(error)}", (*details, traceback.format_exc()))
    expected = {**past.end, "losses": str(past.losses[BEFORE:])}
    details += differences(expected, {**look_at(job), "losses": str(losses)})
    if details:
        return Outcome(DIFFERENT, details[0], tuple(details))
    shared = entry.own_buffers and torch.distributed.is_initialized()
    return Outcome(OWN if called else EXACT, RANK_0 if shared else "")


def uninterrupted(entry: Entry, world: World) -> tuple[list[str], Record]:
    """Return the losses and the end of a training that the engine does not see."""
    seed_streams(0)
    job = entry.start(world)
    losses = [job.step(number).hex() for number in range(BEFORE)]
    take_buffers_of_rank_0(entry, job)
    losses += [job.step(number).hex() for number in range(BEFORE, BEFORE + AFTER)]
    return losses, look_at(job)


def states_at_the_save(entry: Entry, world: World) -> Record:
    """Return what the objects' own `state_dict` say at the save, asked in a training that the engine does not see."""
    seed_streams(0)
    job = entry.start(world)
    for number in range(BEFORE):
        job.step(number)
    take_buffers_of_rank_0(entry, job)
    return look_at_states(job)


def take_buffers_of_rank_0(entry: Entry, job: Job) -> None:
    """Do what a restore does by its rule to buffers that differ from rank to rank."""
    if not (entry.own_buffers and torch.distributed.is_initialized()):
        return
    with torch.no_grad():
        for value in job.state.values():
            for buffer in value.buffers() if isinstance(value, torch.nn.Module) else ():
                same = buffer.clone()
                torch.distributed.broadcast(same, src=0)
                buffer.copy_(same)


def seed_streams(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def look_at(job: Job) -> Record:
    return capture({**job.state, **job.watched}, parameter_names(job))


def look_at_states(job: Job) -> Record:
    has = {name: value for name, value in job.state.items() if hasattr(value, "state_dict")}
    # ZeroRedundancyOptimizer's would be that of a rank which has gathered all of them.
    states = {n: (v.optim if hasattr(v, "consolidate_state_dict") else v).state_dict() for n, v in has.items()}
    return capture({f"{name}.state_dict()": state for name, state in states.items()}, parameter_names(job))


def parameter_names(job: Job) -> dict[int, str]:
    return {
        id(parameter): f"{name}.{key}"
        for name, value in {**job.state, **job.watched}.items()
        if isinstance(value, torch.nn.Module)
        for key, parameter in value.named_parameters()
    }


def parameters_in(record: Record) -> Record:
    return {path: value for path, value in record.items() if "._parameters." in path and " grad" not in path}


def words_of(error: BaseException) -> str:
    """Return the class and the first line of a message, without what differs from run to run."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"0x[0-9a-f]+|/tmp/\S+", "…", lines[0])
    if isinstance(error, CheckpointError):
        text = " ".join([text, *map(str.strip, lines[1:2])])
        return text if len(text) <= 300 else text[:299] + "…"
    if not text:
        text = f"in {traceback.extract_tb(error.__traceback__)[-1].name}"
    text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 160 else text[:159] + "…"


@contextmanager
def calls_of_load_state_dict(job: Job) -> Iterator[list[str]]:
    """Note which objects of the state have their own `load_state_dict` called, whoever calls it; modules apart."""
    subjects = {id(value): name for name, value in job.state.items() if not isinstance(value, torch.nn.Module)}
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name == "load_state_dict":
            name = subjects.get(id(frame.f_locals.get("self")))
            if name is not None:
                called.append(name)

    before: Callable[..., Any] | None = sys.getprofile()
    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(before)
