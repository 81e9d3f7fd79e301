"""How far a long wait is: a bar where somebody watches, lines in the log where nobody does."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["shown"]

_LINE_SECONDS = 10.0

_log = logging.getLogger("ckptengine")


@contextlib.contextmanager
def shown(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a call that takes the bytes done so far, of `total`, and shows them as "WHAT … %".

    A bar on the standard error where that is a terminal and rich is installed; else a log line every 10 seconds.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        bar = None
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    if bar is None or not sys.stderr.isatty():
        yield _lines(what, total)
        return
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))


def _lines(what: str, total: int) -> Callable[[int], None]:
    told = time.monotonic()

    def show(done: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _LINE_SECONDS:
            told = time.monotonic()
            _log.info("%s: %.0f %% of %s bytes", what, 100 * min(done, total) / max(1, total), f"{total:,}")

    return show
