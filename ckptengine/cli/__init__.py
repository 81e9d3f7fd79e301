"""The command `ckptengine`: look at checkpoints and check them."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command with the process's arguments, and exit with its code."""
    try:
        from ckptengine.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("click", "rich"):
            raise
        print(
            f"ckptengine: {error.name} is not installed, and the command needs it: pip install '.[cli]' in a clone "
            "of ckptengine",
            file=sys.stderr,
        )
        sys.exit(2)  # 1 would say that something is damaged
    app(prog_name="ckptengine")
