"""One life of a training job of three trainings: each is killed once in the middle of its fourth epoch.

    python resume_job.py FOLDER MODE

The first life trains all three without an interruption, to compare with. A training that is complete is passed over.
"""

import json
import os
import signal
import sys
from pathlib import Path

import mindspore as ms
from mindspore import nn
from mindspore.train import Callback, Model

import ckptengine as ce
from ckptengine.mindspore import DataPosition, Resume
from tests.mindspore import training
from tests.mindspore.training import BATCHES, EPOCHS

KILLED_AT = 3 * BATCHES + 4
KINDS = ("Momentum", "Adam", "AdamWeightDecay")


class Record(Callback):
    """Notes each step's samples; kills the process in the middle of the fourth epoch, once."""

    def __init__(self, log, count, killed):
        self.log, self.count, self.killed = log, count, killed

    def note(self, step, tensors):
        with open(self.log, "a") as file:
            file.write(json.dumps([step, training.digest(tensors)]) + "\n")
        if step == KILLED_AT and self.killed is not None and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_step_end(self, run_context):
        parameters = run_context.original_args()
        self.note(self.count(), parameters.train_dataset_element)


def with_model(kind, folder, killed):
    net = training.network()
    model = Model(net, training.loss(), training.optimizer(kind, net))
    dataset = training.dataset()
    resume = Resume(folder / "run", model, dataset, every=3, keep_last=2)
    record = Record(folder / "log", lambda: resume.step, killed)
    if resume.initial_epoch < EPOCHS:
        model.train(EPOCHS, dataset, [resume, record], dataset_sink_mode=False, initial_epoch=resume.initial_epoch)
    return model.train_network, resume.start


def in_a_loop(kind, folder, killed):
    net = training.network()
    optimizer, loss = training.optimizer(kind, net), training.loss()
    dataset = training.dataset()
    position = DataPosition(dataset)

    def forward(x, y):
        return loss(net(x), y)

    gradient = ms.value_and_grad(forward, None, optimizer.parameters)

    def step(x, y):
        value, gradients = gradient(x, y)
        optimizer(gradients)
        return value

    step = ms.jit(step) if ms.get_context("mode") == ms.GRAPH_MODE else step
    net.set_train()
    state = {"net": net, "optimizer": optimizer, "data": position}
    with ce.Checkpointer(folder / "run", every=3, keep_last=2) as checkpointer:
        start = checkpointer.restore(state)
        record = Record(folder / "log", None, killed)
        if position.epoch < EPOCHS:
            batches = dataset.create_tuple_iterator(num_epochs=EPOCHS)
            for _ in range(position.epoch, EPOCHS):
                for x, y in batches:
                    step(x, y)
                    position.step += 1
                    checkpointer.step(position.step, state)
                    record.note(position.step, (x, y))
        checkpointer.save(position.step, state)
    return nn.CellList([net, optimizer]), start


def main():
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    ms.set_context(mode=getattr(ms, f"{mode}_MODE"))
    for name, killed in (("whole", False), ("killed", True)):
        for kind in KINDS:
            place = folder / name / kind
            place.mkdir(parents=True, exist_ok=True)
            if (place / "end.json").exists():
                continue
            train = in_a_loop if kind == "Adam" else with_model
            cell, start = train(kind, place, place / "was-killed" if killed else None)
            end = {"start": start, "contents": {key: value.hex() for key, value in training.contents(cell).items()}}
            (place / "end.json").write_text(json.dumps(end))


if __name__ == "__main__":
    main()
