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
        self.seconds = 0.002  # of each copy
        self.pinned = []
        self.streams = {beside: ThreadPoolExecutor(1) for beside in (False, True)}  # each in order
        patch.setattr(torch_tensor, "_memory", self.memory)
        patch.setattr("ckptengine.torch.accelerator.pin_host_memory", self.pin)
        self._memory = torch_tensor.__dict__["_copied"]

    def memory(self, piece, path, *, target):
        base = torch_tensor._without_repeats(piece)
        real = self._memory(piece, base, path)
        simple = base is piece and not piece.is_conj() and not piece.is_neg()
        return DeviceMemory(real.copy_to_host, real.copy_from_host, piece, self if simple else None, simple)

    def mark(self):
        return object()

    def host(self, array):
        return array

    def kept(self, owner):
        return owner.clone()

    def turned(self, owner, order):
        return owner.permute(order)

    def to_host(self, pairs, after):
        for _, target in pairs:
            target[...] = 0  # what is read too early is wrong

        def copy(owner, target):
            self._memory(owner, owner, ()).copy_to_host(target)

        return self.begin(copy, pairs, after is not None)

    def to_device(self, pairs, after):
        def copy(owner, source):
            self._memory(owner, owner, ()).copy_from_host(source)

        return self.begin(copy, pairs, True)

    def begin(self, copy, pairs, beside):
        """Have a stream do what it is given, in order; return what waits for it."""
        done, errors = threading.Event(), []

        def work():
            try:
                if beside:
                    assert self.hold.wait(30)
                for pair in pairs:
                    time.sleep(self.seconds)
                    copy(*pair)
            except Exception as error:
                errors.append(error)
            done.set()

        self.streams[beside].submit(work)

        def wait():
            assert done.wait(30)
            self.log.append("beside" if beside else "in order")
            if errors:
                raise errors[0]

        return wait

    def pin(self, address, nbytes):
        self.pinned.append(nbytes)
        return lambda: self.pinned.remove(nbytes)
