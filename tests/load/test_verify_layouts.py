"""The look after a load takes another layout for what it is, and finds whole copies beside sharded parameters."""

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from holders import Holder
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckptengine as ce
from ckptengine.errors import RestoreDifferenceError
from ckptengine.state.bind.tensors import TensorBinder
from ckptengine.torch.adapter import TorchAdapter

pytestmark = pytest.mark.usefixtures("one_rank")
WHOLE = r"spread over the ranks in the checkpoint, a whole copy on every rank now, shape \(4, 4\)"


@pytest.fixture
def one_rank():
    """Form a process group of one rank, in which tensors can be sharded."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def network(*, sharded, whole=()):
    """Return two layers of one shape and their optimizer; those that `whole` names are left out of the sharding."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    for name, layer in model.items():
        if sharded and name not in whole:
            fully_shard(layer)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def trained(**options):
    state = network(**options)
    for parameter in state["model"].parameters():
        parameter.grad = parameter.detach() * 0.5 + 0.25
    state["optimizer"].step()
    return state


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(state, other):
    pairs = zip(state["model"].parameters(), other["model"].parameters(), strict=True)
    for one, two in pairs:
        assert torch.equal(full(one.detach()), full(two.detach()))
        for key, value in other["optimizer"].state[two].items():
            assert torch.equal(full(state["optimizer"].state[one][key]), full(value))


def table(value):
    return ce.ShardedArray(np.full((4, 4), value, np.float32), (4, 4), (0, 0))


def test_a_sharded_checkpoint_loads_into_whole_tensors_beside_a_sharded_one_of_their_shape(tmp_path):
    saved = {**trained(sharded=True), "table": table(7)}
    ce.save(tmp_path / "point", saved)
    here = {**network(sharded=False), "table": table(0)}
    ce.load(tmp_path / "point", into=here)
    assert_equal(here, saved)
    assert np.array_equal(here["table"].local, table(7).local)


def test_a_parameter_that_is_no_longer_sharded_takes_its_state_beside_a_sharded_one_of_its_shape(tmp_path):
    saved = trained(sharded=True)
    ce.save(tmp_path / "point", saved)
    here = network(sharded=True, whole=("b",))
    ce.load(tmp_path / "point", into=here)
    assert_equal(here, saved)


def test_an_object_s_whole_tensor_takes_what_was_sharded(tmp_path):
    saved = trained(sharded=True)
    ce.save(tmp_path / "point", {**saved, "held": Holder(mean=saved["model"]["a"].weight.detach().clone())})
    held = Holder(mean=torch.zeros(4, 4))
    ce.load(tmp_path / "point", into={**network(sharded=True), "held": held})
    assert torch.equal(held.state["mean"], full(saved["model"]["a"].weight.detach()))


def test_whole_state_of_a_sharded_parameter_is_found(tmp_path, monkeypatch):
    ce.save(tmp_path / "point", trained(sharded=True))
    make = TorchAdapter.new_state_tensor
    monkeypatch.setattr(TorchAdapter, "new_state_tensor", lambda *args, **more: full(make(*args, **more)))
    with pytest.raises(RestoreDifferenceError, match="state 'exp_avg' of a sharded parameter of shape .* plain"):
        ce.load(tmp_path / "point", into=network(sharded=True, whole=("a",)))
    ce.load(tmp_path / "point", into=network(sharded=False))


def test_a_whole_copy_in_an_object_beside_sharded_tensors_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBinder, "_spread", lambda self, adapter, path, dtype, shape: None)
    saved = trained(sharded=True)
    ce.save(tmp_path / "point", {**saved, "held": Holder(mean=saved["model"]["a"].weight.detach().clone())})
    with pytest.raises(RestoreDifferenceError, match=rf"held.mean: {WHOLE}"):
        ce.load(tmp_path / "point", into={**network(sharded=True), "held": Holder()})
    ce.load(tmp_path / "point", into={**network(sharded=False), "held": Holder()})


def test_an_object_that_gathers_what_it_is_handed_is_found(tmp_path):
    class Gathering(Holder):
        def load_state_dict(self, state):
            self.state = {key: full(value) for key, value in state.items()}

    saved = trained(sharded=True)
    ce.save(tmp_path / "point", {**saved, "held": Gathering(mean=saved["model"]["a"].weight.detach().clone())})
    held = Gathering(mean=torch.zeros_like(saved["model"]["a"].weight.detach()))
    with pytest.raises(RestoreDifferenceError, match=rf"held.mean: {WHOLE}"):
        ce.load(tmp_path / "point", into={**network(sharded=True), "held": held})
