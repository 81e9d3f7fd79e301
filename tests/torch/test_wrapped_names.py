"""Whatever a model is wrapped in, its leaves have the names of the bare model: any wrapping loads into any other."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from state_memory import load, save
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckptengine as ce
from ckptengine.comm.single import SingleProcess
from ckptengine.errors import StateError
from ckptengine.inspect import describe
from ckptengine.state.tree import flatten


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def inside(module: nn.Module) -> nn.Module:
    """Wrap some of the submodules."""
    module[0] = compiled(module[0])  # type: ignore[index, operator]
    module[2] = checkpoint_wrapper(module[2])  # type: ignore[index, operator]
    return module


def in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


WRAPPINGS: dict[str, Any] = {
    "bare": lambda module: module,
    "compiled": compiled,
    "compiled in place": in_place,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda module: compiled(DistributedDataParallel(module)),
    "DDP of compiled": lambda module: DistributedDataParallel(compiled(module)),
    "wrapped inside": inside,
    "DDP of compiled of wrapped inside": lambda module: DistributedDataParallel(compiled(inside(module))),
    "DataParallel": nn.DataParallel,
}
MEAN = "mean of weights and buffers"
AVERAGES: dict[str, Any] = {
    "none": None,
    MEAN: lambda model: AveragedModel(model, use_buffers=True),
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
}


@pytest.fixture(autouse=True, scope="module")
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(wrapping: str, average: str, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = WRAPPINGS[wrapping](nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.05)}
    if AVERAGES[average] is not None:
        state["average"] = AVERAGES[average](model)
    return state


def train(state: dict[str, Any], first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        torch.manual_seed(step)
        loss = state["model"](torch.randn(5, 4)).square().mean()
        loss.backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        if "average" in state:
            state["average"].update_parameters(state["model"])
        losses.append(loss.item())
    return losses


def bits(state: dict[str, Any]) -> dict[Any, bytes]:
    """Return the bits of all leaves, by path, and of the plain values."""
    flat = flatten(state)
    found = {leaf.path: leaf.parts[0].memory.owner.detach().numpy().tobytes() for leaf in flat.arrays}  # type: ignore[union-attr, attr-defined]
    return {**found, **{path: repr(value).encode() for path, value in flat.values.items()}}


@pytest.mark.parametrize(
    "average", ["none", "EMA", pytest.param("mean of weights and buffers", marks=pytest.mark.long)]
)
def test_a_checkpoint_of_any_wrapping_loads_into_any_other_and_training_goes_on_equal(average: str) -> None:
    begun = make("bare", average)
    train(begun, 0, 3)
    reference = bits(begun)
    stored = {}
    for wrapping in WRAPPINGS:
        state = make(wrapping, average, seed=1)
        assert load(save(begun), state).complete, wrapping
        assert bits(state) == reference, wrapping
        stored[wrapping] = save(state)
    for source in WRAPPINGS:
        for wrapping in WRAPPINGS:
            state = make(wrapping, average, seed=2)
            assert load(stored[source], state).complete, (source, wrapping)
            assert bits(state) == reference, (source, wrapping)
    losses = train(begun, 3, 6)
    for source, wrapping in zip(WRAPPINGS, [*list(WRAPPINGS)[1:], "bare"], strict=True):
        state = make(wrapping, average, seed=3)
        load(stored[source], state)
        assert train(state, 3, 6) == losses, (source, wrapping)
        assert bits(state) == bits(begun), (source, wrapping)


def test_what_is_shown_of_a_checkpoint_has_the_bare_names(tmp_path: Any) -> None:
    alone = SingleProcess()
    ce.save(tmp_path / "bare", make("bare", "EMA"), comm=alone)
    ce.save(tmp_path / "wrapped", make("DDP of compiled of wrapped inside", "EMA"), comm=alone)
    bare, wrapped = describe(tmp_path / "bare"), describe(tmp_path / "wrapped")
    names = [leaf.name for leaf in wrapped.leaves]
    assert names == [leaf.name for leaf in bare.leaves]
    assert {"model.0.weight", "model.1.running_mean", "average.2.bias", "average.n_averaged"} <= set(names)
    assert wrapped.values == bare.values


def test_averaged_weights_are_loaded_as_those_of_a_model() -> None:
    state = make("DDP of compiled", "EMA")
    train(state, 0, 2)
    model = make("bare", "none", seed=1)["model"]
    report = load(save(state), {"model": model}, rename={"average": "model", "model": "old"}, strict=False)
    assert not report.missing
    expected = state["average"].module.module.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[f"_orig_mod.{name}"])


def test_averaged_weights_that_were_saved_with_the_prefix_are_loaded_by_renaming_it() -> None:
    state, target = make("bare", "EMA"), make("bare", "EMA", seed=1)
    train(state, 0, 2)
    prefixed = save({"average": state["average"].state_dict()})
    assert ("average", "module.0.weight") in prefixed.saved.leaves
    assert load(prefixed, {"average": target["average"]}, rename={"average.module": "average"}).complete
    assert bits({"average": target["average"]}) == bits({"average": state["average"]})


def test_a_model_that_has_the_averages_own_name_is_refused() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("n_averaged", torch.zeros(1))
    with pytest.raises(StateError, match=r"'n_averaged' and 'module\.n_averaged' are called 'n_averaged'"):
        flatten({"average": AveragedModel(model)})
