"""One cursor from its beginning to the newest checkpoint that has it: its ledgers, its digests, its steps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ckptengine.audit.line import Look, State
from ckptengine.audit.report import CursorReport, Findings, LifeReport
from ckptengine.data.digest import DIGEST_BITS
from ckptengine.data.ledger import Run
from ckptengine.data.proof import coverage, digest_of_runs, identify, new_runs, place_after
from ckptengine.schema.ranks import name_ranks

__all__ = ["Stretch", "check", "stretches"]

_MODULUS = 1 << DIGEST_BITS
_MOST_SEARCHED_EPOCHS = 64
_MOST_NOTES = 8


@dataclass(slots=True)
class Stretch:
    """A cursor's states, from one beginning on; `notes` say how it begins or ends where that is not the run's."""

    name: str
    states: list[State]
    notes: list[str]


def stretches(looks: Sequence[Look], findings: Findings) -> list[Stretch]:
    """Return each cursor's stretches, by names, then in order; adds a finding where a checkpoint lacks a cursor.

    A cursor counts each restart after which it handed out a batch as a `life`. One that began anew at one of the
    restarts between two checkpoints, as it does where only the other parts of a state are restored, can have counted
    only those after it, and does not go on from the one before.
    """
    every: list[Stretch] = []
    last: dict[str, Stretch] = {}
    before: Look | None = None
    for look in looks:
        if before is not None:
            _find_lost(before, look, last, findings)
        for name, state in look.states.items():
            stretch = last.get(name)
            earlier = stretch.states[-1] if stretch is not None else None
            if stretch is None or earlier is None or _begins_anew(earlier, state):
                stretch = last[name] = Stretch(name, [], [] if earlier is None else [_anew(earlier, state)])
                every.append(stretch)
            stretch.states.append(state)
        before = look
    return sorted(every, key=lambda stretch: stretch.name)


def _begins_anew(earlier: State, state: State) -> bool:
    return state.life < state.restarts - earlier.restarts and not _goes_on(earlier, state)


def _goes_on(earlier: State, state: State) -> bool:
    """Whether a cursor, over a restart, has what another one had, and after that only what it counts to later lives."""
    before, runs = earlier.runs(), state.runs()
    return runs[: len(before)] == before and all(run.life > earlier.life for run in runs[len(before) :])


def _anew(earlier: State, state: State) -> str:
    data = "the same data" if earlier.description == state.description else "other data"
    return (
        f"step {state.step} of generation {state.generation} has a cursor of {data} that was not loaded when step "
        f"{earlier.step} of generation {earlier.generation}, or one after it, was restored: what it counts and the "
        f"{earlier.batches} global batches of the one before are each audited by themselves"
    )


def _find_lost(before: Look, look: Look, last: dict[str, Stretch], findings: Findings) -> None:
    begun = sorted(look.names - before.names)
    for name in sorted(before.names - look.names):
        if begun and look.restarts != before.restarts and name in last:
            last[name].notes.append(
                f"it ends with step {before.step}: from step {look.step} on, after a restart, the state has "
                f"{', '.join(begun)} in its place"
            )
            continue
        findings.add(
            "cursor",
            (before.step, look.step),
            f"step {look.step} has no such cursor any more, step {before.step} has: nothing shows what training used "
            "after that. Keep the sampler in the state that is saved",
            name,
        )


def check(stretch: Stretch, findings: Findings, meter: Callable[[int], None]) -> CursorReport:
    """Check one stretch; `meter` is told how many samples were hashed."""
    name, states = stretch.name, stretch.states
    newest = states[-1]
    own = Findings()
    _check_places(name, states, own)
    _check_coverage(name, states, own)
    continuous = _check_ledgers_and_digests(name, states, own, meter)
    notes = _check_steps(name, states, own)
    findings.items += own.items
    return CursorReport(
        name=name,
        order=newest.description,
        epoch=newest.epoch,
        consumed=newest.consumed,
        batches=newest.batches,
        finished_epochs=newest.epoch,
        lives=tuple(_lives(states)),
        proven=tuple(_proven(states, own, continuous)),
        notes=(*stretch.notes, *notes),
    )


def _check_places(name: str, states: Sequence[State], findings: Findings) -> None:
    """Check that each cursor stands where its ledger ends, and that nothing is left out but at epochs' ends."""
    before: int | None = None
    for state in states:
        between, before = (before, state.step), state.step
        runs = state.runs()
        place, expected = (state.epoch, state.consumed, state.batches), place_after(runs, state.order.length)
        if place != expected:
            findings.add(
                "cursor",
                between,
                f"step {state.step}: the cursor is at epoch {place[0]}, sample {place[1]}, after {place[2]} global "
                f"batches; its ledger ends at epoch {expected[0]}, sample {expected[1]}, after {expected[2]}",
                name,
            )
        for run in runs:
            if not run.batches and (run.end != state.order.length or run.end - run.begin >= state.largest):
                findings.add(
                    "cursor",
                    between,
                    f"step {state.step}: epoch {run.epoch}: positions {run.begin} to {run.end - 1} are left out, which "
                    "is not the rest of an epoch that is shorter than a global batch",
                    name,
                )


