"""Try the entries of the zoo, and compare the table that comes of it with the one in docs/zoo.md.

python tests/zoo/run.py                     all entries; fails where a line is at fault or the table differs
python tests/zoo/run.py --write             the same, and writes the table
python tests/zoo/run.py --details AdamW     those whose package or name contains a word; no table
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Some optimizers compile their step. What is saved is the same, and compiling takes minutes.
os.environ.update(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")

from entry import Entry
from forks import import_all, on_one_process, on_two_ranks
from table import table
from trial import FAULTS, Outcome

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only what has one of these in its package or its name")
    parser.add_argument("--only", choices=("one", "two"), help="only one process, or only two ranks")
    parser.add_argument("--details", action="store_true", help="print what differs, and where errors come from")
    parser.add_argument("--write", action="store_true", help="write the table into docs/zoo.md")
    parser.add_argument("--entries", default="catalogue", help="the module that has `catalogue()`")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    entries: list[Entry] = importlib.import_module(options.entries).catalogue()
    entries = [e for e in entries if not options.names or any(n in f"{e.package}.{e.name}" for n in options.names)]
    import_all()
    outcomes: dict[str, dict[Entry, Outcome]] = {"one": {}, "two": {}}
    for where, trials in (("one", on_one_process), ("two", on_two_ranks)):
        if options.only in (None, where):
            for entry, outcome in trials(entries):
                outcomes[where][entry] = outcome
                show(where, entry, outcome, options.details)
    faults = sum(outcome.status in FAULTS for tried in outcomes.values() for outcome in tried.values())
    print(f"{len(entries)} entries, {faults} faults, {time.monotonic() - started:.0f} s")
    whole = not options.names and options.only is None and options.entries == "catalogue"
    differs = whole and not up_to_date(table(entries, outcomes["one"], outcomes["two"]), write=options.write)
    return 1 if faults or differs else 0


def show(where: str, entry: Entry, outcome: Outcome, details: bool) -> None:
    words = f": {outcome.words}" if outcome.words else ""
    print(f"{where} {entry.package}.{entry.name}: {outcome.status}{words}", flush=True)
    if details:
        for line in outcome.details[:12]:
            print("    " + line.replace("\n", "\n    "))


def up_to_date(text: str, *, write: bool) -> bool:
    """Whether the document has this table; prints what differs, or with `write` makes it so."""
    if write:
        DOCUMENT.write_text(text)
        return True
    before = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    for line in difflib.unified_diff(
        before.splitlines(), text.splitlines(), str(DOCUMENT), "this run", lineterm="", n=0
    ):
        print(line)
    return before == text


if __name__ == "__main__":
    sys.exit(main())
