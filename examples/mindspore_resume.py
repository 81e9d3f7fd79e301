"""MindSpore training that goes on after a restart, in two ways: with changed imports, and with two more lines.

    python examples/mindspore_resume.py FOLDER --epochs 6 [--resume] [--graph]

The script trains on scikit-learn's handwritten digits. `--epochs` is the total, however often the script is started.

- Without `--resume` only the imports differ from a usual MindSpore script. The script loads the file whose name sorts
  last, reads from it how many epochs are done, and trains the rest.
- With `--resume`, `Resume` does all that. It also goes on within an epoch, in the same order of samples.
"""

import argparse
import os

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore import nn
from mindspore.train import LossMonitor, Model
from sklearn.datasets import load_digits

from ckptengine.mindspore import (
    CheckpointConfig,
    ModelCheckpoint,
    Resume,
    load_checkpoint,
    load_param_into_net,
)

BATCH = 128


def digits() -> ds.Dataset:
    """Return the 1,797 digits, 8×8, shuffled, in batches."""
    images, labels = load_digits(return_X_y=True)
    # Labels as vectors: MindSpore 2.10's datasets can't take single numbers where numpy 2 is installed.
    columns = {"image": (images / 16).astype(np.float32), "label": np.eye(10, dtype=np.float32)[labels]}
    return ds.NumpySlicesDataset(columns, shuffle=True).batch(BATCH, drop_remainder=True)


def model_of(dataset: ds.Dataset, epochs: int) -> tuple[Model, nn.Cell, nn.Cell]:
    """Return a model, its network and its optimizer, with a learning rate that falls over all epochs."""
    network = nn.SequentialCell(nn.Dense(64, 128), nn.ReLU(), nn.BatchNorm1d(128), nn.Dense(128, 10))
    rate = nn.CosineDecayLR(0.0, 0.1, dataset.get_dataset_size() * epochs)
    optimizer = nn.Momentum(network.trainable_params(), rate, 0.9)
    loss = nn.SoftmaxCrossEntropyWithLogits(sparse=False, reduction="mean")
    return Model(network, loss, optimizer, metrics={"accuracy"}), network, optimizer


def train(folder: str, epoch_size: int) -> Model:
    """Train as the service's script does."""
    dataset = digits()
    model, network, optimizer = model_of(dataset, epoch_size)
    done = 0
    files = sorted(name for name in os.listdir(folder) if name.endswith(".ckpt"))
    if files:
        parameters = load_checkpoint(os.path.join(folder, files[-1]))
        load_param_into_net(network, parameters)
        load_param_into_net(optimizer, parameters)
        done = int(parameters["epoch_num"].asnumpy())
        print(f"{files[-1]}: {done} epochs are done", flush=True)
    config = CheckpointConfig(
        save_checkpoint_steps=dataset.get_dataset_size(), keep_checkpoint_max=35, append_info=["epoch_num"]
    )
    checkpoint = ModelCheckpoint(prefix="digits", directory=folder, config=config)
    if epoch_size > done:
        model.train(epoch_size - done, dataset, callbacks=[checkpoint, LossMonitor()], dataset_sink_mode=False)
    return model


def train_with_resume(folder: str, epoch_size: int) -> Model:
    """Train with `Resume`: two lines, exact within an epoch."""
    dataset = digits()
    model, _, _ = model_of(dataset, epoch_size)
    resume = Resume(folder, model, dataset, every=5, keep_last=3)
    if resume.initial_epoch < epoch_size:
        callbacks = [resume, LossMonitor()]
        model.train(epoch_size, dataset, callbacks, dataset_sink_mode=False, initial_epoch=resume.initial_epoch)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--resume", action="store_true", help="with Resume")
    parser.add_argument("--graph", action="store_true", help="compile the network")
    given = parser.parse_args()
    os.makedirs(given.folder, exist_ok=True)
    ms.set_context(mode=ms.GRAPH_MODE if given.graph else ms.PYNATIVE_MODE)
    ms.set_seed(1)
    ds.config.set_seed(1)
    model = (train_with_resume if given.resume else train)(given.folder, given.epochs)
    accuracy = model.eval(digits(), dataset_sink_mode=False)["accuracy"]
    print(f"accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
