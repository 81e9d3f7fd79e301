"""A plain torch module and its optimizer, the same on every rank, under mpiexec: `torch_job.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from mpi4py import MPI

import ckptengine as ce


def main() -> None:
    folder, rank = Path(sys.argv[1]), MPI.COMM_WORLD.rank
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}

    def bits() -> list[bytes]:
        moments = [entry[key] for entry in optimizer.state.values() for key in sorted(entry)]
        return [tensor.detach().numpy().tobytes() for tensor in [*model.state_dict().values(), *moments]]

    with ce.Checkpointer(folder / "run", every=1, timeout=60) as checkpointer:
        for step in range(1, 4):
            model(torch.randn(8, 64, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpointer.step(step, state)
        checkpointer.wait()
        expected = bits()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(rank)
        optimizer.state.clear()
        restored = checkpointer.restore(state)
        assert bits() == expected
    report = {
        "restored": restored,
        "sum": model[0].weight.double().sum().item(),
        "distributed": torch.distributed.is_initialized(),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))


main()
