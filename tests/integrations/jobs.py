"""Start a script on some ranks, as a launcher does, and kill what is left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from forkserver import fork
from ports import free_port

__all__ = ["run_job"]


def run_job(script: Path, options: dict[str, Any], ranks: int = 1, timeout: float = 120) -> tuple[set[int], str]:
    """Run a script with its options on its ranks; return their exit codes, and what they said."""
    common = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    if ranks > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
                   "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    with tempfile.TemporaryFile("w+") as said, contextlib.ExitStack() as stack:
        jobs = [
            stack.enter_context(
                fork(
                    [str(script), json.dumps(options)],
                    env=common if ranks == 1 else common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            )
            for rank in range(ranks)
        ]
        codes = {job.wait(timeout) for job in jobs}
        said.seek(0)
        text = said.read()
    print(text[-6000:])
    return codes, text