def _check_coverage(name: str, states: Sequence[State], findings: Findings) -> None:
    newest = states[-1]
    runs = newest.runs()
    for one in coverage(runs, newest.order, newest.epoch):
        between = _between(states, one.batch)
        findings.add("repeat" if one.times else "gap", between, one.text, name)
    expected = 0
    for run in runs:
        if run.first != expected:
            message = f"after global batch {expected - 1} the ledger goes on with global batch {run.first}"
            findings.add("ledger", _between(states, run.first), message, name)
        expected = run.last + 1


def _between(states: Sequence[State], batch: int) -> tuple[int | None, int | None]:
    """Return the steps of the last checkpoint before a global batch was used, and of the first one after."""
    before = [state.step for state in states if state.batches <= batch]
    after = [state.step for state in states if state.batches > batch]
    return (before[-1] if before else None), (after[0] if after else None)


def _check_ledgers_and_digests(
    name: str, states: Sequence[State], findings: Findings, meter: Callable[[int], None]
) -> list[tuple[int | None, int | None]]:
    """Compare each checkpoint with the one before; return between which steps the ledgers are continuous."""
    continuous = []
    runs: list[Run] = []
    expected = error = 0
    before: int | None = None
    order: dict[str, Any] | None = None
    apart: list[int] = []
    for state in states:
        between = before, state.step
        if order not in (None, state.description):
            message = f"the order of the samples was {order} up to step {before}, and is {state.description} in step "
            findings.add("cursor", between, f"{message}{state.step}", name)
            runs, expected, error = [], 0, 0
        now_runs = state.runs()
        new = new_runs(runs, now_runs)
        if isinstance(new, int):
            was = _run_text(runs[new])
            now = _run_text(now_runs[new]) if new < len(now_runs) else "nothing"
            findings.add(
                "ledger",
                between,
                f"the ledger of step {state.step} does not continue that of step {before}: where that has {was}, it "
                f"has {now}",
                name,
            )
            new, expected = list(now_runs), 0
        elif before is not None:
            continuous.append(between)
        expected = (expected + digest_of_runs(new, state.order, meter)) % _MODULUS
        now_error = (state.digest - expected) % _MODULUS
        if now_error != error:
            epochs = sorted({run.epoch for run in new})[:_MOST_SEARCHED_EPOCHS]
            one = identify((now_error - error) % _MODULUS, state.order, epochs)
            what = one or "more than one sample differs, or none of the run's"
            if before is None:
                what += "; it may have happened at any step before, since no earlier checkpoint is there"
            findings.add(
                "digest",
                between,
                f"up to step {state.step} the ranks handed other samples to training than the ledger says: {what}",
                name,
            )
        if state.apart and not apart:
            findings.add(
                "digest",
                between,
                f"up to step {state.step} {name_ranks(state.apart)} handed other samples to training than the ranks "
                "that have the same share of each batch (the same `rank` of the sampler)",
                name,
            )
        runs, error, before, order = now_runs, now_error, state.step, state.description
        apart = state.apart
    return continuous


def _run_text(run: Run) -> str:
    what = f"global batches {run.first} to {run.last}" if run.batches else "left out"
    return (
        f"({what}: epoch {run.epoch}, positions {run.begin} to {run.end - 1}, {run.world_size} ranks, life {run.life})"
    )


# What is reported beside the findings.


def _lives(states: Sequence[State]) -> Iterable[LifeReport]:
    by_life: dict[int, list[Run]] = {}
    for run in states[-1].runs():
        by_life.setdefault(run.life, []).append(run)
    for life, runs in sorted(by_life.items()):
        own = [state for state in states if state.life == life]
        own = [state for state in own if state.generation == own[0].generation]  # a later one has used nothing yet
        steps = [state.step for state in own if state.step is not None]
        yield LifeReport(
            life=life,
            generation=own[-1].generation if own else None,
            steps=(min(steps), max(steps)) if steps else None,
            world_size=runs[-1].world_size,
            batches=(runs[0].first, runs[-1].last),
            epochs=(runs[0].epoch, runs[-1].epoch),
            samples=sum(run.samples for run in runs),
            padding=sum(run.padding for run in runs),
            left_out=sum(run.end - run.begin for run in runs if not run.batches),
        )


