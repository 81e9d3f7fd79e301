"""A network and its optimizer in files of their own: what each gets back, beside MindSpore's own calls."""

import mindspore as ms
import mindspore.experimental.optim as experimental
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

import ckptengine as ce
from ckptengine.mindspore import load_checkpoint, load_param_into_net, save_checkpoint
from tests.mindspore.training import as_array

OPTIMIZERS = {
    "Adam": lambda weights: nn.Adam(weights, 0.1),
    "Momentum": lambda weights: nn.Momentum(weights, 0.1, 0.9),
    "AdamWeightDecay": lambda weights: nn.AdamWeightDecay(weights, 0.1),
    "SGD": lambda weights: nn.SGD(weights, 0.1, 0.9),
    "experimental.Adam": lambda weights: experimental.Adam(weights, 0.1),
    "experimental.SGD": lambda weights: experimental.SGD(weights, 0.1, momentum=0.9),
}


def trained(kind, seed):
    """Return a network and an optimizer after one step, whose weights and own parameters all differ."""
    ms.set_seed(seed)
    np.random.seed(seed)
    net = nn.Dense(3, 2)
    optimizer = OPTIMIZERS[kind](net.trainable_params())
    loss = nn.MSELoss()
    gradient = ms.value_and_grad(lambda x, y: loss(net(x), y), None, optimizer.parameters)
    numbers = np.random.RandomState(seed)
    _, gradients = gradient(Tensor(numbers.rand(4, 3).astype(np.float32)), Tensor(np.ones((4, 2), np.float32)))
    optimizer(gradients)
    return net, optimizer


def contents(cell):
    return {parameter.name: as_array(parameter).tobytes() for parameter in cell.get_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_network_and_its_optimizer_in_two_files_come_back_as_from_mindspores_own_calls(kind, tmp_path):
    net, optimizer = trained(kind, 1)
    calls = {
        "ours": (save_checkpoint, load_checkpoint, load_param_into_net),
        "theirs": (ms.save_checkpoint, ms.load_checkpoint, ms.load_param_into_net),
    }
    outcomes = {}
    for who, (save, load, put) in calls.items():
        save(net, str(tmp_path / f"{who}-net.ckpt"))
        save(optimizer, str(tmp_path / f"{who}-optimizer.ckpt"))
        other_net, other = trained(kind, 2)
        told = put(other_net, load(str(tmp_path / f"{who}-net.ckpt")))
        told += put(other, load(str(tmp_path / f"{who}-optimizer.ckpt")))
        outcomes[who] = told, set(load(str(tmp_path / f"{who}-optimizer.ckpt"))), contents(other_net), contents(other)
    assert outcomes["ours"] == outcomes["theirs"]
    assert outcomes["ours"][0] == ([], [], [], [])
    assert outcomes["ours"][2] == contents(net)
    assert outcomes["ours"][3] == contents(optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_are_never_taken_from_an_optimizers_own_parameters(kind, tmp_path):
    """What `ckptengine.save` has of an optimizer are its own parameters: the weights are the network's."""
    _, optimizer = trained(kind, 1)
    ce.save(tmp_path / "optimizer", {"optimizer": optimizer})
    own = load_checkpoint(str(tmp_path / "optimizer"))
    net, other = trained(kind, 2)
    weights = contents(net)
    assert load_param_into_net(net, own)[0] == ["weight", "bias"]
    assert contents(net) == weights
    missing, _ = load_param_into_net(other, own)
    assert set(missing) == {"weight", "bias"}
    expected = {name: value for name, value in contents(optimizer).items() if name not in missing}
    assert contents(other) == expected | weights


def test_a_prefix_of_a_networks_name_is_still_taken_off(tmp_path):
    class Wrapped(nn.Cell):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Dense(3, 2)

    ms.set_seed(1)
    wrapped, plain = Wrapped(), nn.Dense(3, 2)
    save_checkpoint(wrapped, str(tmp_path / "a.ckpt"))
    missing, _ = load_param_into_net(plain, load_checkpoint(str(tmp_path / "a.ckpt")))
    assert missing == []
    assert as_array(plain.weight).tobytes() == as_array(wrapped.backbone.weight).tobytes()


class Holder:
    """An object that keeps what it is given."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16, ms.int8])
@pytest.mark.parametrize("here", ["nothing", "parameters of other names", "tensors"])
def test_a_parameter_in_an_object_comes_back_with_its_name_whatever_was_there(here, dtype, tmp_path):
    def parameter(name, number, grad):
        result = Parameter(Tensor(np.full(2, number, np.float32)), name=name, requires_grad=grad)
        result.set_dtype(dtype)
        return result

    taught, frozen = parameter("taught", 1, True), parameter("frozen", 2, False)
    saved = Holder({"taught": taught, "again": taught, "frozen": [frozen], "plain": Tensor(np.ones(2, np.float32))})
    ce.save(tmp_path / "point", {"x": saved})
    fresh = Holder(
        {
            "nothing": {},
            "tensors": {"taught": Tensor(np.zeros(2, np.float32)), "frozen": [Tensor(np.zeros(2, np.float32))]},
            "parameters of other names": {
                "taught": parameter("one", 8, False),
                "frozen": [parameter("two", 9, True)],
                "plain": Parameter(Tensor(np.zeros(2, np.float32)), name="three"),
            },
        }[here]
    )
    ce.load(tmp_path / "point", into={"x": fresh})
    for one, other in ((taught, fresh.state["taught"]), (frozen, fresh.state["frozen"][0])):
        assert isinstance(other, Parameter)
        assert (other.name, other.requires_grad, other.dtype) == (one.name, one.requires_grad, dtype)
        assert as_array(other).tobytes() == as_array(one).tobytes()
    assert fresh.state["again"] is fresh.state["taught"]
    assert not isinstance(fresh.state["plain"], Parameter)
    assert fresh.state["plain"].asnumpy().tolist() == [1, 1]
