"""One checkpoint, two frameworks: what torch saved MindSpore loads, and the other way round."""

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
import torch
from mindspore import nn

import ckptengine as ce
from ckptengine.errors import LoadMismatchError
from ckptengine.mindspore import names_from_torch
from ckptengine.torch.names import names_from_mindspore
from tests.mindspore.training import as_array


class Cell(nn.Cell):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm((8,))
        self.body = nn.SequentialCell(nn.Dense(8, 6), nn.BatchNorm1d(6), nn.Dense(6, 2, has_bias=False))
        self.conv = nn.Conv2d(3, 4, 3)
        self.groups = nn.GroupNorm(2, 4)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2, bias=False)
        )
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.groups = torch.nn.GroupNorm(2, 4)


PAIRS = {
    "table.embedding_table": "table.weight",
    "norm.gamma": "norm.weight",
    "norm.beta": "norm.bias",
    "body.0.weight": "body.0.weight",
    "body.0.bias": "body.0.bias",
    "body.1.gamma": "body.1.weight",
    "body.1.beta": "body.1.bias",
    "body.1.moving_mean": "body.1.running_mean",
    "body.1.moving_variance": "body.1.running_var",
    "body.2.weight": "body.2.weight",
    "conv.weight": "conv.weight",
    "groups.gamma": "groups.weight",
    "groups.beta": "groups.bias",
}


def check(cell, module):
    parameters, tensors = cell.parameters_dict(), module.state_dict()
    assert set(parameters) == set(PAIRS)
    for ours, theirs in PAIRS.items():
        bits = tensors[theirs].detach().contiguous().view(torch.uint8).numpy().tobytes()
        assert as_array(parameters[ours]).tobytes() == bits, ours
        assert np.frombuffer(bits, np.uint8).any()


def fill(module):
    for number, tensor in enumerate(module.state_dict().values()):
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(number)) - 0.5)


def test_what_torch_saved_mindspore_loads_and_torch_loads_again_bit_for_bit(tmp_path):
    module, cell = Module(), Cell()
    fill(module)
    ce.save(tmp_path / "torch", {"model": module})
    ce.load(tmp_path / "torch", into={"net": cell}, only=["net"], rename=names_from_torch(cell))
    check(cell, module)
    ce.save(tmp_path / "mindspore", {"net": cell})
    other = Module()
    report = ce.load(
        tmp_path / "mindspore",
        into={"model": other},
        only=["model"],
        rename=names_from_mindspore(other),
        strict=False,
    )
    assert report.missing == ("model.body.1.num_batches_tracked",)
    assert not report.unexpected
    check(cell, other)


def test_bfloat16_keeps_its_bits_between_the_frameworks(tmp_path):
    module = torch.nn.Linear(5, 3).to(torch.bfloat16)
    cell = nn.Dense(5, 3).to(ms.bfloat16)
    ce.save(tmp_path / "torch", {"model": module})
    ce.load(tmp_path / "torch", into={"net": cell}, rename=names_from_torch(cell))
    assert as_array(cell.weight).dtype == ml_dtypes.bfloat16
    assert as_array(cell.weight).tobytes() == module.weight.detach().view(torch.int16).numpy().tobytes()
    ce.save(tmp_path / "mindspore", {"net": cell})
    other = torch.nn.Linear(5, 3).to(torch.bfloat16)
    ce.load(tmp_path / "mindspore", into={"model": other}, rename=names_from_mindspore(other))
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other.bias, module.bias)


class Ends(nn.Cell):
    """An embedding and a head, which may be one parameter: it then has one name."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Dense(4, 4, has_bias=False), nn.Dense(4, 4, has_bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize(("before", "after", "what"), [(True, False, "missing"), (False, True, "unexpected")])
def test_a_tied_parameter_and_two_of_two_names_are_told_apart_in_the_optimizer_too(tmp_path, before, after, what):
    saved, found = ({"net": net, "optimizer": nn.Adam(net.trainable_params())} for net in (Ends(before), Ends(after)))
    ce.save(tmp_path / "one", saved)
    with pytest.raises(LoadMismatchError) as raised:
        ce.load(tmp_path / "one", into=found)
    expected = {"net.head.weight", *(f"optimizer.moment{number}.head.weight" for number in (1, 2))}
    assert set(getattr(raised.value.report, what)) == expected