def _proven(
    states: Sequence[State], findings: Findings, continuous: Sequence[tuple[int | None, int | None]]
) -> Iterable[str]:
    """Say what is shown, and by what; nothing is said of what has a finding."""
    newest = states[-1]
    kinds = {finding.kind for finding in findings.items}
    if not kinds & {"gap", "repeat", "cursor"}:
        claims = []
        if newest.epoch:
            left_out = sum(run.end - run.begin for run in newest.runs() if not run.batches)
            but = f', but for {left_out} that last="drop" left out' if left_out else ""
            epochs = "the finished epoch" if newest.epoch == 1 else f"each of {newest.epoch} finished epochs"
            claims.append(f"each of the {newest.order.length} samples was used once in {epochs}{but}")
        if newest.consumed:
            claims.append(f"each of the {newest.consumed} consumed ones of epoch {newest.epoch} once")
        yield f"{'; '.join(claims) or 'nothing was used'}: by the ledger of step {newest.step}, from the start"
    if "digest" not in kinds:
        what = "what the ranks handed to training is what the ledger says, from the start"
        yield f"{what}: by the digests of step {newest.step}"
    if continuous and "ledger" not in kinds:
        first = continuous[0][0]
        yield f"each checkpoint continues the one before: by the {len(states)} checkpoints from step {first} on"


def _check_steps(name: str, states: Sequence[State], findings: Findings) -> list[str]:
    """Compare how steps and global batches advance; return what is worth knowing.

    A loop may use any number of global batches in a step, and now and then another one, so that is noted. But where
    both lives of a restart use the same number in every step, and over the restart there were more, something had taken
    batches that were never trained on when the first life ended: each restart loses as many.
    """
    pairs = [_Advance(*pair) for pair in itertools.pairwise(states) if pair[0].step is not None]
    ratios = Counter(pair.ratio for pair in pairs)
    usual, times = max(ratios.items(), key=lambda item: (item[1], item[0] == 1), default=(Fraction(1), 0))
    if times < 2:
        usual = Fraction(1)
    within: dict[int, set[Fraction | None]] = {}
    for pair in pairs:
        # What takes batches ahead has none to take at an epoch's end: there it evens out.
        if pair.within_a_life and 0 not in (pair.before.consumed, pair.after.consumed):
            within.setdefault(pair.after.generation, set()).add(pair.ratio)
    notes = []
    if usual is not None and usual != 1:
        which = "each step" if usual.denominator == 1 else f"every {usual.denominator} steps"
        notes.append(f"{which} used {usual.numerator} global batches")
    uneven = []
    for pair in pairs:
        if pair.ratio == usual:
            continue
        lives = pair.before.generation, pair.after.generation
        text = f"from step {pair.before.step} to step {pair.after.step} training used {pair.batches} global batches"
        steady = all(within.get(life) == {usual} for life in lives)
        if pair.within_a_life or not steady or not pair.before.consumed or not _more(pair, usual):
            uneven.append(text)
            continue
        findings.add(
            "step",
            (pair.before.step, pair.after.step),
            f"{text}, over a restart; else it is {usual} in each step, before and after: the job takes batches "
            "before it trains on them, and those that it had taken when it ended were not used. Put what reads ahead "
            "around the loader, `sampler.batches(prefetch(loader))`, not around `batches()`",
            name,
        )
    if len(uneven) > _MOST_NOTES:
        more = len(uneven) - _MOST_NOTES
        uneven[_MOST_NOTES:] = [f"steps and global batches don't advance alike between {more} more checkpoints"]
    return notes + uneven


class _Advance:
    """By how many steps and global batches training went on from one checkpoint to the next."""

    def __init__(self, before: State, after: State) -> None:
        self.before, self.after = before, after
        self.steps = (after.step or 0) - (before.step or 0)
        self.batches = after.batches - before.batches
        self.within_a_life = before.generation == after.generation

    @property
    def ratio(self) -> Fraction | None:
        """Global batches for each step, None where the steps' numbers don't rise."""
        return Fraction(self.batches, self.steps) if self.steps > 0 else None


def _more(pair: _Advance, usual: Fraction | None) -> bool:
    return usual is not None and pair.ratio is not None and pair.ratio > usual
