"""MindSpore training on several MPI ranks, which average their gradients with mpi4py:

    mpiexec -n 4 --bind-to none python -m mpi4py examples/mindspore_mpi.py

Stop it at any time and start it again, on as many ranks as you like. It goes on from the newest checkpoint with the
next sample: no sample is used twice, and none is left out. On the same number of ranks, the training is the same to the
last bit.
"""

import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mpi4py import MPI  # so that ckptengine coordinates the ranks through MPI
from sklearn.datasets import load_digits

import ckptengine as ce
import ckptengine.mindspore  # so that cells and optimizers can be saved under numpy 2 as well (docs/mindspore.md)

GLOBAL_BATCH = 120


def main(run: str = "runs/digits-mpi", epochs: int = 10) -> None:
    world = MPI.COMM_WORLD
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), np.eye(10, dtype=np.float32)[labels]

    ms.set_seed(1)  # every rank begins with the same weights
    network = nn.SequentialCell(nn.Dense(64, 64), nn.ReLU(), nn.Dense(64, 10))
    optimizer = nn.Adam(network.trainable_params(), learning_rate=0.002)
    sampler = ce.ElasticSampler(len(images), GLOBAL_BATCH, seed=1)

    loss_of_each = nn.SoftmaxCrossEntropyWithLogits(sparse=False)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return loss_of_each(network(images), labels).sum()

    loss_and_gradients = ms.value_and_grad(loss_of, None, optimizer.parameters)
    state = {"network": network, "optimizer": optimizer, "data": sampler}
    with ce.Checkpointer(run, every=5, keep_last=3) as ckpt:
        start = ckpt.restore(state)
        if world.rank == 0:
            print("fresh start" if start is None else f"resumed at step {start}", f"on {world.size} ranks", flush=True)
        for epoch in range(sampler.epoch, epochs):
            for samples in sampler.batches():  # this rank's part of each global batch
                loss, gradients = loss_and_gradients(Tensor(images[samples]), Tensor(labels[samples]))
                # A sum over the global batch, divided by its size: ranks may have one sample more than others.
                loss, *gradients = sums(world, [loss, *gradients])
                optimizer(tuple(Tensor(gradient / sampler.size) for gradient in gradients))
                ckpt.step(sampler.global_batches, state)  # saves when due, in the background
            if world.rank == 0:
                print(f"epoch {epoch + 1}: loss {loss / sampler.size:.4f} in its last batch", flush=True)


def sums(world: MPI.Comm, tensors: list[Tensor]) -> list[np.ndarray]:
    """Return the sums over all ranks of tensors of float32, in one exchange."""
    arrays = [tensor.asnumpy() for tensor in tensors]
    flat = np.concatenate([array.ravel() for array in arrays])
    world.Allreduce(MPI.IN_PLACE, flat)
    parts = np.split(flat, np.cumsum([array.size for array in arrays])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
