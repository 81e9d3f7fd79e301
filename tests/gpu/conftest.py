"""Where the tests of this folder run: on the machine's accelerator, or on a pretended one."""

import threading
from dataclasses import dataclass, field

import pytest
import torch
from pretended import FakeAccelerator

from ckptengine.torch import accelerator


@dataclass
class Device:
    """Where tensors lie. `real` is whether there is such a device; `pretended` is what plays it where there is none."""

    name: str
    real: bool
    pretended: FakeAccelerator | None
    pinned: list[int] = field(default_factory=list)  # the addresses of a real device's pinned memory, once watched

    def need(self, what):
        """Skip a test, by name, that only a real device can show."""
        if not self.real:
            pytest.skip(f"no accelerator is here, and {what} can't be pretended")

    def need_cuda(self, what):
        self.need(what)
        if self.name != "cuda":
            pytest.skip(f"{what} is CUDA's; the accelerator here is {self.name}")

    def watch_pinning(self, patch):
        pin = accelerator.pin_host_memory

        def watched(address, nbytes):
            unpin = pin(address, nbytes)
            if unpin is None:
                return None
            self.pinned.append(address)

            def undo():
                self.pinned.remove(address)
                unpin()

            return undo

        patch.setattr(accelerator, "pin_host_memory", watched)

    def synchronize(self):
        if self.real:
            torch.accelerator.synchronize()

    def slow_down(self):
        """Keep the device busy, so that what was given to it is still to be done when the call goes on."""
        if self.real:
            side = torch.randn(4096, 4096, device=self.name)
            for _ in range(40):
                side = side @ side * 1e-3
            return
        self.pretended.hold.clear()
        threading.Timer(0.2, self.pretended.hold.set).start()


@pytest.fixture
def device(monkeypatch):
    if torch.accelerator.is_available():
        return Device(torch.accelerator.current_accelerator().type, True, None)
    return Device("cpu", False, FakeAccelerator(monkeypatch))
