"""When a training may go on, and what is said where it can't go on exactly."""

import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.train import Callback, Model

import ckptengine as ce
from ckptengine.errors import LoadMismatchError
from ckptengine.mindspore import DataPosition, Resume, training_state
from tests.mindspore import training
from tests.support.agreed import Agreed

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


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


class StopsAt(Callback):
    """Fails when so many steps of a training are done."""

    def __init__(self, step):
        self.step = step

    def on_train_step_end(self, run_context):
        if run_context.original_args().cur_step_num == self.step:
            raise KeyboardInterrupt


def trained_twice(folder, stops_at=None):
    """Train two epochs of three batches, evaluate, train a third; where it stops, it is begun again by another job."""
    model, dataset = a_job()
    resume = Resume(folder, model, dataset, every=1)
    if stops_at is not None:
        with pytest.raises(KeyboardInterrupt):
            model.train(2, dataset, [resume, StopsAt(stops_at)], dataset_sink_mode=False)
        model, dataset = a_job(seed=5)
        resume = Resume(folder, model, dataset, every=1)
        assert resume.start == stops_at
    metric = Model(model._network, training.loss(), metrics={"loss"})
    for epochs in (2, 3):
        assert metric.eval(dataset, dataset_sink_mode=False)["loss"] > 0  # of the whole dataset, wherever training is
        train(resume, model, dataset, epochs)
    assert (resume.step, resume.initial_epoch) == (9, 3)
    return training.contents(model.train_network)


def test_a_dataset_of_which_the_training_is_within_an_epoch_can_be_evaluated_and_trained_with_again(tmp_path):
    whole = trained_twice(tmp_path / "whole")
    for step in (3, 4):
        assert trained_twice(tmp_path / f"stopped-{step}", step) == whole


class Losses(Callback):
    """Notes the loss of each validation."""

    def __init__(self):
        self.seen = []

    def on_eval_end(self, run_context):
        self.seen.append(run_context.original_args().eval_results["eval_loss"])


def fitted(folder, valid, stops_at=None):
    """Train three epochs, each validated; where it stops, another job goes on. Return weights and validation losses."""
    seen = []
    for stop in (stops_at, None) if stops_at else (None,):
        net = training.network(1 if stop == stops_at else 5)
        model = Model(net, training.loss(), training.optimizer("Momentum", net), metrics={"loss"})
        dataset = training.dataset(batches=3)
        resume, losses = Resume(folder, model, dataset, every=1), Losses()
        callbacks = [resume, losses, *([StopsAt(stop)] if stop else [])]
        options = {"dataset_sink_mode": False, "initial_epoch": resume.initial_epoch}
        try:
            model.fit(3, dataset, valid(dataset), callbacks=callbacks, **options)
        except KeyboardInterrupt:
            assert resume.step == stops_at
        seen += losses.seen
    assert resume.step == 9
    return training.contents(model.train_network), seen


VALIDATED_WITH = {
    "the training's own dataset": lambda dataset: dataset,
    "another": lambda dataset: training.dataset(batches=2),
}


@pytest.mark.parametrize("valid", VALIDATED_WITH.values(), ids=VALIDATED_WITH)
def test_a_fit_that_is_validated_goes_on_exactly_from_any_step_of_an_epoch(tmp_path, caplog, valid):
    weights, losses = fitted(tmp_path / "whole", valid)
    assert len(losses) == 3
    for step in (3, 4, 5):
        again, seen = fitted(tmp_path / f"stopped-{step}", valid, step)
        assert again == weights, step
        # What stops after the last step of an epoch has not validated it.
        assert seen == losses[step == 3 :], step
    assert "did not begin" not in caplog.text


def test_a_signal_after_a_validation_still_saves_the_step(tmp_path):
    net = training.network()
    model = Model(net, training.loss(), training.optimizer("Momentum", net), metrics={"loss"})
    dataset = training.dataset(batches=3)
    resume = Resume(tmp_path, model, dataset)
    with pytest.raises(SystemExit) as end:
        model.fit(3, dataset, dataset, callbacks=[Told(5), resume], dataset_sink_mode=False)
    assert end.value.code == 75
    assert resume.step == 5
    assert ce.load(tmp_path)["data"]["step"] == 5


