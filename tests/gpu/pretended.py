"""A pretended accelerator, for machines that have none: streams, events and copies that take their time, in threads.

The engine's own `Link` runs on it, with CPU tensors: what it asks torch for of streams, devices and pinned memory is
answered here, by the rules of CUDA that the engine relies on.
"""

import contextlib
import itertools
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import torch

from ckptengine.schema.leaf import DeviceMemory
from ckptengine.torch import accelerator
from ckptengine.torch import tensor as torch_tensor

_PLAIN = torch._C.DisableTorchFunctionSubclass


class OnDevice(torch.Tensor):
    """A CPU tensor as the device's: copies from it and to it, and clones, are given to the stream of the thread."""

    device_of = None  # the pretended accelerator

    def record_stream(self, stream):
        self.device_of.recorded.append(stream.queue)

    @classmethod
    def __torch_function__(cls, function, kinds, arguments=(), keywords=None):
        fake, name = cls.device_of, getattr(function, "__name__", "")
        with _PLAIN():
            if name == "copy_":
                (here,) = (one for one in arguments if isinstance(one, cls))
                target, source = (one.as_subclass(torch.Tensor) for one in arguments)
                fake.copy(target, source, fake.queue(fake.place(here)))
                return arguments[0]
            if name == "clone":
                fake.need(arguments[0].nbytes)
                new, index = torch.empty_like(arguments[0].as_subclass(torch.Tensor)), fake.place(arguments[0])
                fake.places[new.untyped_storage().data_ptr()] = index
                # What training computes is on the CPU, and there at once: so is a clone that follows only that.
                fake.queue(index).give(lambda: new.copy_(arguments[0].as_subclass(torch.Tensor)), at_once=True)
                return new.as_subclass(cls)
            return _again(function(*arguments, **(keywords or {})), cls)


def _aliases(own):
    return lambda tensors: [alias.as_subclass(OnDevice) for alias in own(tensors)]


def _again(result, kind):
    return result.as_subclass(kind) if isinstance(result, torch.Tensor) else result


class Queue:
    """What a stream is: work that is done in order. The streams of the engine wait for the test's `hold`."""

    def __init__(self, fake, beside):
        self.fake, self.beside, self.thread, self.given = fake, beside, ThreadPoolExecutor(1), 0

    def give(self, work, at_once=False):
        self.fake.check()

        def do():
            if self.beside:
                assert self.fake.hold.wait(30)
            if self.fake.failure is None:  # of a device that has failed nothing comes any more
                try:
                    work()
                except Exception as error:
                    self.fake.failure = error
            self.given -= 1

        self.given += 1
        if at_once and self.given == 1:
            do()
        else:
            self.thread.submit(do)


class Event:
    def __init__(self, fake):
        self.fake, self.flag = fake, threading.Event()

    def query(self):
        self.fake.check()
        self.fake.unsafe("cudaEventQuery")
        return self.flag.is_set()


class Stream:
    """`torch.Stream`, of which several objects may be one stream."""

    def __init__(self, fake, number, index, beside=False):
        self.stream_id, self.device_index, self.device_type = number, index, 0
        self.fake, self.queue = fake, fake.queues.setdefault((index, number), Queue(fake, beside))
        self._entered = []

    def record_event(self):
        event = Event(self.fake)
        self.queue.give(event.flag.set)
        return event

    def wait_event(self, event):
        self.queue.give(lambda: event.flag.wait(30))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        assert self.record_event().flag.wait(30)

    def __enter__(self):
        assert not self._entered, "up to torch 2.11 no other thread may be in this object's block"
        local = self.fake.local()
        self._entered.append((local.device, local.streams.get(self.device_index, 0)))
        self.fake.set_device(self.device_index)
        local.streams[self.device_index] = self.stream_id
        return self

    def __exit__(self, *_):
        device, self.fake.local().streams[self.device_index] = self._entered.pop()
        self.fake.set_device(device)


