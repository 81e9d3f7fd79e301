"""The account of the demo: what happened, read from the logs; each claim checked; tables and curves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import digests
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ckptengine.audit import audit

__all__ = ["Check", "Course", "Save", "Start", "Step", "audited", "check", "draw", "show"]

LIFE_COLOURS = ("cyan", "green", "yellow", "magenta")


@dataclass(frozen=True, slots=True)
class Start:
    """The job came to life: with how many ranks, and from which step (None: from nothing)."""

    time: float
    resumed: int | None
    world_size: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one life (0 is the first): its loss over the global batch."""

    time: float
    step: int
    loss: float
    world_size: int
    life: int


@dataclass(frozen=True, slots=True)
class Save:
    """One committed save as rank 0 saw it: bytes of its archive, and seconds."""

    time: float
    step: int
    world_size: int
    nbytes: int
    stall: float
    durable: float
    waited: float


@dataclass(frozen=True, slots=True)
class Course:
    """The whole course. `committed` are the steps that have a manifest, `at_kill` those that had one then."""

    log: Path
    every: int
    starts: tuple[Start, ...]
    steps: tuple[Step, ...]
    saves: tuple[Save, ...]
    ended: bool
    committed: tuple[int, ...]
    killed: tuple[int, ...]
    at_kill: tuple[int, ...]

    @classmethod
    def read(
        cls, log: Path, run: Path, every: int, killed: tuple[int, ...] = (), at_kill: tuple[int, ...] = ()
    ) -> Course:
        """Read the events that are there by now, and which checkpoints are."""
        path = log / "events.jsonl"
        text = path.read_text() if path.exists() else ""
        starts: list[Start] = []
        steps: list[Step] = []
        saves: list[Save] = []
        ended = False
        for line in text[: text.rfind("\n") + 1].splitlines():
            event: dict[str, Any] = json.loads(line)
            kind = event.pop("event")
            if kind == "start":
                starts.append(Start(**event))
            elif kind == "step":
                steps.append(Step(**event, life=len(starts) - 1))
            elif kind == "save":
                saves.append(Save(**event))
            ended = kind == "end"
        manifests = run.glob("step-*/manifest-*.json")
        committed = {int(re.sub(r"\D", "", path.parent.name)) for path in manifests}
        return cls(
            log,
            every,
            tuple(starts),
            tuple(steps),
            tuple(saves),
            ended,
            tuple(sorted(committed)),
            killed,
            at_kill,
        )

    @property
    def last_step(self) -> int:
        """The step that was trained last, 0 before the first."""
        return self.steps[-1].step if self.steps else 0

    @property
    def ranks(self) -> int:
        """How many ranks trained the last step, 0 before the first."""
        return self.steps[-1].world_size if self.steps else 0

    def life(self, number: int) -> dict[int, Step]:
        """Return step number -> step of one life."""
        return {step.step: step for step in self.steps if step.life == number}

    def progress(self) -> str:
        """Return one line on where the training is."""
        if not self.steps:
            return "starting"
        now = self.steps[-1]
        return f"step {now.step} on {now.world_size} ranks, loss {now.loss:.3f}"


@dataclass(frozen=True, slots=True)
class Check:
    """A claim, whether it holds, and what was found."""

    claim: str
    good: bool
    found: str


def check(course: Course, total: int) -> list[Check]:
    """Hold the course against everything that the demo claims; `total` is the last step."""
    first, last = course.life(len(course.starts) - 2), course.life(len(course.starts) - 1)
    sizes = [start.world_size for start in course.starts]
    resumed = course.starts[-1].resumed
    newest = course.at_kill[-1] if course.at_kill else None
    trained = {step.step for step in course.steps}
    missing = sorted(set(range(1, total + 1)) - trained)
    replayed = sorted(first.keys() & last.keys()) if len(course.starts) > 1 else []
    apart = max((abs(first[step].loss - last[step].loss) for step in replayed), default=math.nan)
    early = [first[step].loss for step in sorted(first)[:5]]
    late = [last[step].loss for step in sorted(last)[-5:]]
    fell = bool(early) and bool(late) and sum(late) / len(late) < 0.8 * sum(early) / len(early)
    return [
        Check(
            "one node of two was killed",
            len(course.killed) == 3,
            f"SIGKILL to {len(course.killed)} processes",
        ),
        Check("the job came back with the ranks left", sizes[-2:] == [4, 2], " → ".join(map(str, sizes)) + " ranks"),
        Check(
            "it resumed from the newest checkpoint",
            resumed is not None and newest is not None and newest <= resumed <= max(first, default=-1),
            f"step {resumed}; newest at the kill: {newest}",
        ),
        _equal_leaves(course, resumed),
        Check("every step was trained", not missing and course.ended, f"1 to {max(trained, default=0)}"),
        Check(
            "steps trained twice agree",
            not replayed or apart < 1e-3,
            f"{len(replayed)} steps lost with the node, losses at most {apart:.1e} apart"
            if replayed
            else "no step was lost",
        ),
        Check("the loss fell", fell, f"{early[0]:.2f} → {late[-1]:.2f}" if early and late else "no losses"),
        Check(
            "the last step is committed",
            bool(course.committed) and course.committed[-1] == total // course.every * course.every,
            f"kept: {', '.join(map(str, course.committed))}",
        ),
    ]


