"""A small training: a network, an optimizer with its schedule, and a dataset in an order that depends on a seed."""

import ctypes
import hashlib

import mindspore as ms
import mindspore.dataset as ds
import ml_dtypes
import numpy as np
from mindspore import nn

import ckptengine.mindspore  # noqa: F401 - MindSpore's first operator must not come after init(): docs/mindspore.md

BATCHES, EPOCHS, FEATURES = 7, 6, 12


def dataset(seed=3, batches=BATCHES):
    ds.config.set_seed(seed)
    numbers = np.random.RandomState(0)
    columns = {
        "x": numbers.rand(8 * batches, FEATURES).astype(np.float32),
        "y": np.eye(4, dtype=np.float32)[numbers.randint(0, 4, 8 * batches)],
    }
    return ds.NumpySlicesDataset(columns, shuffle=True).batch(8)


def network(seed=1):
    ms.set_seed(seed)
    np.random.seed(seed)
    return nn.SequentialCell(nn.Dense(FEATURES, 16), nn.BatchNorm1d(16), nn.LayerNorm((16,)), nn.Dense(16, 4))


def optimizer(kind, net):
    steps = BATCHES * EPOCHS
    if kind == "Momentum":
        return nn.Momentum(net.trainable_params(), [0.1 * 0.97**step for step in range(steps)], 0.9)
    if kind == "Adam":
        return nn.Adam(net.trainable_params(), nn.CosineDecayLR(0.0, 0.01, steps))
    return nn.AdamWeightDecay(net.trainable_params(), nn.WarmUpLR(0.01, steps // 4), weight_decay=0.1)


def loss():
    return nn.SoftmaxCrossEntropyWithLogits(sparse=False, reduction="mean")


def train_cell(kind="Adam", seed=1):
    net = network(seed)
    cell = nn.TrainOneStepCell(nn.WithLossCell(net, loss()), optimizer(kind, net))
    cell.set_train()
    return net, cell


def batch(number):
    numbers = np.random.RandomState(number)
    y = np.eye(4, dtype=np.float32)[numbers.randint(0, 4, 8)]
    return ms.Tensor(numbers.rand(8, FEATURES).astype(np.float32)), ms.Tensor(y)


def contents(cell):
    """Return the bytes of all parameters by name."""
    return {parameter.name: as_array(parameter).tobytes() for parameter in cell.get_parameters()}


def digest(tensors):
    return hashlib.sha256(b"".join(as_array(tensor).tobytes() for tensor in tensors)).hexdigest()[:16]


def as_array(tensor):
    """Return a tensor as a numpy array; of a dtype that MindSpore doesn't hand to numpy, what lies in its memory."""
    name = str(tensor.dtype).lower()
    if not hasattr(ml_dtypes, name):
        return tensor.asnumpy()
    ms.runtime.synchronize()
    raw = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.size else b""
    return np.frombuffer(raw, getattr(ml_dtypes, name)).reshape(tensor.shape)
