"""Random lives of a run beside a model of what must be there: saves, restarts, kills, damage, deletion, retention."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from thread_ranks import Ranks

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, CheckpointError
from ckptengine.storage.disk import Disk
from ckptengine.storage.local import LocalStorage

ROWS, COLUMNS = 7, 3
Order = tuple[int, int]
"""A checkpoint: its generation and its step. The newest is the greatest."""


class MortalDisk(Disk):
    """A disk of a process that may be killed: from then on nothing that it does has any effect."""

    def __init__(self) -> None:
        self.left: int | None = None


def _until_killed(name: str) -> Any:
    def operation(disk: MortalDisk, *arguments: Any) -> Any:
        if disk.left is not None:
            disk.left -= 1
            if disk.left < 0:
                raise OSError(5, "the process was killed")
        return getattr(Disk, name)(disk, *arguments)

    return operation


for _name in [name for name in vars(Disk) if not name.startswith("_")]:
    setattr(MortalDisk, _name, _until_killed(_name))


def content(number: int) -> dict[str, Any]:
    """Return the global arrays and values that a save with this number holds."""
    rows = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS) + 1000 * number
    return {"rows": rows, "whole": np.full((5, 2), number, np.int64), "number": number}


def state_of(number: int, rank: int, world_size: int) -> dict[str, Any]:
    """Return a rank's part of it."""
    whole = content(number)
    step = -(-ROWS // world_size)
    start = min(rank * step, ROWS)
    part = whole["rows"][start : start + step].copy()
    sharded = ce.ShardedArray(part, (ROWS, COLUMNS), (start, 0))
    return {"rows": sharded, "whole": whole["whole"], "number": number, "own": ce.PerRank({"rank": rank}, _resized)}


def _resized(saved: list[Any], rank: int, world_size: int) -> Any:
    return {"rank": rank}


def is_state(state: dict[str, Any], number: int, rank: int, world_size: int) -> bool:
    """Whether a rank's state is that of a number, to the byte."""
    expected = state_of(number, rank, world_size)
    return (
        state["rows"].local.tobytes() == expected["rows"].local.tobytes()
        and state["whole"].tobytes() == expected["whole"].tobytes()
        and state["number"] == number
        and state["own"].value == {"rank": rank}
    )


class Runs(RuleBasedStateMachine):
    """One run, whoever works on it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ckptengine-stateful-"))
        self.run = self.folder / "run"
        self.numbers: dict[Order, int] = {}  # what was committed, by what it holds
        self.damaged: set[Order] = set()
        self.parents: dict[int, Order | None] = {}  # from what a generation was restored
        self.parent: Order | None = None  # from what this life was
        self.place: Order | None = None  # the newest checkpoint of its line
        self.pending: int | None = None  # what a save in flight holds
        self.kept: list[Order] = []  # what retention must leave beside it
        self.job: Ranks | None = None
        self.checkpointers: list[ce.Checkpointer] = []
        self.next_number = 1

    def teardown(self) -> None:
        if self.job is not None:
            self._close()
        shutil.rmtree(self.folder)

    # The model.

    def there(self) -> list[Order]:
        """Return what lies in the run, oldest first, by the names of its manifests."""
        found = []
        for step in self.run.glob("step-*"):
            with contextlib.suppress(FileNotFoundError):  # what retention has just deleted
                for manifest in step.glob("manifest-*.json"):
                    found.append((int(manifest.stem.removeprefix("manifest-")), int(step.name.removeprefix("step-"))))
        return sorted(found)

    def line(self, place: Order | None) -> list[Order]:
        """Return the checkpoints that led to a place and are still there, newest first, as docs/design.md says."""
        there, line = self.there(), []
        while place is not None:
            line += [one for one in reversed(there) if one[0] == place[0] and one <= place]
            place = self.parents.get(place[0])
        return line

    # The rules.

    @initialize()
    def begin(self) -> None:
        """Nothing is there yet."""
        self.run.mkdir()

    @precondition(lambda self: self.job is None)
    @rule(world_size=st.integers(1, 4), keep_last=st.sampled_from([None, None, 1, 2, 3]))
    def start(self, world_size: int, keep_last: int | None) -> None:
        """Start the job on any number of ranks: it restores the newest checkpoint that is whole."""
        self.job, self.world_size, self.keep_last = Ranks(world_size), world_size, keep_last
        self.disk = MortalDisk()
        comms = self.job.comms

        def open_run(rank: int) -> ce.Checkpointer:
            return ce.Checkpointer(
                self.run, keep_last=keep_last, preemption=None, comm=comms[rank], timeout=60, on_error="raise"
            )

        self.checkpointers = self.job.run(open_run)
        for one in self.checkpointers:
            assert isinstance(one._tiers.places.persistent, LocalStorage)
            one._tiers.places.persistent._writes.disk = self.disk
        states = [state_of(0, rank, world_size) for rank in range(world_size)]
        there = self.there()
        line = self.line(there[-1] if there else None)
        sound = [one for one in line if one not in self.damaged]
        try:
            found = self.job.run(lambda rank: self.checkpointers[rank].restore(states[rank]))
        except CheckpointDamagedError:
            assert line, "there is nothing that could be damaged"
            assert not sound, f"{sound[0]} is whole"
            self._close()
            shutil.rmtree(self.run)  # what a user would do
            self.run.mkdir()
            self.numbers, self.damaged, self.parents = {}, set(), {}
            return
        self.place = self.parent = None
        self.step, self.pending = 0, None
        if not line:
            assert found == [None] * world_size
            return
        assert sound, "nothing is whole, and something was restored"
        assert found == [sound[0][1]] * world_size, f"restored {found[0]}, the newest that is whole is {sound[0]}"
        number = self.numbers[sound[0]]
        for rank, state in enumerate(states):
            assert is_state(state, number, rank, world_size), f"rank {rank} has other bytes"
        self.place = self.parent = sound[0]
        self.step = sound[0][1]

    @precondition(lambda self: self.job is not None)
    @rule(steps=st.integers(1, 3), wait=st.booleans())
    def save(self, steps: int, wait: bool) -> None:
        """Save the next step, and wait for it or not."""
        assert self.job is not None
        self._settle()
        self.step += steps
        line = self.line(self.place)
        self.kept = line if self.keep_last is None else line[: self.keep_last - 1]
        number = self.pending = self._number()
        states = [state_of(number, rank, self.world_size) for rank in range(self.world_size)]
        self.job.run(lambda rank: self.checkpointers[rank].save(self.step, states[rank]))
        # The snapshot is taken: what training does to its arrays from now on must not show.
        for state in states:
            state["rows"].local[...] = -1
            state["whole"][...] = -1
        if wait:
            self._settle()

    @precondition(lambda self: self.job is not None)
    @rule(operations=st.integers(0, 40))
    def killed(self, operations: int) -> None:
        """The job is killed while it saves, after so many operations on the disk."""
        assert self.job is not None
        self._settle()
        self.step += 1
        self.disk.left = operations
        number, before = self._number(), set(self.there())
        handles: list[ce.SaveHandle] = []
        states = [state_of(number, rank, self.world_size) for rank in range(self.world_size)]
        with contextlib.suppress(CheckpointError):
            handles = self.job.run(lambda rank: self.checkpointers[rank].save(self.step, states[rank]))
        for handle in handles:
            handle.durable.wait(60)
        for order in set(self.there()) - before:
            self._note(order, number)
        self.disk.left = 0
        self._drop()

    @precondition(lambda self: self.job is not None)
    @rule()
    def end(self) -> None:
        """The job ends as it should."""
        self._settle()
        self._close()

    @precondition(lambda self: self.job is None and self.there())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """Somebody deletes a step by hand."""
        order = data.draw(st.sampled_from(self.there()))
        shutil.rmtree(self.run / f"step-{order[1]:08d}")
        for gone in [one for one in self.numbers if one[1] == order[1]]:
            del self.numbers[gone]
            self.damaged.discard(gone)

    @precondition(lambda self: self.job is None and set(self.there()) - self.damaged)
    @rule(data=st.data(), place=st.floats(0, 0.999))
    def damage(self, data: st.DataObject, place: float) -> None:
        """A bit flips in an archive."""
        order = data.draw(st.sampled_from(sorted(set(self.there()) - self.damaged)))
        generation, step = order
        text = (self.run / f"step-{step:08d}" / f"manifest-{generation:04d}.json").read_text()
        attempt = text.split('"attempt":"')[1].split('"')[0]
        archives = sorted((self.run / f"step-{step:08d}" / f"data-{attempt}").glob("rank-*.zip"))
        path = data.draw(st.sampled_from(archives))
        raw = bytearray(path.read_bytes())
        # The tail: whatever of the archive a restore needs, it reads that.
        start = text.index(f'"name":"{path.name}"')
        tail = int(text[start:].split('"tail_position":')[1].split(",")[0])
        raw[tail + int((len(raw) - tail) * place)] ^= 1
        path.write_bytes(raw)
        self.damaged.add(order)

    @invariant()
    def nothing_is_there_that_nobody_saved(self) -> None:
        """What lies in the run was saved."""
        if self.job is None:
            assert set(self.there()) <= set(self.numbers)

    # What the rules have in common.

    def _number(self) -> int:
        self.next_number += 1
        return self.next_number

    def _settle(self) -> None:
        """Wait until what was saved is durable, and look whether it, and what must be kept, is there."""
        assert self.job is not None
        if self.pending is None:
            return
        self.job.run(lambda rank: self.checkpointers[rank].wait(60))
        self.job.run(lambda rank: self.checkpointers[rank]._saver.settle(60))
        number, self.pending = self.pending, None
        there = self.there()
        assert there[-1][1] == self.step, f"step {self.step} is durable, and not the newest there: {there}"
        assert there[-1] not in self.numbers, "a checkpoint took the place of another"
        self._note(there[-1], number)
        self.place = there[-1]
        for one in self.kept:
            assert one in there, f"retention deleted {one}"

    def _note(self, order: Order, number: int) -> None:
        self.numbers[order] = number
        self.parents.setdefault(order[0], self.parent)

    def _close(self) -> None:
        assert self.job is not None
        for_all = self.checkpointers
        self.job.run(lambda rank: for_all[rank].close())
        self._drop()

    def _drop(self) -> None:
        assert self.job is not None
        self.job.end()
        self.job, self.checkpointers = None, []


TestRuns = Runs.TestCase
TestRuns.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
