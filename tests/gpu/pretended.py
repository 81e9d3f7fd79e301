"""A pretended accelerator, for machines that have none: its copies take their time, in threads, as streams would."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from ckptengine.schema.leaf import DeviceMemory
from ckptengine.torch import tensor as torch_tensor


class FakeAccelerator:
    """Takes every tensor of more than one element for its own; copies in threads, as streams would."""

    def __init__(self, patch):
        self.hold, self.log = threading.Event(), []
        self.hold.set()
        self.pinned = []
        self.streams = {beside: ThreadPoolExecutor(1) for beside in (False, True)}  # each in order
        patch.setattr(torch_tensor, "_memory", self.memory)
        patch.setattr("ckptengine.torch.accelerator.pin_host_memory", self.pin)
        self._memory = torch_tensor.__dict__["_copied"]

    def memory(self, piece, path, *, target):
        real = self._memory(piece, piece, path)
        return DeviceMemory(real.copy_to_host, real.copy_from_host, piece, lambda *a: self.begin(real, *a))

    def begin(self, real, dst, beside):
        done = threading.Event()
        dst[...] = 0  # what is read too early is wrong

        def copy():
            if beside:
                assert self.hold.wait(30)
            time.sleep(0.002)
            real.copy_to_host(dst)
            done.set()

        self.streams[beside].submit(copy)

        def wait():
            assert done.wait(30)
            self.log.append("beside" if beside else "in order")

        return wait

    def pin(self, address, nbytes):
        self.pinned.append(nbytes)
        return lambda: self.pinned.remove(nbytes)