class FakeAccelerator:
    """Takes every tensor for its own. `index` is that of the device, and of the thread that made it."""

    def __init__(self, patch, index=0):
        self.hold, self.log = threading.Event(), []
        self.hold.set()
        self.seconds = 0.002  # of each copy
        self.index, self.failure, self.capturing, self.room = index, None, False, None
        self.captured = []  # the queues on which graphs are captured
        self.captured_elsewhere, self.spoilt = False, []  # another thread captures a graph; what has spoilt that
        self.dies_at = None  # the number of the copy in which the device fails, from now on
        self.pin_error, self.pinned, self.recorded, self.contexts = 0, [], [], {index}
        self.queues, self._numbers, self._locals = {}, itertools.count(1), threading.local()
        self.places = {}  # the device of some memory, by its address; else it is the first one's
        self.local().device = index
        OnDevice.device_of = self
        self.links = [accelerator.Link(torch.device("cpu", number)) for number in range(index + 2)]
        self.link = self.links[index]
        patch.setattr(torch_tensor, "_memory", self.memory)
        patch.setattr("ckptengine.torch.adapter.aliases", _aliases(torch_tensor.aliases))
        patch.setattr(accelerator, "torch", self._torch())
        patch.setattr(accelerator, "_runtime", lambda: self)
        self._memory = torch_tensor.__dict__["_copied"]

    def memory(self, piece, path, *, target):
        base = torch_tensor._without_repeats(piece)
        real = self._memory(piece, base, path)
        simple = base is piece and not piece.is_conj() and not piece.is_neg()
        owner, link = (piece.as_subclass(OnDevice), self.links[self.place(piece)]) if simple else (piece, None)
        return DeviceMemory(real.copy_to_host, real.copy_from_host, owner, link, simple)

    def local(self):
        """Return what a thread has of its own: it begins with the first device, and its default stream."""
        if not hasattr(self._locals, "device"):
            self._locals.device, self._locals.streams, self._locals.mode = 0, {}, 0
        return self._locals

    def place(self, tensor):
        """Return the number of the device on which a tensor lies."""
        return self.places.get(tensor.untyped_storage().data_ptr(), self.index)

    def current(self, index):
        """Return the stream that the thread works on, on a device."""
        return Stream(self, self.local().streams.get(index, 0), index)

    def queue(self, index):
        return self.current(index).queue

    @property
    def now(self):
        """The queue of the stream that the thread works on."""
        return self.queue(self.index)

    def set_device(self, index):
        """As cudaSetDevice: where it is another device, that has a context from then on."""
        if self.local().device != index:
            self.contexts.add(index)
        self.local().device = index

    def check(self):
        if self.failure is not None:
            raise self.failure

    def unsafe(self, call):
        """Spoil another thread's capture, as some calls do in the mode in which a thread begins."""
        if self.captured_elsewhere and self.local().mode != 2:
            self.spoilt.append(call)

    def cudaThreadExchangeStreamCaptureMode(self, mode):
        mode._obj.value, self.local().mode = self.local().mode, mode._obj.value

    def cudaGetLastError(self):
        return 0

    def need(self, nbytes):
        self.unsafe("cudaMalloc")
        if self.room is not None and nbytes > self.room:
            raise torch.OutOfMemoryError(f"tried to allocate {nbytes} bytes, {self.room} are free")

    def stream(self):
        """Return a new stream of the caller's."""
        return Stream(self, next(self._numbers), self.index)

    def copy(self, target, source, queue):
        """Give a copy to a stream; what is not contiguous needs memory there."""
        if not (target.is_contiguous() and source.is_contiguous()):
            self.need(source.nbytes)
        self.check()
        time.sleep(0)  # as torch's calls, it lets other threads run
        if self.dies_at is not None:
            self.dies_at -= 1
        fails = self.dies_at is not None and self.dies_at < 0
        target, source = target.numpy(), source.numpy()  # torch's own copies on the CPU need aligned memory
        target[...] = 0  # what is read too early is wrong

        def work():
            time.sleep(self.seconds)
            if fails:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            target[...] = source
            self.log.append("beside" if queue.beside else "in order")

        queue.give(work)

    def _torch(self):
        """Return the module as `ckptengine.torch.accelerator` sees it."""
        local = self.local

        def new_stream(device=None, **ids):
            if ids:
                return Stream(self, ids["stream_id"], ids["device_index"])
            return Stream(self, next(self._numbers), device.index, beside=True)

        @contextlib.contextmanager
        def device_index(index):
            if local().device != index:
                self.check()
            before, local().device = local().device, index
            yield
            local().device = before  # without a context, as cudaSetDevice is not called

        def register(address, nbytes, flags):
            self.unsafe("cudaHostRegister")
            if not self.pin_error:
                self.pinned.append((address, nbytes))
            return self.pin_error

        def unregister(address):
            self.unsafe("cudaHostUnregister")
            self.pinned[:] = [one for one in self.pinned if one[0] != address]
            return 0

        def capturing():
            return self.capturing or self.queue(local().device) in self.captured

        runtime = types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
        module = types.SimpleNamespace(is_current_stream_capturing=capturing, is_initialized=lambda: True)
        own = {
            "accelerator": _Over(
                torch.accelerator,
                current_stream=lambda device: self.current(device.index),
                current_accelerator=lambda: torch.device("cpu"),
                current_device_index=lambda: local().device,
                is_available=lambda: True,
                device_index=device_index,
            ),
            "cuda": _Over(torch.cuda, is_available=lambda: True, cudart=lambda: runtime),
            "get_device_module": lambda kind: module,
            "Stream": new_stream,
        }
        return _Over(torch, **own)


class _Over:
    """A module with some other attributes."""

    def __init__(self, module, **own):
        self.__dict__.update(own, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)
