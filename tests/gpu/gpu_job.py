"""Jobs that tests of this folder start: a training that is killed, FSDP2 on one device, a context that dies."""

import hashlib
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
import torch.distributed as dist
from pretended import FakeAccelerator

import ckptengine as ce
from ckptengine.errors import CheckpointError

NAME = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


if NAME == "cpu":
    FakeAccelerator(pytest.MonkeyPatch()).seconds = 0


def digest(model, optimizer):
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()


def train(folder, steps, kill, overlap):
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Dropout(), torch.nn.Linear(512, 256)).to(NAME)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = {"model": model, "optimizer": optimizer, "rng": ce.RNG()}
    with ce.Checkpointer(folder, every=2, overlap=overlap == "overlapped") as run:
        start = run.restore(state) or 0
        for step in range(start + 1, int(steps) + 1):
            model(torch.randn(64, 256, device=NAME)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if str(step) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            run.step(step, state)
    Path(folder, "digest").write_text(digest(model, optimizer))


def fsdp2(folder, backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = int(os.environ["WORLD_SIZE"])
    # On one device a process group of gloo's carries the device's tensors too, by way of the CPU.
    dist.init_process_group(
        backend, init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]), world_size=ranks
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(65, 129), torch.nn.Linear(129, 65)).to(NAME)
    mesh = init_device_mesh(NAME, (ranks,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = {"model": model, "optimizer": optimizer}

    def step():
        model(torch.randn(8, 65, device=NAME)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def local():
        tensors = [p.to_local() for p in model.parameters()]
        tensors += [optimizer.state[p]["exp_avg"].to_local() for p in model.parameters()]
        return [tensor.detach().cpu().clone() for tensor in tensors]

    step()
    with ce.Checkpointer(folder, overlap=True, timeout=60) as run:
        expected = local()
        handle = run.save(1, state)
        step()
        handle.durable.result()
        assert any(not torch.equal(now, then) for now, then in zip(local(), expected, strict=True))
        assert run.restore(state) == 1
        assert all(torch.equal(now, then) for now, then in zip(local(), expected, strict=True))
    dist.destroy_process_group()


def replicated(folder):
    """Two ranks with the same tensors on one device, which a restore reads once for both."""
    import numpy as np

    from ckptengine.load import devices

    devices.WINDOW_NBYTES = 1 << 20
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=2)
    torch.manual_seed(0)
    shapes = [(1000, 1500), (700, 90), (3,), (2000, 1100), ()]
    state = {f"w{n}": torch.randn(shape).to(NAME) for n, shape in enumerate(shapes)}
    state["here"] = np.arange(5000.0)
    state["own"] = ce.PerRank({"w": torch.full((600, 1000), float(rank), device=NAME)})
    expected = {name: tensor.cpu().clone() for name, tensor in state.items() if name.startswith("w")}
    with ce.Checkpointer(folder, timeout=60) as run:
        run.save(1, state).durable.result()
        for name in expected:
            state[name].zero_()
        state["own"].value["w"].zero_()
        state["here"][:] = 0
        assert run.restore(state) == 1
    assert all(torch.equal(state[name].cpu(), tensor) for name, tensor in expected.items())
    assert (state["own"].value["w"] == rank).all()
    assert state["here"].tolist() == list(range(5000))
    dist.destroy_process_group()


def second(folder):
    """Save from the second device, and restore to it; no context may be made on the first."""
    torch.accelerator.set_device_index(1)
    model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.BatchNorm1d(30)).to(NAME)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    with ce.Checkpointer(folder, overlap=True, every=10) as run:
        run.step(1, state)
        run.save(2, state).durable.result()
        optimizer.step()
        assert run.restore(state) == 2
    assert not torch._C._cuda_hasPrimaryContext(0)


def dead(folder):
    weight = torch.ones(1000, 1000, device=NAME)
    run = ce.Checkpointer(folder)
    run.save(1, {"weight": weight}).durable.result()
    torch.zeros(2, device=NAME)[torch.tensor([7], device=NAME)]  # an assertion on the device fails
    try:
        run.save(2, {"weight": weight}).durable.result()
    except CheckpointError as error:
        print(f"as it must be: {error}", flush=True)
        os._exit(0)  # nothing of CUDA works from here on, its own end included
    os._exit(1)


if __name__ == "__main__":
    {"train": train, "fsdp2": fsdp2, "replicated": replicated, "second": second, "dead": dead}[sys.argv[1]](
        *sys.argv[2:]
    )
