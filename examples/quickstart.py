"""The two lines of ckptengine, in one process.

Run `python examples/quickstart.py`, stop it at any time, and start it again.
"""

import torch
from torch import nn

import ckptengine as ce

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
state = {"model": model, "optimizer": optimizer}
total = 200

with ce.Checkpointer("runs/quickstart", every=20, keep_last=3) as ckpt:
    start = ckpt.restore(state)  # line 1: the newest checkpoint's step, or None
    print("fresh start" if start is None else f"resumed at step {start}")
    for step in range((start or 0) + 1, total + 1):
        x = torch.rand(256, 2, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(model(x), x.prod(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ckpt.step(step, state)  # line 2: saves when due, in the background
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.5f}")
