"""The zoo: `python tests/zoo/run.py [NAME …]` tries all entries, or those whose name or package contains NAME."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from catalogue import catalogue
from entry import Entry
from forks import import_all, on_one_process, on_two_ranks
from trial import FAULTS, Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only what has one of these in its name or its package")
    parser.add_argument("--only", choices=("one", "two"), help="only one process, or only two ranks")
    parser.add_argument("--details", action="store_true", help="print what differs, and where errors come from")
    options = parser.parse_args(arguments)
    entries = [e for e in catalogue() if not options.names or any(n in f"{e.package}.{e.name}" for n in options.names)]
    import_all()
    started = time.monotonic()
    faults = 0
    for where, trials in (("one", on_one_process), ("two", on_two_ranks)):
        if options.only in (None, where):
            wanted = [entry for entry in entries if where == "one" or not entry.alone]
            for entry, outcome in trials(wanted):
                faults += outcome.status in FAULTS
                show(where, entry, outcome, options.details)
    print(f"{len(entries)} entries, {faults} faults, {time.monotonic() - started:.0f} s")
    return 1 if faults else 0


def show(where: str, entry: Entry, outcome: Outcome, details: bool) -> None:
    print(f"{where} {entry.package}.{entry.name}: {outcome.status} {outcome.words}".rstrip(), flush=True)
    if details:
        for line in outcome.details[:12]:
            print("    " + line.replace("\n", "\n    "))


if __name__ == "__main__":
    sys.exit(main())