def test_an_evaluation_that_is_given_the_resume_begins_at_the_first_batch(tmp_path, caplog):
    model, dataset = a_job()
    resume = Resume(tmp_path, model, dataset)
    train(resume, model, dataset, 2)
    metric = Model(model._network, training.loss(), metrics={"loss"})
    assert metric.eval(dataset, [resume], dataset_sink_mode=False) == metric.eval(dataset, dataset_sink_mode=False)
    assert "did not begin" not in caplog.text


def test_a_training_that_counts_its_epochs_from_elsewhere_is_refused(tmp_path, caplog):
    model, dataset = a_job()
    resume = Resume(tmp_path, model, dataset)
    train(resume, model, dataset, 2)
    with pytest.raises(ValueError, match="begins with epoch 0 and 2 are trained: give it initial_epoch=resume.initial"):
        model.train(3, dataset, [resume], dataset_sink_mode=False)
    with pytest.raises(RuntimeError, match="Cannot reset the pipeline"):
        model.train(1, dataset, [resume], dataset_sink_mode=False)
    assert "the training did not begin. 2 epochs are trained" in caplog.text
    train(resume, model, dataset, 3)
    assert resume.step == 9


class Noise(nn.Cell):
    """Adds what numpy and Python draw, which no generator of MindSpore's knows of."""

    def construct(self, x):
        return x + Tensor(np.random.rand(*x.shape).astype(np.float32)) * random.random()


def trained_with_noise(folder, stops_at=None, **more):
    def job(seed):
        model, dataset = a_job(Noise())
        random.seed(seed)
        np.random.seed(seed)
        return model, dataset, Resume(folder, model, dataset, every=1, **more)

    model, dataset, resume = job(1)
    if stops_at is not None:
        with pytest.raises(KeyboardInterrupt):
            model.train(2, dataset, [resume, StopsAt(stops_at)], dataset_sink_mode=False)
        model, dataset, resume = job(99)
    train(resume, model, dataset, 2)
    return training.contents(model.train_network)


def test_random_streams_that_are_added_to_the_state_go_on_where_they_were(tmp_path):
    whole = trained_with_noise(tmp_path / "whole")
    assert trained_with_noise(tmp_path / "with", 4, state={"rng": ce.RNG()}) == whole
    assert trained_with_noise(tmp_path / "without", 4) != whole


JOB = """
import sys
sys.path.insert(0, "tests/mindspore")
from test_rules_of_resume import Resume, Told, a_job, train
model, dataset = a_job()
resume = Resume(sys.argv[1], model, dataset)
train(resume, model, dataset, 1)
if sys.argv[2] == "ended":
    Told(0).on_train_step_end(None)
model.train(9, dataset, [Told(2), resume], dataset_sink_mode=False, initial_epoch=1)
"""


class Told(Callback):
    """Sends SIGTERM to this process when so many steps of a training are done, and waits until that has heard it."""

    def __init__(self, step):
        self.step = step

    def on_train_step_end(self, run_context):
        if run_context is None or run_context.original_args().cur_step_num == self.step:
            agreed = Agreed()
            os.kill(os.getpid(), signal.SIGTERM)
            agreed.wait()


@pytest.mark.parametrize(("when", "code"), [("ended", -signal.SIGTERM), ("training", 75)])
def test_a_signal_acts_as_usual_after_a_training_and_saves_the_step_in_the_next_one(tmp_path, when, code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOG_v": "3"}
    command = [sys.executable, "-c", JOB, str(tmp_path / "run"), when]
    job = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert job.returncode == code, job.stderr[-3000:]
    ended, *saved = sorted(int(path.name[5:]) for path in (tmp_path / "run").glob("step-*"))
    assert ended == 3
    assert saved == [5] * (when == "training")


def test_another_dataset_or_seed_is_refused_and_what_can_be_taken_is_told(tmp_path):
    model, dataset = a_job()
    train(Resume(tmp_path, model, dataset), model, dataset, 1)
    with pytest.raises(LoadMismatchError, match=r"4 batches in an epoch, 3 when this was saved.*only=\['net', 'opti"):
        Resume(tmp_path, a_model(), training.dataset(batches=4))
    with pytest.raises(LoadMismatchError, match=r"seed 8, with 3 when this was saved.*set_seed\(3\)"):
        Resume(tmp_path, a_model(), training.dataset(seed=8, batches=3))
    with pytest.raises(ValueError, match="the names data are reserved"):
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
