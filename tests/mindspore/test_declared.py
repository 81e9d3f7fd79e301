"""Parameters that are split by hand, and what MindSpore's optimizers keep for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ckptengine as ce
from ckptengine.comm.base import Communicator, KeyValueStore
from ckptengine.errors import StateError
from ckptengine.save.reading import StateReader
from ckptengine.schema.leaf import Placement

ms = pytest.importorskip("mindspore")


class Twin(Communicator):
    """One of two ranks, of which the other says whatever this one says."""

    world_size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def all_gather(self, value: bytes, timeout: float) -> list[bytes]:
        return [value, value]

    def broadcast(self, value: bytes | None, timeout: float, root: int = 0) -> bytes:
        raise AssertionError("not asked for")

    def barrier(self, timeout: float) -> None:
        raise AssertionError("not asked for")

    def store(self) -> KeyValueStore | None:
        return None


def network() -> ms.nn.Cell:
    return ms.nn.SequentialCell(ms.nn.Dense(4, 6), ms.nn.Dense(6, 2))


def test_moments_are_split_as_their_weight_and_counters_are_not() -> None:
    net = network()
    optimizer = ms.nn.Adam(net.trainable_params())
    declared = ce.Sharded(net, {"0": ce.Shard(0), "1.weight": ce.Shard(1)}, comm=Twin(1))
    leaves = StateReader().read({"net": declared, "optimizer": optimizer}).leaves
    shapes = {".".join(map(str, leaf.path)): leaf.shape for leaf in leaves if leaf.placement is Placement.SHARDED}
    weights = {"0.weight": (12, 4), "0.bias": (12,), "1.weight": (2, 12)}
    assert shapes == {f"net.{name}": shape for name, shape in weights.items()} | {
        f"optimizer.{moment}.{name}": shape for moment in ("moment1", "moment2") for name, shape in weights.items()
    }
    first = next(leaf for leaf in leaves if leaf.path == ("optimizer", "moment1.1.weight"))
    assert first.parts[0].box.offset == (0, 6)


def test_a_tensor_without_a_place_of_its_own_is_refused_by_name() -> None:
    net = network()
    ce.Sharded(net, {"0": ce.Shard(0)}, comm=Twin(0))
    with pytest.raises(StateError, match=r"1\.bias: split along dimension 1"):
        ce.Sharded(net, {"1": ce.Shard(1)}, comm=Twin(0))


def test_a_declared_cell_is_saved_and_filled_on_one_rank(tmp_path: Path) -> None:
    net, other = network(), network()
    rules = {"*.weight": ce.Shard(0, parts=["gate", "up"])}
    ce.save(tmp_path / "one", {"net": ce.Sharded(net, rules)})
    ce.load(tmp_path / "one", into={"net": ce.Sharded(other, rules)})
    for one, two in zip(net.get_parameters(), other.get_parameters(), strict=True):
        assert np.array_equal(one.asnumpy(), two.asnumpy())
