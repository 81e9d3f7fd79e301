"""Helpers of tests, which lie on one path of modules whatever their folder."""

import re
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORT = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)


def test_no_two_helpers_that_tests_import_have_one_name() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    files = defaultdict(set)
    for folder in settings["pythonpath"]:
        for path in (ROOT / folder).glob("*.py"):
            files[path.stem].add(str(path.relative_to(ROOT)))
    imported = set()
    for path in (ROOT / "tests").rglob("*.py"):
        imported.update(IMPORT.findall(path.read_text()))
    assert {name: paths for name, paths in files.items() if len(paths) > 1 and name in imported} == {}
