"""Every system that is compared brings the same bytes back, twice."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.disk import count_files, remove
from benchmarks.limit import Copier, shares, warm_memory
from benchmarks.peers import measured
from benchmarks.systems import SYSTEMS

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def small_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (33, 7), "a.bias": (33,), "b": (5,), "c": (400, 300)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", SYSTEMS, ids=lambda kind: kind.name)
def test_the_same_bytes_come_back(kind: Any, tmp_path: Path) -> None:
    state = small_state()
    expected = {name: tensor.clone() for name, tensor in state.items()}
    system = kind(tmp_path, state)
    try:
        for _ in range(2):
            found = measured(system, state, expected)
            assert 0 <= found.stall <= found.durable
            assert found.files == count_files(system.path) > 0
            remove(system.path)
            assert not list(tmp_path.rglob("*.*"))
    finally:
        system.close()


def test_a_changed_value_is_found(tmp_path: Path) -> None:
    state = small_state()
    expected = {name: tensor.clone() for name, tensor in state.items()}
    expected["b"][2] += 1
    with pytest.raises(AssertionError, match="the first is b"):
        measured(SYSTEMS[0](tmp_path, state), state, expected)


def test_shares_of_a_copy_are_equal_and_complete() -> None:
    pieces = [(0, 1000, 10), (10, 2000, 1), (11, 3000, 22)]
    parts = shares(pieces, 3)
    assert [sum(size for _, _, size in part) for part in parts] == [11, 11, 11]
    covered = {(ours + i, theirs + i) for part in parts for ours, theirs, size in part for i in range(size)}
    assert covered == {(ours + i, theirs + i) for ours, theirs, size in pieces for i in range(size)}


def test_every_way_of_copying_copies_all() -> None:
    state = small_state()
    size = sum(tensor.nbytes for tensor in state.values())
    memory = warm_memory(size)
    copier = Copier(memory, state, tries=1)
    plain = b"".join(tensor.numpy().tobytes() for tensor in state.values())
    for copy_in, copy_out in copier.ways.values():
        memory[:size] = bytes(size)
        copy_in()
        assert memory[:size] == plain
        for tensor in state.values():
            tensor.zero_()
        copy_out()
        assert b"".join(tensor.numpy().tobytes() for tensor in state.values()) == plain
    copier.close()
