"""What the platform plays, and what must have come of it."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from supervisor import DONE, NOT_HERE, NOWHERE, Machine, Supervisor, say

import ckptengine as ce

__all__ = ["Check", "steps", "story"]

TRAIN = str(Path(__file__).resolve().with_name("train.py"))


@dataclass(frozen=True)
class Check:
    """A claim, whether it holds, and what was found."""

    claim: str
    good: bool
    found: str


def story(supervisor: Supervisor, epochs: int) -> Iterator[Check]:
    """Play it, and check what must have come of it."""
    run = supervisor.run("digits")
    base = f"--epochs={epochs} --classes=8".split()
    issues = supervisor.submit("uninterrupted", TRAIN, *base)
    yield Check("a job to which nothing happens is done", issues[-1].exit_code == DONE, issues[-1].verdict)
    lost: dict[str, Any] = {}

    def watch(number: int, machine: Machine) -> None:
        """Lose the second machine when the bucket has a checkpoint and training has gone beyond it."""
        if number == 2 and not lost and 0 < (newest(run) or 0) < machine.step:
            lost.update(processes=machine.lose(), step=machine.step, newest=newest(run))
            say(f"machine 2 is lost at step {lost['step']}: {lost['processes']} processes killed, its disk is gone")
            say(f"what is left is in the bucket: step {lost['newest']}")

    issues = supervisor.submit("digits", TRAIN, *base, weak=(1,), watch=watch)
    codes = [issue.exit_code for issue in issues]
    yield Check(
        "a machine that fails the environment check gets no training: the job goes to another one",
        codes[0] == NOT_HERE and "FAILED  ranks" in issues[0].log and "step " not in issues[0].log,
        "; ".join(re.findall(r"FAILED .*", issues[0].log)),
    )
    yield Check(
        "a machine that is lost in the middle is replaced, and the job is done",
        codes == [NOT_HERE, -signal.SIGKILL, DONE],
        " → ".join(issue.verdict for issue in issues),
    )
    if codes[-1] != DONE:
        return
    fetched = re.findall(r": step (\d+), generation 1, .* fetched", issues[-1].log)
    resumed = re.findall(r"^resumed at step (\d+)", issues[-1].log, re.MULTILINE)
    yield Check(
        "an empty machine fetches the newest checkpoint and resumes there",
        bool(lost) and fetched == resumed == [str(lost["newest"])],
        f"fetched step {', '.join(fetched)}, resumed at {', '.join(resumed)}, lost at {lost.get('step')}",
    )
    yield equal(run, supervisor.run("uninterrupted"))
    yield audited(run)
    in_bucket, on_disk = steps(run), steps(supervisor.folder / "machines/digits-3/ckpt")
    yield Check(
        "the output is in the bucket, and each place keeps its own number of checkpoints",
        0 < len(in_bucket) <= 3 and len(on_disk) == 2 and in_bucket[-1] == on_disk[-1],
        f"bucket: steps {', '.join(map(str, in_bucket))}; disk: {', '.join(map(str, on_disk))}",
    )

    warm = [TRAIN, "--epochs=2", "--warm-start", run]
    issues = supervisor.submit("incremental", *warm)
    yield Check("incremental training on new classes is done", issues[-1].exit_code == DONE, issues[-1].verdict)
    yield warm_started(issues[-1].log, run)

    before = steps(run)
    issues = supervisor.submit("wider", TRAIN, *base, "--width=40", run="digits")
    yield Check(
        "what no machine can mend is not issued again, and the output stands",
        [issue.exit_code for issue in issues] == [NOWHERE] and steps(run) == before,
        f"a wider network for the same run: {issues[-1].verdict}, issued {len(issues)} time(s)",
    )


def steps(run: str | Path) -> list[int]:
    """Return the steps that are committed in a run: those that have a manifest."""
    system, root = fsspec.url_to_fs(str(run), use_listings_cache=False)
    return sorted({int(path.split("/")[-2].removeprefix("step-")) for path in system.glob(f"{root}/step-*/manifest-*")})


def newest(run: str) -> int | None:
    """Return the newest committed step of a run, None where there is none."""
    return max(steps(run), default=None)


def equal(run: str, other: str) -> Check:
    """Compare weights, optimizer and scheduler of two runs' newest checkpoints, byte for byte."""
    found, expected = (dict(_leaves(ce.load(one, only=["model", "optimizer", "scheduler"]))) for one in (run, other))
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    nbytes = sum(len(value) for value in found.values() if isinstance(value, bytes))
    return Check(
        "the job that was lost ends with the very bytes of one that never was",
        bool(found) and not differing,
        f"{len(found)} leaves, {nbytes:,} bytes" + "".join(f"; {name} differs" for name in differing[:5]),
    )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a loaded checkpoint by name, arrays as their bytes."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, np.ndarray | np.generic):
        yield name, value.tobytes()
    else:
        yield name, value


def audited(run: str) -> Check:
    """Have `ckptengine audit` prove that every sample was used once in each epoch, over both lives."""
    done = subprocess.run(["ckptengine", "audit", run], capture_output=True, text=True, check=False)
    proven = [line for line in done.stdout.splitlines() if line.startswith("PROVEN")]
    found = "; ".join(line.removeprefix("PROVEN ") for line in proven) or done.stdout + done.stderr
    return Check("every sample was used exactly once in each epoch", done.returncode == 0 and bool(proven), found)


def warm_started(log: str, base: str) -> Check:
    """Compare the weights that a job began with to those that the base run ended with."""
    weights = sorted(_leaves(ce.load(base, only=["model.features"])["model"]))
    expected = hashlib.sha256(b"".join(value for _, value in weights)).hexdigest()
    good = f"features {expected}" in log and re.search(r"mismatched +model\.head\.weight", log) is not None
    return Check(
        "it begins with the weights of the finished run, and with a new head",
        good,
        f"features {expected[:12]}…, the head has other classes",
    )
