"""The document that a run of the zoo gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import groupby

from entry import Entry
from trial import EXACT, NOT_APPLICABLE, OWN, REFUSED, Outcome

__all__ = ["table"]

PACKAGES = (
    "torch",
    "pytorch_optimizer",
    "schedulefree",
    "timm",
    "torchao",
    "bitsandbytes",
    "peft",
    "torchmetrics",
)

HEAD = """\
# What comes back: the zoo

`make zoo` tries what people train with, on the CPU, in one process and on two ranks under FSDP2 (gloo), and makes this
table; CI fails where a run gives another one. Each entry is trained for six steps without the engine. Then it is
trained for three steps, saved, restored into fresh objects (with other weights and other random numbers), and trained
for three more. Losses, parameters, buffers, gradients, the optimizer's state and *everything else that the objects
hold*, also what their `state_dict` leaves out, have to be the same bit for bit as in the training without interruption:
values, dtypes, shapes, strides, placements, shared memory, the order of keys. The state always has `ce.RNG()`.

| word | meaning |
|---|---|
| exact | The same bit for bit. |
| exact (own) | The same, through the object's own `state_dict` and `load_state_dict`. |
| refused | The save raises an error, whose words are in the note. Nothing is saved that could not be restored. |
| – | Not applicable: the training fails without any checkpoint, or can't be repeated; the note has its error. |

There is no line that says "different": such a line fails the run. Where a note speaks of rank 0's buffers, the ranks
have differing ones, and those of rank 0 come back on all of them: the training that they are compared with is given
these too. On two ranks metrics lie in `PerRank`. Where optimizers on two ranks have the choice, they are given
`foreach=False`, since torch has no rules for DTensors for many operations on lists. What compiles its step is not
compiled here. timm is used without torchvision, so of timm only its optimizers and schedulers are here.
"""


def table(entries: Sequence[Entry], one: Mapping[Entry, Outcome], two: Mapping[Entry, Outcome]) -> str:
    """Return the document: a table for each package, with the words of errors as notes."""
    versions = ", ".join(f"{package} {metadata.version(package).split('+')[0]}" for package in PACKAGES)
    lines = [HEAD, f"Versions: {versions}.", "", *summary(one, two)]
    for package, group in groupby(entries, key=lambda entry: entry.package):
        notes: list[str] = []
        lines += ["", f"## {package}", "", "| | one process | two ranks |", "|---|---|---|"]
        for entry in group:
            lines.append(f"| {entry.name} | {cell(one[entry], notes)} | {cell(two[entry], notes)} |")
        lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))] if notes else []
    return "\n".join(lines) + "\n"


def summary(one: Mapping[Entry, Outcome], two: Mapping[Entry, Outcome]) -> list[str]:
    """Return how many lines say what."""
    lines = ["| | exact | exact (own) | refused | – |", "|---|---|---|---|---|"]
    for name, outcomes in (("one process", one), ("two ranks", two)):
        statuses = [outcome.status for outcome in outcomes.values()]
        counts = [str(statuses.count(status)) for status in (EXACT, OWN, REFUSED, NOT_APPLICABLE)]
        lines.append(f"| {name} | {' | '.join(counts)} |")
    return lines


def cell(outcome: Outcome, notes: list[str]) -> str:
    """Return an outcome in a word, with the number of its note."""
    word = {EXACT: "exact", OWN: "exact (own)", NOT_APPLICABLE: "–"}.get(outcome.status, outcome.status)
    if not outcome.words:
        return word
    note = f"`{outcome.words}`" if "`" not in outcome.words else outcome.words
    if note not in notes:
        notes.append(note)
    return f"{word} ({notes.index(note) + 1})"
