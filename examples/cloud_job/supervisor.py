"""Issues jobs to machines, and again to other ones when the environment check, the machine or the job fails."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DONE", "NOT_HERE", "NOWHERE", "Issue", "Machine", "Supervisor", "say"]

HERE = Path(__file__).resolve().parent
DONE, NOT_HERE, NOWHERE = 0, 69, 78
"""What job.sh's exit codes say: it is done; not on this machine; on no machine. All others: failed, try again."""
BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", flush=True)


class Machine:
    """A machine with a job on it. Its disk is a folder, its log stays when it is lost."""

    def __init__(self, disk: Path, log: Path, command: list[str], environment: Mapping[str, str], cores: set[int]):
        self.disk, self.log = disk, log
        disk.mkdir(parents=True)
        all_cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # what is started now inherits them
        try:
            with log.open("w") as output, log.with_suffix(".err").open("w") as errors:
                self._job = subprocess.Popen(
                    command,
                    env=os.environ | environment | {"LOCAL": str(disk / "ckpt")},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    start_new_session=True,
                )
        finally:
            os.sched_setaffinity(0, all_cores)

    @property
    def exit_code(self) -> int | None:
        """The job's exit code, negative for a signal, None while it runs."""
        return self._job.poll()

    @property
    def step(self) -> int:
        """The step that was trained last, 0 before the first."""
        return int(([0, *re.findall(r"^step (\d+):", self.log.read_text(), re.MULTILINE)])[-1])

    def lose(self) -> int:
        """Kill all processes at once and delete the disk; return how many there were."""
        victims = [self._job.pid, *_descendants(self._job.pid)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._job.wait()
        while any(_alive(pid) for pid in victims):
            time.sleep(0.02)
        shutil.rmtree(self.disk)
        return len(victims)


def _descendants(pid: int) -> list[int]:
    """Return the processes below one; torchrun's ranks are in sessions of their own, so that no group has them all."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for found in lists for child in found]
    return children + [one for child in children for one in _descendants(child)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@dataclass(frozen=True)
class Issue:
    """One issue of a job: to which machine, how it ended, and what became of it."""

    machine: str
    exit_code: int
    verdict: str
    log: str


class Supervisor:
    """Issues jobs until they are done, at most `tries` times each. `bucket` is a URL, `folder` has disks and logs."""

    def __init__(self, folder: Path, bucket: str, tries: int = 4, timeout: float = 240) -> None:
        self.folder, self.bucket, self.tries, self.timeout = folder, bucket, tries, timeout
        self.issued: dict[str, list[Issue]] = {}
        (folder / "logs").mkdir(parents=True)

    def run(self, name: str) -> str:
        """Return the URL of a job's output."""
        return f"{self.bucket}/runs/{name}"

    def submit(
        self,
        name: str,
        *arguments: str,
        run: str = "",
        job: Path = HERE / "job.sh",
        weak: tuple[int, ...] = (),
        watch: Callable[[int, Machine], None] = lambda number, machine: None,
    ) -> list[Issue]:
        """Issue a job until it is done or hopeless, or too often; return what became of each issue.

        `arguments` are those of the job, `run` the name of its output where that is not its own. Machines whose number
        is in `weak` have a single core. `watch` is called again and again while a machine runs, and may lose it.
        """
        issues = self.issued[name] = []
        say(f"--- job {name}: {' '.join(Path(one).name for one in arguments)}")
        for number in range(1, self.tries + 1):
            cores = os.sched_getaffinity(0)
            machine = Machine(
                self.folder / "machines" / f"{name}-{number}",
                self.folder / "logs" / f"{name}-{number}.txt",
                ["bash", str(job), *arguments],
                {"RUN": self.run(run or name)},
                {min(cores)} if number in weak else cores,
            )
            say(f"issued to machine {number}")
            try:
                code = self._follow(machine, lambda: watch(number, machine))  # noqa: B023 - called within this turn
            except BaseException:
                machine.lose()
                raise
            verdict = {DONE: "done", NOT_HERE: "this machine is not fit", NOWHERE: "no machine can do it"}.get(
                code, f"the job failed with {code}" if code >= 0 else "the machine was lost"
            )
            again = code not in (DONE, NOWHERE) and number < self.tries
            say(f"machine {number}: {verdict}{', the job is issued again' if again else ''}")
            issues.append(Issue(f"machine {number}", code, verdict, machine.log.read_text()))
            if not again:
                break
        return issues

    def _follow(self, machine: Machine, watch: Callable[[], None]) -> int:
        """Print what a job says, but steps and passed checks, until it has ended; return its exit code."""
        deadline, shown = time.monotonic() + self.timeout, 0
        while True:
            code = machine.exit_code
            lines = machine.log.read_text().splitlines(keepends=True)
            while shown < len(lines) and lines[shown].endswith("\n"):
                if not lines[shown].startswith(("step ", "ok ")):
                    print(f"           | {lines[shown].rstrip()}", flush=True)
                shown += 1
            if code is not None:
                return code
            if time.monotonic() > deadline:
                raise TimeoutError(f"{machine.log}: the job has not ended in {self.timeout:g} s")
            watch()
            time.sleep(0.1)
