"""torch's random streams: the CPU's, those of the devices that the process uses, and any `torch.Generator`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ckptengine.frameworks.random_stream import RandomStream, expand
from ckptengine.state.rng import given_streams

__all__ = ["DeviceStream", "GeneratorStream", "process_streams", "unused_stream"]

# Of a CPU generator's state (`CPUGeneratorImplState` in ATen/CPUGeneratorImpl.cpp): its size, and where the 624 words
# of the Mersenne Twister lie, each in 8 bytes.
_CPU_NBYTES = 5056
_CPU_WORDS = slice(24, 24 + 624 * 8)


class GeneratorStream(RandomStream):
    """A `torch.Generator`."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self.kind = f"torch's Generator of {generator.device.type}"

    def get(self) -> NDArray[np.uint8]:
        """Return torch's own bytes."""
        return self._generator.get_state().numpy()

    def check(self, data: NDArray[np.uint8]) -> None:
        """Raise `ValueError` where torch does not take the bytes."""
        if data.size != self._generator.get_state().numel():
            raise ValueError(f"{data.size} bytes are no state of {self.kind}")
        if self._generator.device.type == "cpu":
            try:
                torch.Generator().set_state(_tensor(data))
            except RuntimeError as error:
                raise ValueError(f"the bytes are no state of {self.kind}: {error}") from error

    def set(self, data: NDArray[np.uint8]) -> None:
        """Set the bytes."""
        self._generator.set_state(_tensor(data))

    def seed(self, seed: bytes) -> None:
        """Fill all words of a CPU's generator, whose own seeds have 32 bits only; a device's takes one of 64 bits."""
        words = np.frombuffer(expand(seed, 8 + 624 * 4), "<u4")
        number = int(words[:2].view("<u8")[0])
        if self._generator.device.type != "cpu":
            self._generator.manual_seed(number)
            return
        fresh = torch.Generator().manual_seed(number).get_state().numpy()
        if fresh.size != _CPU_NBYTES:
            raise NotImplementedError(f"torch {torch.__version__} keeps its CPU's random state in an unknown form")
        state = words[2:].astype("<u8")
        state[0] |= 1 << 31  # a state of zeros would stay there
        fresh[_CPU_WORDS] = state.view(np.uint8)
        self._generator.set_state(_tensor(fresh))


def is_given(generator: torch.Generator) -> bool:
    """Whether a generator was given to a `ce.RNG`, or is the process's own."""
    if generator is torch.default_generator:
        return True
    return any(isinstance(stream, GeneratorStream) and stream._generator is generator for stream in given_streams())


class DeviceStream(RandomStream):
    """The default stream of a device, of the current one where `index` is None."""

    def __init__(self, device: str, index: int | None = None) -> None:
        self.kind = f"torch's Generator of {device}"
        self._module: Any = torch.get_device_module(device)
        self._index = index

    def get(self) -> NDArray[np.uint8]:
        """Return torch's own bytes."""
        return _device_state(self._module, self._index)

    def check(self, data: NDArray[np.uint8]) -> None:
        """Raise `ValueError` where the length is wrong; that of a device that isn't used yet is unknown."""
        expected = self.get().size if _in_use(self._module) else data.size
        if data.size != expected or not data.size:
            raise ValueError(f"{data.size} bytes are no state of {self.kind}, which has {expected}")

    def set(self, data: NDArray[np.uint8]) -> None:
        """Set the bytes; before the process uses the device, torch keeps them until it does."""
        if self._index is None:
            self._module.set_rng_state(_tensor(data))
        else:
            self._module.set_rng_state(_tensor(data), self._index)

    def seed(self, seed: bytes) -> None:
        """Seed with 64 bits; before the process uses the device, torch keeps them until it does."""
        number = int.from_bytes(expand(seed, 8), "little")
        if self._index is None:
            self._module.manual_seed(number)
        else:
            with torch.accelerator.device_index(self._index):
                self._module.manual_seed(number)


def process_streams() -> dict[str, RandomStream]:
    """Return the streams that the process has: `cpu`, `cuda` for its current device, `cuda:3` for further ones.

    Only devices that the process uses: no context is made on any other.
    """
    streams: dict[str, RandomStream] = {"cpu": GeneratorStream(torch.default_generator)}
    device = torch.accelerator.current_accelerator()
    if device is None:
        return streams
    module: Any = torch.get_device_module(device.type)
    if _in_use(module):
        streams[device.type] = DeviceStream(device.type)
        for index in _further(module, torch.accelerator.current_device_index()):
            streams[f"{device.type}:{index}"] = DeviceStream(device.type, index)
    return streams


def unused_stream(name: str) -> RandomStream | None:
    """Return the stream `cuda` where there is such a device that the process does not use yet, else None."""
    device = torch.accelerator.current_accelerator()
    if re.fullmatch(r"[a-z]+", name) is None or device is None or device.type != name:
        return None
    return DeviceStream(name) if torch.accelerator.is_available() else None


def _in_use(module: Any) -> bool:
    known = getattr(module, "is_initialized", None)
    return bool(known() if known is not None else torch.accelerator.is_available())


def _device_state(module: Any, index: int | None) -> NDArray[np.uint8]:
    state: torch.Tensor = module.get_rng_state() if index is None else module.get_rng_state(index)
    return state.cpu().numpy()


_used: set[int] = set()
_untouched: dict[int, bytes] = {}  # the random states of devices when they were last found to be unused


def _further(module: Any, current: int) -> list[int]:
    """Return the devices that are used beside the current one: those on which memory was ever allocated.

    Asking that takes long. Random numbers change the device's state, so it is asked only where that has changed.
    """
    reserved = getattr(module, "max_memory_reserved", None)
    for index in range(torch.accelerator.device_count()):
        if reserved is None or index == current or index in _used:
            continue
        state = _device_state(module, index).tobytes()
        if _untouched.get(index) != state:
            _untouched[index] = state
            if reserved(index) > 0:
                _used.add(index)
    return sorted(_used - {current})


def _tensor(data: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.array(data, np.uint8))
