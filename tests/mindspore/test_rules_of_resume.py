"""When a training may go on, and what is said where it can't go on exactly."""

import logging

import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import nn
from mindspore.train import Model

import ckptengine as ce
from ckptengine.errors import LoadMismatchError
from ckptengine.mindspore import DataPosition, Resume, training_state
from tests.mindspore import training


def a_model(*more, seed=1):
    net = nn.SequentialCell(*training.network(seed), *more)
    return Model(net, training.loss(), training.optimizer("Momentum", net))


def a_job(*more, seed=1, batches=3):
    """Return a model, and then the dataset: its seed is the last that is set."""
    return a_model(*more, seed=seed), training.dataset(batches=batches)


def train(resume, model, dataset, epochs):
    model.train(epochs, dataset, [resume], dataset_sink_mode=False, initial_epoch=resume.initial_epoch)


def test_a_complete_training_is_known_as_such_and_a_longer_one_goes_on(tmp_path):
    model, dataset = a_job()
    average = nn.Dense(2, 2)
    resume = Resume(tmp_path, model, dataset, keep_last=1, state={"average": average})
    assert (resume.start, resume.initial_epoch) == (None, 0)
    train(resume, model, dataset, 2)
    assert (resume.step, resume.initial_epoch) == (6, 2)
    other_average = nn.Dense(2, 2)
    other, dataset = a_job(seed=4)
    again = Resume(tmp_path, other, dataset, state={"average": other_average})
    assert (again.start, again.initial_epoch) == (6, 2)
    assert training.contents(other.train_network) == training.contents(model.train_network)
    assert training.contents(other_average) == training.contents(average)
    train(again, other, dataset, 3)
    assert again.step == 9
    # The same object can train on.
    train(again, other, dataset, 4)
    assert again.step == 12
    assert set(ce.load(tmp_path)) == {"net", "optimizer", "data", "average"}


def test_a_training_that_ends_has_its_checkpoint_in_the_runs_place_and_begins_again_from_the_local_tier(tmp_path):
    model, dataset = a_job()
    places = {"run": tmp_path / "run", "local": tmp_path / "local"}
    resume = Resume(model=model, dataset=dataset, **places)
    train(resume, model, dataset, 2)
    assert ce.load(tmp_path / "run")["data"] == ce.load(tmp_path / "local")["data"]
    other, dataset = a_job(seed=4)
    again = Resume(model=other, dataset=dataset, **places)
    assert again.start == 6
    assert training.contents(other.train_network) == training.contents(model.train_network)


def test_another_dataset_or_seed_is_refused_and_what_can_be_taken_is_told(tmp_path):
    model, dataset = a_job()
    train(Resume(tmp_path, model, dataset), model, dataset, 1)
    with pytest.raises(LoadMismatchError, match=r"4 batches in an epoch, 3 when this was saved.*only=\['net', 'opti"):
        Resume(tmp_path, a_model(), training.dataset(batches=4))
    with pytest.raises(LoadMismatchError, match=r"seed 8, with 3 when this was saved.*set_seed\(3\)"):
        Resume(tmp_path, a_model(), training.dataset(seed=8, batches=3))
    with pytest.raises(ValueError, match="the names data are taken"):
        Resume(tmp_path / "b", a_model(), training.dataset(batches=3), state={"data": 1})
    fresh = a_model(seed=6)
    ce.load(tmp_path, into=training_state(fresh.train_network), only=["net", "optimizer"])
    assert training.contents(fresh.train_network) == training.contents(model.train_network)


def test_dropout_and_an_order_without_a_seed_are_warned_of_at_the_restart(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "ckptengine")
    model, dataset = a_job(nn.Dropout(p=0.5), batches=2)
    train(Resume(tmp_path / "a", model, dataset), model, dataset, 1)
    assert "Dropout" not in caplog.text
    assert "no seed" not in caplog.text
    Resume(tmp_path / "a", *a_job(nn.Dropout(p=0.5), batches=2))
    assert "Dropout: MindSpore 2.10.0 gives no access to the state of the random operators" in caplog.text
    caplog.clear()
    state = {"data": DataPosition(training.dataset(seed=5489, batches=2))}
    state["data"].step = 3
    ce.save(tmp_path / "b", state)
    position = DataPosition(training.dataset(seed=5489, batches=2))
    ce.load(tmp_path / "b", into={"data": position})
    assert (position.step, position.epoch, position.batches) == (3, 1, 2)
    assert "no seed is set for datasets" in caplog.text


def test_an_order_without_a_seed_is_never_repeated():
    """What the warning rests on: the number that stands for no seed is none."""
    numbers = {"x": np.arange(4096, dtype=np.int32).reshape(-1, 1)}
    orders = []
    for seed in (5489, 5489, 7, 7):
        ds.config.set_seed(seed)
        rows = ds.NumpySlicesDataset(numbers, shuffle=True).create_tuple_iterator(num_epochs=1, output_numpy=True)
        orders.append([int(row[0][0]) for row in rows])
    assert orders[0] != orders[1]
    assert orders[2] == orders[3]
