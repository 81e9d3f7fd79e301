"""Helpers of tests, which lie on one path of modules whatever their folder."""

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_two_helpers_that_tests_import_have_one_name() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    files = defaultdict(set)
    for folder in settings["pythonpath"]:
        for path in (ROOT / folder).glob("*.py"):
            files[path.stem].add(str(path.relative_to(ROOT)))
    imported = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    assert {name: paths for name, paths in files.items() if len(paths) > 1 and name in imported} == {}
