"""The requirements files pin every package exactly, and requirements-dev.txt covers what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def pins(file: str = "requirements-dev.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
            assert match, f"{line!r} is not an exact pin"
            found[canonicalize_name(match[1])] = match[2]
    return found


def test_every_requirement_is_an_exact_pin() -> None:
    assert len(pins()) > 20
    assert len(pins("requirements-servers.txt")) > 20
    assert len(pins("requirements-zoo.txt")) > 20
    assert len(pins("requirements-integrations.txt")) > 20
    assert len(pins("requirements-deepspeed.txt")) > 20


@pytest.mark.parametrize(
    "file", ["requirements-zoo.txt", "requirements-integrations.txt", "requirements-deepspeed.txt"]
)
def test_every_environment_has_the_same_torch_and_numpy(file: str) -> None:
    for name in ("torch", "numpy", "ml-dtypes", "numcodecs", "setuptools"):
        assert pins(file)[name] == pins()[name]


def test_both_environments_have_the_same_of_what_they_share() -> None:
    mine, others = pins(), pins("requirements-servers.txt")
    shared = {"fsspec", "s3fs", "aiobotocore", "botocore", "numpy", "pytest"}
    assert {name: others[name] for name in shared} == {name: mine[name] for name in shared}


def test_the_pins_cover_and_satisfy_the_project_and_its_dev_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [need for extra in ("torch", "mindspore", "mpi", "zarr", "cli", "s3", "dev") for need in extras[extra]]
    pinned = pins()
    for need in map(Requirement, wanted):
        if need.name != "ckptengine":
            name = canonicalize_name(need.name)
            assert name in pinned, f"{need} is not pinned"
            assert need.specifier.contains(pinned[name]), f"{need} excludes the pin {pinned[name]}"
