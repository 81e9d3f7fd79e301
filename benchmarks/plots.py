"""`plots`: the figures as pictures for the documents, from the JSON of a run."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.limit import Limit
from benchmarks.table import OURS

OURS_COLOR, PEER_COLOR, LIMIT_COLOR, TEXT_COLOR = "#1f6f8b", "#c3cbd1", "#c8553d", "#333333"
PHASE_COLORS = {"copy": "#1f6f8b", "write": "#7fb7be", "commit": "#e0a458"}
OTHER_PHASE_COLOR = "#9a9a9a"
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "axes.edgecolor": "#bbbbbb",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text: small and sharp
    "svg.hashsalt": "ckptengine",  # the same figures give the same file
}

Phase = tuple[str, float, float]
"""Name, start and end in seconds after the call."""


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures for which there are figures, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with plt.rc_context(STYLE):
        if results.get("peers", {}).get("systems"):
            files.append(_save(peers(results["peers"]), folder / "benchmarks-peers.svg"))
        rows = timelines(results)
        if rows:
            files.append(_save(timeline(rows), folder / "benchmarks-timeline.svg"))
    return files


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file, facecolor="white", metadata={"Date": None})
    plt.close(figure)
    return file


def peers(result: dict[str, Any]) -> Figure:
    """Draw bars of the medians of stall, durable and cold load; the limit is a line."""
    systems = dict(result["systems"])
    limit = systems.pop(Limit.name, None)
    names = sorted(systems, key=lambda name: statistics.median(systems[name]["durable"]), reverse=True)
    figure, panels = plt.subplots(1, 3, sharey=True, figsize=(7.2, 0.8 + 0.26 * len(names)), layout="constrained")
    for panel, (measure, title) in zip(
        panels, (("stall", "stall"), ("durable", "durable"), ("load", "cold load")), strict=True
    ):
        medians = [statistics.median(systems[name][measure]) for name in names]
        colors = [OURS_COLOR if name == OURS else PEER_COLOR for name in names]
        panel.barh(names, medians, color=colors, height=0.68)
        for place, value in enumerate(medians):
            panel.annotate(
                f"{value:.2f}", (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
            )
        if limit:
            value = statistics.median(limit[measure])
            panel.axvline(value, color=LIMIT_COLOR, linewidth=1, label=f"the machine's limit, {value:.2f}")
            panel.legend(
                loc="upper left", bbox_to_anchor=(0, 1.17), frameon=False, fontsize=8, borderpad=0, handlelength=1
            )
        panel.set_xlim(0, max(medians) * 1.22)
        panel.set_xlabel(f"{title}, s")
        panel.tick_params(axis="y", length=0)
    return figure


def timelines(results: dict[str, Any]) -> list[tuple[str, list[Phase]]]:
    """Return the phases of one save, for the single process and for each rank of the suite."""
    rows = []
    if results.get("peers", {}).get("last_save"):
        size = results["peers"]["nbytes"] / 1e9
        rows.append((f"1 process, {size:.2f} GB", phases(results["peers"]["last_save"])))
    suite = results.get("suite", {})
    for rank, stats in enumerate(suite.get("ranks", ())):
        rows.append((f"rank {rank} of {len(suite['ranks'])}", phases(stats)))
    return rows


def phases(stats: dict[str, Any]) -> list[Phase]:
    """Return a save's phases as it reported them."""
    return [(phase["name"], phase["began"], phase["ended"]) for phase in stats["phases"]]


def timeline(rows: Sequence[tuple[str, list[Phase]]]) -> Figure:
    """Draw for each process what a save does when."""
    figure, panel = plt.subplots(figsize=(7.2, 0.9 + 0.26 * len(rows)), layout="constrained")
    seen: dict[str, Any] = {}
    for place, (_, found) in enumerate(rows):
        for name, start, end in found:
            color = PHASE_COLORS.get(name, OTHER_PHASE_COLOR)
            seen[name] = panel.barh(place, end - start, left=start, color=color, height=0.62)
    panel.set_yticks(range(len(rows)), [label for label, _ in rows])
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel("seconds after the call; training waits for the copy only")
    panel.set_xlim(left=0)
    figure.legend(seen.values(), seen.keys(), loc="outside upper left", ncols=len(seen), frameon=False)
    return figure
