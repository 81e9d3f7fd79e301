"""What a save and a load cost in copies, bytes, calls and files: counts, which no noise of a machine changes."""

import sys

import numpy as np
import pytest
import torch

import ckptengine as ce
from ckptengine.counters import Counters, counters

MIB = 1 << 20


def state_of(leaves: int, nbytes: int) -> dict[str, torch.Tensor]:
    return {f"layer.{number}.weight": torch.full((nbytes // 4,), float(number)) for number in range(leaves)}


def counted(call) -> Counters:
    before = counters()
    call()
    return counters() - before


@pytest.fixture
def large():
    return state_of(40, 3 * MIB + 4096)


def test_a_save_copies_each_byte_once_and_writes_it_once(tmp_path, large):
    nbytes = sum(tensor.nbytes for tensor in large.values())
    ce.save(tmp_path / "point", large)
    second = counted(lambda: ce.save(tmp_path / "point", large))
    assert second.copied_nbytes == nbytes
    assert nbytes <= second.written_nbytes <= 1.01 * nbytes
    assert second.read_nbytes == 0


def test_a_save_makes_few_system_calls_and_files_however_large_it_is(tmp_path, large):
    ce.save(tmp_path / "point", large)
    second = counted(lambda: ce.save(tmp_path / "point", large))
    # Requests of 8 MiB, and the tail.
    assert second.write_calls <= second.written_nbytes // (8 * MIB) + 2
    small = state_of(3, 40)
    ce.save(tmp_path / "small", small)
    other = counted(lambda: ce.save(tmp_path / "small", small))
    # Archive, layout, lease, manifest, and two looks at the clock of the storage.
    assert second.files == other.files <= 6
    # Two threads make the attempt's directories; either may be the one that syncs them.
    assert max(second.syncs, other.syncs) <= 16


def test_a_load_reads_and_copies_each_byte_once(tmp_path, large):
    nbytes = sum(tensor.nbytes for tensor in large.values())
    ce.save(tmp_path / "point", large)
    load = counted(lambda: ce.load(tmp_path / "point", into=large))
    assert load.copied_nbytes <= 1.01 * nbytes
    assert nbytes <= load.read_nbytes <= 1.01 * nbytes


def test_loading_one_leaf_of_many_reads_little_more_than_that_leaf(tmp_path, large):
    ce.save(tmp_path / "point", large)
    name, tensor = next(iter(large.items()))
    load = counted(lambda: ce.load(tmp_path / "point", into={name: tensor}, only=[name]))
    blocks = tensor.nbytes // 65536 + 2
    assert load.read_nbytes <= blocks * 65536 + 256 * 1024, "its blocks, and the layout file"


def python_calls(call) -> int:
    """Return how many calls of Python functions the calling thread makes in a call."""
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def test_the_second_save_runs_no_python_for_each_tensor(tmp_path):
    def calls_of_third_save(leaves):
        state, handles = state_of(leaves, 64), []
        ce.save(tmp_path / f"{leaves}", state)
        ce.save(tmp_path / f"{leaves}", state)
        count = python_calls(lambda: handles.append(ce.async_save(tmp_path / f"{leaves}", state)))
        handles[0].durable.result()
        return count

    calls = calls_of_third_save(20), calls_of_third_save(2020)
    assert calls[1] - calls[0] <= 100, calls
    assert calls[0] < 600


def test_a_second_save_sees_what_was_written_without_walking_the_state(tmp_path):
    state = {"a": np.arange(5.0), "n": 1}
    ce.save(tmp_path / "point", state)
    state["a"] += 1
    state["n"] = 2
    ce.save(tmp_path / "point", state)
    stored = ce.load(tmp_path / "point")
    assert stored["n"] == 2
    assert stored["a"].tolist() == [1, 2, 3, 4, 5]
