"""MindSpore's tensors, cells and optimizers in states: saved whole, filled in place."""

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn, ops

import ckptengine as ce
import ckptengine.mindspore
from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.mindspore import tensor as ms_tensor
from ckptengine.mindspore.tensor import as_tensor
from ckptengine.save.reading import StateReader
from tests.mindspore import training
from tests.mindspore.training import as_array

DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32"]
DTYPES += ["float64", "bfloat16", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]


def some(dtype, shape=(3, 5), seed=0):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = np.random.RandomState(seed).bytes(int(np.prod(shape)) * kind.itemsize)
    if dtype == "bool":
        raw = bytes(value & 1 for value in raw)
    return np.frombuffer(raw, kind).reshape(shape)


def fill(cell, seed):
    """Give a cell's parameters other values, of any bits that are numbers."""
    for number, parameter in enumerate(cell.get_parameters()):
        values = np.random.RandomState(seed + number).rand(*parameter.shape)
        parameter.set_data(Tensor(values.astype(np.float32)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit_in_place_and_as_numpy(dtype, tmp_path):
    shapes = {"matrix": (3, 5), "scalar": (), "empty": (0, 4), "large": (300, 1000)}
    state = {name: as_tensor(some(dtype, shape), dtype) for name, shape in shapes.items()}
    ce.save(tmp_path / "a", state)
    arrays = ce.load(tmp_path / "a")
    targets = {name: as_tensor(some(dtype, shape, seed=1), dtype) for name, shape in shapes.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in targets.items()}
    ce.load(tmp_path / "a", into=targets)
    for name, shape in shapes.items():
        expected = some(dtype, shape)
        assert arrays[name].dtype == expected.dtype
        assert arrays[name].tobytes() == expected.tobytes() == as_array(targets[name]).tobytes()
        assert targets[name].data_ptr() == addresses[name]
        assert targets[name].shape == shape
        assert targets[name].dtype == ms_tensor.mindspore_dtype(dtype)


def test_a_dtype_without_a_place_in_the_format_is_an_error_that_names_the_tensor():
    with pytest.raises(StateError, match=r"net\.w: .*HiFloat8|net\.w: .*hifloat8"):
        ms_tensor.view_tensor(Tensor(np.zeros((2, 2), np.float32), ms.hifloat8), ("net", "w"), target=False)


def test_a_cast_is_done_when_asked_for_and_refused_else(tmp_path):
    ce.save(tmp_path / "a", {"w": Tensor(np.array([1.0, 2.5, 1e30], np.float32))})
    target = {"w": as_tensor(np.zeros(3, ml_dtypes.bfloat16), "bfloat16")}
    with pytest.raises(LoadMismatchError, match="dtype bfloat16 here, float32 in the checkpoint"):
        ce.load(tmp_path / "a", into=target)
    ce.load(tmp_path / "a", into=target, cast=True)
    assert as_array(target["w"]).tolist() == np.array([1.0, 2.5, 1e30], np.float32).astype(ml_dtypes.bfloat16).tolist()


def test_views_of_other_tensors_are_saved_as_they_are_seen(tmp_path):
    whole = ops.add(Tensor(np.arange(24, dtype=np.float32).reshape(4, 6)), 0)
    views = {"whole": whole, "t": whole.T, "row": whole[1:], "column": whole[:, 2], "cut": mint.narrow(whole, 1, 2, 3)}
    assert not views["t"].is_contiguous()
    ce.save(tmp_path / "a", views)
    arrays = ce.load(tmp_path / "a")
    for name, view in views.items():
        assert arrays[name].tolist() == view.asnumpy().tolist()
    with pytest.raises(StateError, match="cut: the tensor is a strided view, so it can't be filled"):
        ce.load(tmp_path / "a", into={"cut": views["cut"]}, strict=False)


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_a_snapshot_has_what_operators_were_told_to_write_before_it(dtype, tmp_path):
    factor = Tensor(np.full((700, 700), 1e-3, np.float32))
    cell = nn.Dense(700, 700, has_bias=False).to(dtype)
    state = {"net": cell}
    for number in range(1, 4):
        product = factor
        for _ in range(8):  # the work that the write waits for
            product = ops.matmul(factor, product)
        cell.weight.copy_((product * 0 + number).astype(dtype))
        handle = ce.async_save(tmp_path / str(number), state)
        cell.weight.copy_((product * 0 - 1).astype(dtype))
        handle.durable.result()
    for number in range(1, 4):
        assert (ce.load(tmp_path / str(number))["net"]["weight"].astype(np.float32) == number).all()


def test_an_optimizers_state_lies_beside_the_weights_and_is_restored_without_a_step(tmp_path):
    net, cell = training.train_cell("Adam")
    for number in range(3):
        cell(*training.batch(number))
    ce.save(tmp_path / "a", {"net": net, "optimizer": cell.optimizer})
    saved = training.contents(cell)
    arrays = ce.load(tmp_path / "a")
    assert {"0.weight", "1.moving_mean", "2.gamma"} <= set(arrays["net"])
    assert {"global_step", "beta1_power", "moment1.0.weight"} <= set(arrays["optimizer"])
    assert not set(arrays["net"]) & set(arrays["optimizer"])
    for number in range(3, 6):
        cell(*training.batch(number))
    other_net, other = training.train_cell("Adam", seed=5)
    other(*training.batch(9))
    ce.load(tmp_path / "a", into={"net": other_net, "optimizer": other.optimizer})
    assert training.contents(other) == saved
    for number in range(3, 6):
        other(*training.batch(number))
    assert training.contents(other) == training.contents(cell)


@pytest.mark.parametrize("kind", [ms.experimental.optim.AdamW, mint.optim.SGD])  # those that the CPU has kernels for
def test_groups_of_hyperparameters_are_restored_and_the_trainings_agree(kind, tmp_path):
    def make(seed, lr):
        net = training.network(seed)
        groups = [{"params": net[0].trainable_params(), "lr": lr}, {"params": net[3].trainable_params()}]
        optimizer = kind(groups, lr=lr / 2, weight_decay=0.01)
        loss = training.loss()
        gradient = ms.value_and_grad(lambda x, y: loss(net(x), y), None, optimizer.parameters)
        return net, optimizer, lambda x, y: optimizer(gradient(x, y)[1])

    net, optimizer, step = make(0, 0.01)
    optimizer.param_groups[0]["weight_decay"] = 0.125
    for number in range(2):
        step(*training.batch(number))
    ce.save(tmp_path / "a", {"net": net, "optimizer": optimizer})
    other_net, other, other_step = make(1, 0.02)
    ce.load(tmp_path / "a", into={"net": other_net, "optimizer": other})
    assert [group["weight_decay"] for group in other.param_groups] == [0.125, 0.01]
    assert float(other.param_groups[0]["lr"]) == pytest.approx(0.01)
    for number in range(2, 4):
        step(*training.batch(number))
        other_step(*training.batch(number))
    assert training.contents(other_net) == training.contents(net)
    assert training.contents(other) == training.contents(optimizer)


def test_loss_scalers_are_restored(tmp_path):
    scaler, manager = ms.amp.DynamicLossScaler(1024, 2, 3), ms.train.DynamicLossScaleManager(512, 2, 3)
    scaler.adjust(Tensor(True))
    scaler.adjust(Tensor(True))
    manager.update_loss_scale(True)
    ce.save(tmp_path / "a", {"scaler": scaler, "manager": manager})
    new, new_manager = ms.amp.DynamicLossScaler(8, 2, 3), ms.train.DynamicLossScaleManager(8, 2, 3)
    ce.load(tmp_path / "a", into={"scaler": new, "manager": new_manager})
    assert int(new.counter) == int(scaler.counter) == 2
    assert float(new.scale_value) == 1024
    assert vars(new_manager) == vars(manager)


def test_a_later_save_compares_with_the_one_before_and_finds_what_moved(tmp_path):
    net, cell = training.train_cell()
    state, reader = {"net": net, "optimizer": cell.optimizer}, StateReader()
    reader.read(state)
    cell(*training.batch(0))
    assert reader.read(state).moved == {}
    net[0].weight.set_data(Tensor(np.full((16, 12), 7, np.float32)))
    moved = reader.read(state).moved
    names = [leaf.path for leaf in reader.read(state).leaves]
    assert moved == {} or [names[number] for number in moved] == [("net", "0.weight")]
    ce.save(tmp_path / "a", state)
    net[0].weight = Parameter(Tensor(np.full((16, 12), 8, np.float32)), name="0.weight")
    ce.save(tmp_path / "b", state)
    assert (ce.load(tmp_path / "a")["net"]["0.weight"] == 7).all()
    assert (ce.load(tmp_path / "b")["net"]["0.weight"] == 8).all()


def test_buffers_are_saved_and_two_parameters_of_one_name_are_refused(tmp_path):
    cell = nn.Cell()
    cell.register_buffer("mean", Tensor(np.arange(3, dtype=np.float32)))
    cell.register_buffer("scratch", Tensor(np.zeros(2, np.float32)), persistent=False)
    ce.save(tmp_path / "a", {"cell": cell})
    assert ce.load(tmp_path / "a")["cell"]["mean"].tolist() == [0, 1, 2]
    assert list(ce.load(tmp_path / "a")["cell"]) == ["mean"]
    weight = [Parameter(Tensor(np.zeros(2, np.float32)), name="w") for _ in range(2)]
    cell.first, cell.second = weight[0], nn.Cell()
    cell.second.inner = weight[1]
    cell.second.inner.name = cell.first.name
    with pytest.raises(StateError, match="two parameters are called"):
        ce.save(tmp_path / "b", {"cell": cell})


def test_memory_that_the_cpu_cannot_address_is_copied_by_mindspore(tmp_path, monkeypatch):
    """The device is pretended: there is none here."""
    monkeypatch.setattr(ms_tensor, "_on_cpu", lambda tensor: False)
    state = {name: as_tensor(some(name, seed=2), name) for name in ("float32", "int64")}
    ce.save(tmp_path / "a", state)
    targets = {name: as_tensor(some(name, seed=3), name) for name in state}
    ce.load(tmp_path / "a", into=targets)
    for name, tensor in targets.items():
        assert tensor.asnumpy().tobytes() == some(name, seed=2).tobytes()


def test_dtypes_are_plain_values(tmp_path):
    ce.save(tmp_path / "a", {"dtypes": [ms.bfloat16, ms.int8, ms.bool_]})
    assert ce.load(tmp_path / "a")["dtypes"] == [ms.bfloat16, ms.int8, ms.bool_]


def test_the_import_is_what_runs_the_operator_that_fails_once():
    assert ckptengine.mindspore.first_operator.run_first_operator() is None
    assert ops.reshape(Tensor([1, 2]), (2, 1)).shape == (2, 1)
