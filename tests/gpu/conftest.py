"""Where the tests of this folder run: on the machine's accelerator, or on a pretended one."""

import contextlib
import threading
import time
import types
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
        threading.Timer(0.1, self.pretended.hold.set).start()

    def compute(self, call):
        """Have the device compute something, in the stream that the caller works on, when that has come to it."""
        if self.real:
            call()
        else:
            self.pretended.now.give(lambda: (time.sleep(0.02), call()))

    def stream(self):
        """Return a stream of the caller's own, which follows the one that it works on now."""
        if self.real:
            stream = torch.Stream(torch.device(self.name))
            stream.wait_stream(torch.accelerator.current_stream())
        else:
            stream = self.pretended.stream()
        return stream

    def follow(self, stream):
        """Have the stream that the caller works on wait for another one."""
        now = torch.accelerator.current_stream() if self.real else self.pretended.current(0)
        now.wait_stream(stream)

    def refuse_pinning(self, patch):
        """Have cudaHostRegister fail."""
        if not self.real:
            self.pretended.pin_error = 2
            return
        self.need_cuda("cudaHostRegister")
        runtime = types.SimpleNamespace(cudaHostRegister=lambda *_: 2)
        patch.setattr(torch.cuda, "cudart", lambda: runtime)

    @contextlib.contextmanager
    def capture(self):
        """Have a graph be captured meanwhile, on the stream that the caller works on."""
        if self.real:
            self.need_cuda("a CUDA graph")
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                yield
            return
        self.pretended.capturing = True
        yield
        self.pretended.capturing = False

    @contextlib.contextmanager
    def without_memory(self, bytes_free):
        """Have the device refuse what takes more than some bytes of memory."""
        if not self.real:
            self.pretended.room = bytes_free
            yield
            self.pretended.room = None
            return
        self.need_cuda("a limit to the device's memory")
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + bytes_free) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def device(monkeypatch):
    if torch.accelerator.is_available():
        return Device(torch.accelerator.current_accelerator().type, True, None)
    return Device("cpu", False, FakeAccelerator(monkeypatch))
