"""The sdist builds, and its wheel works where only numpy, ml_dtypes and numcodecs are installed."""

import ast
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ckptengine as ce

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, sys
import ckptengine as ce
assert all(hasattr(ce, name) for name in ce.__all__)  # each is imported when it is asked for
loaded = sorted({name.partition(".")[0] for name in sys.modules})
import numpy as np
ce.save("checkpoint", {"model": {"w": np.arange(12.0).reshape(3, 4)}, "step": 7})
back = ce.load("checkpoint")
assert (back["model"]["w"] == np.arange(12.0).reshape(3, 4)).all() and back["step"] == 7, back
print(json.dumps({"file": ce.__file__, "loaded": loaded}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source distribution, and the wheel that was built from it."""
    tree, out = tmp_path_factory.mktemp("tree") / "ckptengine", tmp_path_factory.mktemp("out")
    unwanted = (
        ".git",
        ".venv*",
        "build",
        "dist",
        "demo",
        "runs",
        "*.egg-info",
        "*.so",
        "*cache*",
        ".hypothesis",
    )
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*unwanted))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=tree)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def link_dependencies(names: list[str], folder: Path) -> None:
    """Link the installed distributions, and what they need in turn, into a folder for PYTHONPATH."""
    todo, done = list(names), set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or ()} - {".."}:
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
        needed = map(Requirement, distribution.requires or ())
        todo += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]


@pytest.mark.long
def test_the_source_distribution_holds_what_is_needed_to_build_and_test(
    distributions: tuple[Path, Path],
) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.[ch]")}
    others = {
        "Makefile",
        "LICENSE",
        "README.md",
        "requirements-dev.txt",
        "requirements-servers.txt",
        "docs/format.md",
        "examples/demo.py",
    }
    assert sources
    assert sources | others | {"tests/house/test_package.py", "ckptengine/py.typed"} <= names


@pytest.mark.long
def test_the_wheel_serves_every_python_from_3_11_on(distributions: tuple[Path, Path]) -> None:
    wheel = distributions[1]
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "ckptengine/_native.abi3.so" in names
    assert "ckptengine/_native.pyi" in names
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks", "csrc"))]


@pytest.mark.long
def test_the_wheel_works_without_torch_zarr_and_click(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    venv, linked = tmp_path / "venv", tmp_path / "linked"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    install = ("install", "--quiet", "--no-index", "--no-deps", distributions[1])
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    linked.mkdir()
    link_dependencies(["numpy", "ml_dtypes", "numcodecs"], linked)
    report = json.loads(run(python, "-c", PROGRAM, cwd=tmp_path, PYTHONPATH=str(linked)))
    assert Path(report["file"]).is_relative_to(venv)
    assert "numpy" in report["loaded"]
    assert not {"torch", "zarr", "click", "rich", "mindspore", "mpi4py", "fsspec"} & set(report["loaded"])


@pytest.mark.long
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_the_same_wheel_works_on_later_pythons(distributions: tuple[Path, Path], tmp_path: Path, version: str) -> None:
    python = later_python(version)
    if python is None:
        pytest.skip(f"no Python {version} is here")
    run(python, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-cache-dir", distributions[1], cwd=tmp_path)
    report = json.loads(run(python, "-c", PROGRAM, cwd=tmp_path))
    assert Path(report["file"]).is_relative_to(tmp_path / "venv")


def later_python(version: str) -> Path | None:
    """Return an interpreter of a version, of the system or of pyenv."""
    found = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"), Path(f"/usr/bin/python{version}")]
    return next((path for path in found if path.exists()), None)


def test_importing_the_package_imports_no_framework_even_where_they_are_installed() -> None:
    program = "import json, sys; from ckptengine import *; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.partition(".")[0] for name in json.loads(run(sys.executable, "-c", program, cwd=ROOT))}
    assert "ckptengine" in loaded
    assert not {"torch", "zarr", "click", "rich", "mindspore", "mpi4py", "fsspec", "tensorstore"} & loaded


def test_importing_the_package_imports_none_of_its_names_before_they_are_asked_for() -> None:
    program = "import json, sys, ckptengine; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run(sys.executable, "-c", program, cwd=ROOT))
    own = [name for name in loaded if name.startswith("ckptengine.")]
    assert own == ["ckptengine.errors", "ckptengine.export", "ckptengine.load", "ckptengine.save"]
    assert not {"numpy", "asyncio", "ssl", "numcodecs"} & set(loaded)


def test_a_name_is_for_type_checkers_what_it_is_when_it_is_asked_for() -> None:
    told = {}
    for node in ast.walk(ast.parse((ROOT / "ckptengine" / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ckptengine."):
            told |= {name.name: str(node.module) for name in node.names}
    assert told == ce._MODULES
    assert sorted([*told, "errors"]) == sorted(ce.__all__)
    for name, module in told.items():
        assert getattr(ce, name) is getattr(importlib.import_module(module), name), name


def test_the_functions_stay_what_they_are_whatever_is_imported_of_the_folders_of_their_names() -> None:
    program = (
        "import ckptengine.export.run, ckptengine.load.loader, ckptengine.save.saver, ckptengine as ce\n"
        "assert callable(ce.export) and callable(ce.load) and callable(ce.save)\n"
    )
    run(sys.executable, "-c", program, cwd=ROOT)
