"""The example of a cloud platform: its story, and what it issues again and what it does not."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from forkserver import fork
from launch import ROOT, environment

from ckptengine.catalog.listing import committed

EXAMPLE = ROOT / "examples" / "cloud_job"
COMMANDS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setenv("PATH", COMMANDS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return importlib.import_module("supervisor")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_story_of_a_lost_machine_ends_with_the_bytes_of_one_that_was_not_lost(tmp_path):
    command = [sys.executable, str(EXAMPLE / "cloud_platform.py"), "--folder", str(tmp_path / "story")]
    clean = {name: value for name, value in environment().items() if name != "BUCKET"}
    done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    report = json.loads((tmp_path / "story" / "report.json").read_text())
    assert len(report["checks"]) == 10
    assert [check["claim"] for check in report["checks"] if not check["good"]] == []
    codes = {name: [issue["exit_code"] for issue in issues] for name, issues in report["issued"].items()}
    assert codes == {"uninterrupted": [0], "digits": [69, -9, 0], "incremental": [0], "wider": [78]}
    assert done.stdout.endswith(" s  all is as it should be\n")
    assert os.listdir(tmp_path) == ["story"]


@pytest.mark.parametrize(
    ("codes", "issued"),
    [
        ([0], [0]),
        ([69, 0], [69, 0]),
        ([1, 69, 0], [1, 69, 0]),
        ([75, 0], [75, 0]),
        ([1, 1, 1, 0], [1, 1, 1]),
        ([78, 0], [78]),
        ([69, 78, 0], [69, 78]),
    ],
    ids=str,
)
def test_a_job_is_issued_again_so_many_times_unless_no_machine_can_do_it(supervisor, tmp_path, codes, issued):
    """A job that ends with the next of some codes each time; every start has an empty disk."""
    script = tmp_path / "job.sh"
    script.write_text(
        f'test -e "$LOCAL" && exit 5; mkdir "$LOCAL"\n'
        f"number=$(ls {tmp_path}/starts | wc -l); touch {tmp_path}/starts/$number\n"
        f"codes=({' '.join(map(str, codes))}); exit ${{codes[$number]}}\n"
    )
    (tmp_path / "starts").mkdir()
    platform = supervisor.Supervisor(tmp_path / "platform", "s3://nowhere", tries=3)
    assert [issue.exit_code for issue in platform.submit("job", job=script)] == issued


def test_a_state_that_cannot_be_saved_ends_the_job_for_good(supervisor, tmp_path, in_environment, monkeypatch):
    monkeypatch.setenv("RANKS", "1")
    script = tmp_path / "train_unsavable.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLE)!r})\n"
        "import train\n"
        "train.ce.RNG = object  # no state that ckptengine knows\n"
        "train.main()\n"
    )
    platform = supervisor.Supervisor(tmp_path / "platform", in_environment.url)
    (issue,) = platform.submit("broken", str(script))
    assert issue.exit_code == 78
    assert "this machine is fit" in issue.log
    errors = (tmp_path / "platform" / "logs" / "broken-1.err").read_text()
    assert re.search(r"^StateError: rng: .*object", errors, re.MULTILINE), errors[-3000:]
    assert committed(in_environment.storage("runs/broken")) == []


def test_each_check_of_the_environment_that_fails_is_a_line_and_the_others_are_made_all_the_same(
    tmp_path, in_environment
):
    (tmp_path / "file").touch()
    place = {"--run": "s3://no-such-bucket/run", "--local": f"{tmp_path}/file/ckpt", "--ranks": 10_000}
    code, out = check(place)
    assert code == 1
    assert [line.split()[:2] for line in out] == [
        ["ok", "python"],
        ["ok", "torch"],
        ["ok", "ckptengine"],
        ["FAILED", "ranks"],
        ["FAILED", "disk"],
        ["FAILED", "bucket"],
        ["this", "machine"],
    ]
    assert "10000 are needed" in out[3]
    assert f"{tmp_path}/file/ckpt" in out[4]
    assert "NoSuchBucket" in out[5] or "bucket does not exist" in out[5]
    place = {"--run": f"{in_environment.url}/run", "--local": tmp_path, "--gpus": 10_000, "--room-mib": 1 << 40}
    code, out = check(place)
    assert code == 1
    assert "accelerators" in out[3]
    assert re.search(r"FAILED +disk .* MiB free, 1,099,511,627,776 are needed", out[4])
    assert out[5].startswith("ok")
    assert os.listdir(tmp_path) == ["file"]
    assert in_environment.names() == []


def check(options: dict[str, object]) -> tuple[int, list[str]]:
    command = [str(EXAMPLE / "check_environment.py")]
    command += [str(part) for option in options.items() for part in option]
    with fork(command, env=environment(), stdout=subprocess.PIPE) as done:
        out, _ = done.communicate(200)
    return done.wait(), out.splitlines()
