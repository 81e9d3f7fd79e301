import json
from pathlib import Path

from cli_run import Call


def test_all_committed_checkpoints_are_listed_and_the_newest_is_marked(run: Path, call: Call) -> None:
    result = call("ls", run)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["10", "20", "30"]
    assert ["newest" in row for row in rows] == [False, False, True]


def test_json_has_the_same_with_exact_sizes(run: Path, call: Call) -> None:
    result = call("ls", run, "--json")
    assert result.exit_code == 0
    checkpoints = json.loads(result.stdout)
    assert [one["step"] for one in checkpoints] == [10, 20, 30]
    for one in checkpoints:
        files = Path(one["path"]).glob("data-*/*.zip")
        assert one["nbytes"] == sum(path.stat().st_size for path in files)
        assert (one["world_size"], one["generation"], one["problem"]) == (1, 1, None)


def test_a_damaged_manifest_is_listed_as_such_and_the_others_stay(run: Path, call: Call) -> None:
    manifest = run / "step-00000020" / "manifest-0001.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    result = call("ls", run)
    assert result.exit_code == 1
    damaged = [line for line in result.stdout.splitlines() if "NOT USABLE" in line]
    assert len(damaged) == 1
    assert damaged[0].split()[0] == "20"
    assert "newest" in result.stdout
    problems = [one["problem"] for one in json.loads(call("ls", run, "--json").stdout)]
    assert [problem is None for problem in problems] == [True, False, True]


def test_an_attempt_without_a_manifest_is_not_listed(run: Path, call: Call) -> None:
    (run / "step-00000030" / "manifest-0001.json").unlink()
    checkpoints = json.loads(call("ls", run, "--json").stdout)
    assert [one["step"] for one in checkpoints] == [10, 20]
    assert [one["newest"] for one in checkpoints] == [False, True]


def test_a_run_that_is_not_there_is_an_error_of_its_own(tmp_path: Path, call: Call) -> None:
    result = call("ls", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "nothing" in result.stderr


def test_a_linked_step_is_listed_as_such(run: Path, tmp_path: Path, call: Call) -> None:
    (run / "step-00000030").rename(tmp_path / "elsewhere")
    (run / "step-00000030").symlink_to(tmp_path / "elsewhere")
    rows = [line for line in call("ls", run).stdout.splitlines() if "a link, never deleted" in line]
    assert [row.split()[0] for row in rows] == ["30"]
    assert [one["linked"] for one in json.loads(call("ls", run, "--json").stdout)] == [False, False, True]


def test_gc_leaves_a_linked_step_and_what_it_points_to(run: Path, tmp_path: Path, call: Call) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (run / "step-00000010").rename(other / "step-00000010")
    (run / "step-00000010").symlink_to(other / "step-00000010")
    before = sorted(other.rglob("*"))
    assert call("gc", run, "--keep-last", 1).exit_code == 0
    assert sorted(other.rglob("*")) == before
    assert sorted(path.name for path in run.glob("step-*")) == ["step-00000010", "step-00000030"]