def _equal_leaves(course: Course, resumed: int | None) -> Check:
    """Compare the digests that 4 ranks took when they saved with those that 2 ranks took after restoring."""
    claim = "state before and after re-sharding is equal, leaf by leaf"
    if resumed is None or len(course.starts) < 2:
        return Check(claim, False, "nothing was restored")
    paths = [
        course.log / digests.file_name("saved", resumed, course.starts[-2].world_size),
        course.log / digests.file_name("restored", resumed, course.starts[-1].world_size),
    ]
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        return Check(claim, False, f"no digests: {', '.join(absent)}")
    before, after = (json.loads(path.read_text()) for path in paths)
    names = before.keys() | after.keys()
    differing = sorted(name for name in names if before.get(name) != after.get(name))
    found = f"{len(names) - len(differing)} of {len(names)} SHA-256 digests at step {resumed}"
    if differing:
        found += f"; not {', '.join(differing[:3])}" + (", …" if len(differing) > 3 else "")
    return Check(claim, bool(names) and not differing, found)


def audited(run: Path) -> Check:
    """Prove from the checkpoints that each sample of each finished epoch was used once, over both lives."""
    report = audit(run)
    (cursor,) = report.cursors
    epochs = f"{cursor.finished_epochs} epochs of {cursor.order['length']} samples"
    found = "; ".join(finding.message for finding in report.findings) or f"{epochs}, {len(cursor.lives)} lives"
    return Check("every sample of each epoch was used exactly once", report.clean and cursor.finished_epochs > 0, found)


def show(course: Course, checks: Sequence[Check], console: Console) -> bool:
    """Print the account; return whether every claim holds."""
    console.print()
    console.print(_lives(course))
    console.print(_saves(course))
    console.print(_curve(course))
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for one in checks:
        mark = "[bold green]✓[/]" if one.good else "[bold red]✗[/]"
        table.add_row(mark, one.claim, Text(one.found, style="" if one.good else "red"))
    console.print(table)
    return all(one.good for one in checks)


def _lives(course: Course) -> Table:
    table = Table(title="Lives of the job", box=box.SIMPLE, title_justify="left")
    for head in ("life", "ranks", "resumed at step", "restore, ms", "steps trained", "loss"):
        table.add_column(head, justify="right")
    for number, start in enumerate(course.starts):
        steps = list(course.life(number).values())
        table.add_row(
            f"[{LIFE_COLOURS[number % 4]}]{number + 1}[/]",
            str(start.world_size),
            "—" if start.resumed is None else str(start.resumed),
            "—" if start.resumed is None else f"{start.seconds * 1e3:.0f}",
            f"{steps[0].step} to {steps[-1].step}" if steps else "none",
            f"{steps[0].loss:.3f} → {steps[-1].loss:.3f}" if steps else "",
        )
    return table


def _saves(course: Course) -> Table:
    table = Table(title="Saves, as rank 0 saw them", box=box.SIMPLE, title_justify="left", caption_justify="left")
    for head in ("step", "ranks", "archive, MB", "stall, ms", "durable, ms", "waited, ms"):
        table.add_column(head, justify="right")
    for save in course.saves:
        times = (f"{seconds * 1e3:.1f}" for seconds in (save.stall, save.durable, save.waited))
        table.add_row(str(save.step), str(save.world_size), f"{save.nbytes / 1e6:.2f}", *times)
    pairs = zip(course.steps, course.steps[1:], strict=False)
    durations = [after.time - before.time for before, after in pairs if before.life == after.life]
    if durations:
        table.caption = f"a training step took {median(durations) * 1e3:.0f} ms (median)"
    return table


def _curve(course: Course, height: int = 10, width: int = 64) -> Text:
    """Draw the loss as columns, each step in the colour of the life that trained it last."""
    best = {step.step: step for step in course.steps}
    if not best:
        return Text("no steps")
    stride = math.ceil(len(best) / width)
    columns = [best[number] for number in sorted(best)][::stride]
    low = 0.9 * min(column.loss for column in columns)
    high = max(column.loss for column in columns)
    eighths = [round((column.loss - low) / (high - low) * height * 8) for column in columns]
    text = Text("Loss over the steps, across the kill\n", style="italic")
    for row in reversed(range(height)):
        text.append(f"{low + (high - low) * (row + 1) / height:8.2f} ┤", style="dim not italic")
        for column, level in zip(columns, eighths, strict=True):
            part = min(8, max(0, level - 8 * row))
            text.append(" ▁▂▃▄▅▆▇█"[part], style=f"{LIFE_COLOURS[column.life % 4]} not italic")
        text.append("\n")
    axis = [" "] * len(columns)
    for index, column in enumerate(columns):
        label = str(column.step)
        if column.step % 10 == 0 and index + len(label) <= len(axis):
            axis[index : index + len(label)] = label
    text.append(" " * 8 + " └" + "─" * len(columns) + "\n" + " " * 10 + "".join(axis) + "\n", style="dim not italic")
    for number, start in enumerate(course.starts):
        origin = "from nothing" if start.resumed is None else f"from the checkpoint of step {start.resumed}"
        text.append("          █ ", style=f"{LIFE_COLOURS[number % 4]} not italic")
        text.append(f"{start.world_size} ranks, {origin}\n", style="not italic")
    return text


def draw(course: Course, path: Path) -> None:
    """Draw the loss curve of each life into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, start in enumerate(course.starts):
        steps = list(course.life(number).values())
        origin = "" if start.resumed is None else f", resumed at step {start.resumed}"
        axes.plot(
            [step.step for step in steps],
            [step.loss for step in steps],
            marker=".",
            label=f"{start.world_size} ranks{origin}",
        )
    first = course.life(len(course.starts) - 2)
    if course.killed and first:
        axes.axvline(max(first), color="tab:red", linestyle="--", label="one node killed")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.set_title("A node dies; training goes on from the newest checkpoint")
    axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))
