"""`make demo`: two nodes train a GPT, one is killed, and the other goes on from the newest checkpoint.

Two torchrun agents of two ranks each train `train_gpt.py`. In the middle, one whole node (agent and ranks) gets
SIGKILL. torchrun restarts the job with the two ranks that are left. They find the newest checkpoint, re-shard it from
four ranks to two, and train to the end. Then the account is printed, and every claim in it is checked: the exit code is
0 only if all hold. Logs, checkpoints, digests and `loss.png` stay in the folder `demo`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import account
from nodes import Node, free_port
from rich.console import Console
from rich.status import Status

EXAMPLES = Path(__file__).resolve().parent


def drive(folder: Path, steps: int, every: int, timeout: float, console: Console) -> account.Course:
    """Start both nodes, kill one in the middle, wait for the other's end; return what happened."""
    started = time.monotonic()
    deadline = started + timeout
    log, run = folder / "log", folder / "run"
    command = [str(EXAMPLES / "train_gpt.py"), f"--checkpoints={run}", f"--steps={steps}", f"--every={every}"]
    command += [f"--events={log}"]
    port = free_port()
    # Off a multiple of `every`, so that some steps are lost with the node and have to be trained again.
    kill_at = steps // 2 // every * every + every // 2

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/dim]  {text}", highlight=False)

    def wait(condition: Callable[[account.Course], bool], what: str, needed: list[Node], status: Status) -> None:
        while True:
            ended = [node for node in needed if node.exit_code is not None]
            course = account.Course.read(log, run, every)
            if condition(course):
                return
            if ended:
                raise RuntimeError(f"{ended[0].name} ended with {ended[0].exit_code} before {what}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{timeout:.0f} s have passed before {what}")
            status.update(course.progress())
            time.sleep(0.05)

    nodes: list[Node] = []
    try:
        with console.status("starting two nodes") as status:
            nodes.append(Node("node A", port, log / "node-a.txt", command, host=True))
            nodes.append(Node("node B", port, log / "node-b.txt", command, host=False))
            first, second = nodes
            say("two torchrun agents started, two ranks each")
            wait(lambda course: course.ranks == 4, "the first step of four ranks", nodes, status)
            say("4 ranks train")
            wait(
                lambda course: course.last_step >= kill_at and course.committed != (),
                f"step {kill_at} was reached and a checkpoint was committed",
                nodes,
                status,
            )
            before = account.Course.read(log, run, every)
            killed = second.kill()
            say(f"[bold red]SIGKILL to node B[/]: its agent and {len(killed) - 1} ranks, during step "
                f"{before.last_step + 1}; newest checkpoint: step {before.committed[-1]}")  # fmt: skip
            wait(lambda course: len(course.starts) > len(before.starts), "the job came back", [first], status)
            course = account.Course.read(log, run, every)
            say(f"[bold green]the job is back[/] with {course.starts[-1].world_size} ranks, "
                f"resumed at step {course.starts[-1].resumed}")  # fmt: skip
            wait(lambda _: first.exit_code is not None, "node A ended", [first], status)
            if first.exit_code != 0:
                raise RuntimeError(f"node A ended with {first.exit_code}")
            say("trained to the end")
    finally:
        for node in nodes:
            node.kill()
    return account.Course.read(log, run, every, killed=tuple(killed), at_kill=before.committed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    parser.add_argument("--timeout", type=float, default=300, help="longest duration, in seconds")
    args = parser.parse_args()

    console = Console(width=None if sys.stdout.isatty() else 100)
    for part in ("log", "run"):
        shutil.rmtree(args.folder / part, ignore_errors=True)
    (args.folder / "log").mkdir(parents=True)
    started = time.monotonic()
    try:
        course = drive(args.folder.resolve(), args.steps, args.every, args.timeout, console)
    except (RuntimeError, TimeoutError) as error:
        console.print(f"[bold red]The demo failed:[/] {error}")
        for path in sorted((args.folder / "log").glob("node-*.txt")):
            lines = path.read_text(errors="replace").splitlines()[-30:]
            console.print(f"the end of {path}:", *lines, sep="\n", markup=False, highlight=False)
        return 1
    account.draw(course, args.folder / "loss.png")
    checks = [*account.check(course, args.steps), account.audited(args.folder / "run")]
    good = account.show(course, checks, console)
    console.print(f"[dim]{time.monotonic() - started:.0f} s in all; the curve is in {args.folder}/loss.png[/]")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
