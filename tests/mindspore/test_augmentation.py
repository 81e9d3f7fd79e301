"""What random augmentation gives after a restart in the middle of an epoch."""

import logging

import mindspore.dataset as ds
import mindspore.dataset.vision as vision
import numpy as np
import pytest

from ckptengine.mindspore import DataPosition

EPOCHS = 3


@pytest.fixture(autouse=True)
def _configuration_as_it_was():
    before = ds.config.get_fast_recovery(), ds.config.get_seed()
    yield
    ds.config.set_fast_recovery(before[0])
    ds.config.set_seed(before[1])


def pictures(*operations):
    ds.config.set_seed(3)
    data = np.arange(24 * 8 * 8 * 3).reshape(24, 8, 8, 3).astype(np.uint8)
    return ds.NumpySlicesDataset({"x": data}, shuffle=True).map(list(operations), ["x"]).batch(4)


def batches(dataset, epoch=0):
    iterator = dataset.create_tuple_iterator(num_epochs=EPOCHS, output_numpy=True)
    return [x.tobytes() for _ in range(epoch, EPOCHS) for (x,) in iterator]


@pytest.mark.parametrize("step", [2, 6, 9])
def test_mindspores_random_operations_go_on_exactly_after_a_restart(step):
    flips = [vision.RandomHorizontalFlip(), vision.RandomCrop(6)]
    whole = batches(pictures(*flips))
    assert len(set(whole)) == len(whole)
    dataset = pictures(*flips)
    position = DataPosition(dataset)
    position.load_state_dict({"step": step, "batches": 6, "seed": 3})
    assert batches(dataset, position.epoch) == whole[step:]


def test_python_functions_are_told_once(caplog):
    position = DataPosition(pictures(lambda x: x + np.random.randint(3, dtype=np.uint8)))
    with caplog.at_level(logging.WARNING, "ckptengine"):
        for _ in range(2):
            position.load_state_dict({"step": 2, "batches": 6, "seed": 3})
    assert caplog.text.count("maps Python functions") == 1
