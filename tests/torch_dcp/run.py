"""Runs PyTorch's own tests of its distributed checkpoint with this engine's writer and reader in the place of torch's.

    python tests/torch_dcp/run.py SOURCE [FILE ...]

SOURCE is a checkout of pytorch/pytorch, of the version that is installed if possible; nothing is fetched. Each file of
`test/distributed/checkpoint` is run twice, with torch's own storage and with this engine's. Printed are, per file, how
many tests pass with both, and the names of those that pass with torch's own alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = 900


def outcomes(file: Path, ours: bool) -> dict[str, str]:
    """Return of each test of a file `passed`, `skipped`, or the last line of what was raised."""
    paths = [str(HERE)] if ours else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(file)]
        try:
            run = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return {"(the whole file)": f"not done after {SECONDS} s"}
        if not report.exists():
            return {"(the whole file)": (run.stdout + run.stderr)[-300:]}
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
            problem = next((item for item in case if item.tag in ("failure", "error", "skipped")), None)
            if problem is None:
                found[name] = "passed"
            elif problem.tag == "skipped":
                found[name] = "skipped"
            else:
                lines = re.findall(r"^(?:E +)?(\S*(?:Error|Exception)\b.*)$", problem.text or "", re.MULTILINE)
                found[name] = (lines or [problem.get("message") or problem.tag])[-1][:200]
        return found


def main(source: Path, names: list[str]) -> None:
    folder = source / "test" / "distributed" / "checkpoint"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: give a checkout of pytorch/pytorch")
    files = [folder / name for name in names] if names else sorted(folder.rglob("test_*.py"))
    total = [0, 0, 0]
    print("| file | passed with both | torch's alone | neither |\n|---|---|---|---|")
    problems = []
    for file in files:
        theirs, ours = outcomes(file, ours=False), outcomes(file, ours=True)
        ran = [name for name, outcome in theirs.items() if outcome != "skipped"]
        both = [name for name in ran if theirs[name] == ours.get(name) == "passed"]
        lost = [name for name in ran if theirs[name] == "passed" and name not in both]
        numbers = len(both), len(lost), len(ran) - len(both) - len(lost)
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        print(f"| {file.relative_to(folder)} | {' | '.join(map(str, numbers))} |", flush=True)
        problems += [f"{file.relative_to(folder)} {name}: {ours.get(name, 'not run')}" for name in lost]
    print(f"| all | {' | '.join(map(str, total))} |\n")
    print("\n".join(problems))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
