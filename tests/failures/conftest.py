"""Folders for many small runs, and a checkpoint to be forged."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import SECRET, state

import ckptengine as ce

GIB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a process dies in the same way there, and nothing waits for a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("original") / "point"
    ce.save(place, state())
    (place.parent / "secret").write_bytes(SECRET)
    return place


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original.parent, tmp_path / "all")
    return tmp_path / "all" / "point"


@pytest.fixture
def bounded() -> Iterator[None]:
    """No more than another GiB of address space, and no more than a minute."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIB, kept[1]))
    began = time.monotonic()
    yield
    resource.setrlimit(resource.RLIMIT_AS, kept)
    assert time.monotonic() - began < 60
