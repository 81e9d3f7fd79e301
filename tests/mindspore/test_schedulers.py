"""MindSpore's schedulers in a state: the learning rates and losses after a restart are those without one."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.experimental import optim
from mindspore.experimental.optim import lr_scheduler

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, StateError
from tests.mindspore import training

pytestmark = pytest.mark.long

STEPS, SAVED_AT = 9, 4


class Decay:
    """A function with a state of its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, epoch):
        self.calls += 1
        return 0.9**self.calls


def a_sequence(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.8)]
    return lr_scheduler.SequentialLR(optimizer, parts, [3])


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=7),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 1.5),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 6),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 6], 0.1),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, Decay()),
    "SequentialLR": a_sequence,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1, threshold=0.3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, mode="triangular2"),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2, 0.001),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
}


class Job:
    """A network with two groups of parameters, trained one step at a time."""

    def __init__(self, kind, seed=1, rate=0.05):
        self.net = training.network(seed)
        weights = self.net.trainable_params()
        self.optimizer = optim.Adam([{"params": weights[:2]}, {"params": weights[2:], "lr": rate / 4}], rate)
        self.scheduler = SCHEDULERS[kind](self.optimizer)
        self.net.set_train()
        self.gradient = ms.value_and_grad(lambda x, y: training.loss()(self.net(x), y), None, self.optimizer.parameters)

    @property
    def state(self):
        return {"net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def train(self, steps):
        """Return each step's loss and learning rates."""
        course = []
        for step in steps:
            loss, gradients = self.gradient(*training.batch(step))
            self.optimizer(gradients)
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss)
            else:
                self.scheduler.step()
            rates = [float(group["lr"].asnumpy()) for group in self.optimizer.param_groups]
            assert rates == [float(rate.asnumpy()) for rate in self.scheduler.get_last_lr()]
            course.append((float(loss.asnumpy()), *rates))
        return course


def test_every_scheduler_is_here():
    assert {name.partition(" ")[0] for name in SCHEDULERS} == set(lr_scheduler.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_learning_rates_and_losses_after_a_restart_are_those_without_one(kind, tmp_path):
    whole = Job(kind).train(range(STEPS))
    assert len({rates for _, *rates in map(tuple, whole) for rates in rates}) > 1
    first = Job(kind)
    assert first.train(range(SAVED_AT)) == whole[:SAVED_AT]
    ce.save(tmp_path, first.state)
    second = Job(kind, seed=5, rate=0.5)
    report = ce.load(tmp_path, into=second.state)
    assert [*report.missing, *report.unexpected, *report.mismatched] == []
    assert second.train(range(SAVED_AT, STEPS)) == whole[SAVED_AT:]


def test_each_save_of_a_run_has_the_schedulers_numbers_of_its_step(tmp_path):
    job = Job("SequentialLR")
    with ce.Checkpointer(tmp_path, every=1) as checkpointer:
        for step in range(1, 6):
            job.train([step])
            checkpointer.step(step, job.state)
    numbers = [ce.load(tmp_path, step=step)["scheduler"] for step in range(1, 6)]
    assert [float(one["last_epoch"]) for one in numbers] == [1, 2, 3, 4, 5]
    assert [float(one["_schedulers.1.last_epoch"]) for one in numbers][-2:] == [1, 2]


def test_another_scheduler_is_a_mismatch(tmp_path):
    ce.save(tmp_path, Job("StepLR").state)
    with pytest.raises(LoadMismatchError, match="scheduler"):
        ce.load(tmp_path, into=Job("SequentialLR").state)


def test_an_attribute_that_cannot_be_saved_is_named(tmp_path):
    job = Job("StepLR")
    job.scheduler.log = np.random.default_rng
    job.scheduler.record = object()
    with pytest.raises(StateError, match=r"scheduler\.record"):
        ce.save(tmp_path, job.state)


def test_a_scheduler_that_has_a_network_says_so(tmp_path):
    job = Job("StepLR")
    job.scheduler.watched = nn.Dense(2, 2)
    with pytest.raises(StateError, match="attribute 'watched' is a mindspore.nn.layer.basic.Dense with parameters"):
        ce.save(tmp_path, job.state)
