"""Chunks of an image that lie on devices: brought over beside the device's work, or at once."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.archive.image import Chunk, Image
from ckptengine.errors import DeviceError
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import DeviceMemory, Link, LinkError
from ckptengine.schema.path import Path, dotted

__all__ = ["DeviceChunk", "DeviceChunks"]

_KEPT_NBYTES = 64 << 20
"""Bytes that are not fenced (buffers) and are copied on the device first, so that the call need not wait for it."""
_IMAGES = 4
"""Addresses of images whose chunks' places are remembered: a private one, or those of the memory tier."""


@dataclass(frozen=True, slots=True)
class DeviceChunk:
    """A chunk whose bytes the CPU can't address: its box within a part of `shape` of the leaf `path`; `fenced` as in
    `ArrayLeaf`."""

    path: Path
    box: Box
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fenced: bool

    @property
    def nbytes(self) -> int:
        """The bytes of the box."""
        return self.box.volume * self.dtype.itemsize

    @property
    def slices(self) -> tuple[Any, ...]:
        """The box as an index; the dots are for that of a scalar, which would be no view without."""
        return (*(slice(o, o + n) for o, n in zip(self.box.offset, self.box.shape, strict=True)), ...)


@dataclass(frozen=True, slots=True)
class _Wait:
    """Copies of chunks that were begun: `call` waits for them, then `puts` bring some to where they go."""

    places: list[int]
    call: Callable[[float], None]
    puts: list[tuple[NDArray[Any], NDArray[Any]]]


_left: list[object] = []
"""Memory beside the image's to which devices that did not answer may still write, for as long as the process lives."""


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Places of chunks: `by_hand` have no link; `kept` are copied on the device, and then like what is fenced."""

    fenced: dict[Link, list[int]]
    kept: dict[Link, list[int]]
    at_once: dict[Link, list[int]]
    by_hand: list[int]


class DeviceChunks:
    """The chunks of an image that lie on devices, by their places in it.

    What owns their memory is kept from when it is told until `release`; all else outlives a save, so that the next one
    has nothing to find out for each chunk before its call returns.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self._chunks: dict[int, DeviceChunk] = {}
        self._links: dict[int, Link | None] = {}
        self._owners: dict[int, Any] = {}
        self._memories: dict[int, DeviceMemory] = {}  # of what has no link
        self._sorted: _Sorted | None = None
        self._targets: dict[int, dict[int, Any]] = {}  # of an address of the image, since several may take turns
        self._address = 0
        self._later: list[tuple[Link, list[int], object]] = []
        self._waits: list[_Wait] = []
        self._moments: dict[Link, object] = {}
        self._staged: dict[int, NDArray[Any]] = {}
        self._redirected: set[int] = set()

    def __contains__(self, place: int) -> bool:
        return place in self._chunks

    @property
    def has_fenced(self) -> bool:
        """Whether any may be copied until an optimizer's next step."""
        return bool(self._sort().fenced)

    def is_fenced(self, place: int) -> bool:
        """Whether a chunk, if it is one of these, is fenced."""
        return place in self._chunks and self._chunks[place].fenced

    def add(self, place: int, chunk: DeviceChunk, memory: DeviceMemory) -> None:
        """Take a chunk, or other memory for it."""
        self._chunks[place], self._links[place], self._sorted = chunk, memory.link, None
        self._owners[place] = memory.owner
        self._memories.pop(place, None)
        if memory.link is None:
            self._memories[place] = memory

    def hold(self, owners: Mapping[int, Any]) -> None:
        """Take what owns the memory of chunks now."""
        self._owners.update(owners)

    def mark(self) -> None:
        """Have what is copied next follow this moment, and not what is to come."""
        firsts = {link: place for place, link in self._links.items() if link is not None}
        for link, place in firsts.items():
            with self._naming([place]):
                self._moments[link] = link.mark()

    def begin(self, address: int, timeout: float) -> None:
        """Begin what can't wait, and wait for it, some seconds; mark the moment for `begin_fenced`."""
        self._address, found = address, self._sort()
        if address not in self._targets and len(self._targets) == _IMAGES:
            self._targets.clear()
        for place in found.by_hand:
            with self._naming([place]):
                self._bring(place, _dense(address, self._image.chunks[place], self._chunks[place]), timeout)
        later = {link: list(places) for link, places in found.fenced.items()}
        at_once = {link: list(places) for link, places in found.at_once.items()}
        for link, places in found.kept.items():
            for number, place in enumerate(places):
                with self._naming([place]):
                    kept = link.kept(self._part(place))
                if kept is None:
                    at_once.setdefault(link, []).extend(places[number:])
                    break
                self._owners[place] = kept
                later.setdefault(link, []).append(place)
        try:
            for link, places in at_once.items():
                self._begin(link, places, self._moments.get(link))
            for link, places in later.items():
                with self._naming(places):
                    self._later.append((link, places, link.mark()))
            self.wait(timeout)
        except BaseException:
            self._give_up(timeout)
            raise

    def begin_fenced(self, timeout: float) -> None:
        """Begin what `begin` has left, as it was then; where that fails, wait some seconds for what has begun."""
        later, self._later = self._later, []
        try:
            for link, places, moment in later:
                self._begin(link, places, moment)
        except BaseException:
            self._give_up(timeout)
            raise

    @property
    def under_way(self) -> bool:
        """Whether nobody has waited yet for copies that were begun."""
        return bool(self._waits)

    def wait(self, timeout: float) -> None:
        """Return when all that was begun is there, at most some seconds later: it comes into memory that is the next
        save's, too. Raises `DeviceError`."""
        end = time.monotonic() + timeout
        failure: DeviceError | None = None
        while self._waits:  # one that Ctrl-C ends is waited for again
            wait = self._waits[0]
            try:
                with self._naming(wait.places):
                    wait.call(max(0.0, end - time.monotonic()))
                    for dense, host in wait.puts:
                        np.copyto(dense, host)
            except DeviceError as error:
                if error.under_way:
                    _left.append(wait)
                if failure is None or (error.under_way and not failure.under_way):
                    failure = error
            del self._waits[0]
        if failure is not None:
            raise failure

    def stage(self, begin: int, end: int, timeout: float) -> Iterator[tuple[int, NDArray[Any]]]:
        """Bring over the chunks of a window, to memory of their own for as long as windows need it; yield that.

        Each has some seconds.
        """
        for place, chunk in self._chunks.items():
            where = self._image.chunks[place]
            if where.position >= end or where.position + where.nbytes <= begin:
                continue
            staged = self._staged.get(place)
            if staged is None:
                staged = self._staged[place] = np.empty(chunk.box.shape, chunk.dtype)
                try:
                    with self._naming([place]):
                        self._bring(place, staged, timeout)
                except BaseException as error:
                    if not isinstance(error, DeviceError) or error.under_way:  # Ctrl-C ends a wait, not the copy
                        _left.append(staged)
                    raise
            self._redirected.add(place)
            yield place, staged
        self._staged = {
            place: staged
            for place, staged in self._staged.items()
            if self._image.chunks[place].position + self._image.chunks[place].nbytes > begin
        }

    def take_redirected(self) -> set[int]:
        """Return the chunks that `stage` has yielded memory for, once."""
        redirected, self._redirected = self._redirected, set()
        return redirected

    def release(self) -> None:
        """Let go of all memory on devices, and of what waits for it."""
        self._owners.clear()
        self._memories.clear()
        self._staged.clear()
        self._later.clear()
        self._moments.clear()
        self._waits.clear()

    def _sort(self) -> _Sorted:
        """Return when and how the chunks are copied, found out once for as long as their links are the same."""
        if self._sorted is None:
            found = self._sorted = _Sorted({}, {}, {}, [])
            overlap = any(chunk.fenced and self._links[place] is not None for place, chunk in self._chunks.items())
            kept = 0
            for place, chunk in self._chunks.items():
                link = self._links[place]
                if link is None:
                    found.by_hand.append(place)
                elif chunk.fenced:
                    found.fenced.setdefault(link, []).append(place)
                elif overlap and kept + chunk.nbytes <= _KEPT_NBYTES:
                    kept += chunk.nbytes
                    found.kept.setdefault(link, []).append(place)
                else:
                    found.at_once.setdefault(link, []).append(place)
        return self._sorted

    def _part(self, place: int) -> Any:
        """Return the box of a chunk in its part; what was kept on the device is that alone."""
        chunk, owner = self._chunks[place], self._owners[place]
        return owner if tuple(owner.shape) == chunk.box.shape else owner[chunk.slices]

    def _begin(self, link: Link, places: list[int], moment: object | None) -> None:
        """Begin to copy chunks to their places."""
        targets = self._targets.setdefault(self._address, {})
        pairs: list[tuple[Any, Any]] = []
        puts: list[tuple[NDArray[Any], NDArray[Any]]] = []
        for place in places:
            target = targets.get(place)
            if target is None:
                dense = _dense(self._address, self._image.chunks[place], self._chunks[place])
                target = self._target(link, dense, puts)
                if dense.nbytes == self._image.chunks[place].nbytes:  # else its rest is to become zero each time
                    targets[place] = target
            pairs.append((self._part(place), target))
        with self._naming(places):
            self._waits.append(_Wait(places, link.to_host(pairs, moment), puts))

    @staticmethod
    def _target(link: Link, dense: NDArray[Any], puts: list[tuple[NDArray[Any], NDArray[Any]]]) -> Any:
        """Return where a link brings a chunk; what is to be copied after that, and to where, goes to `puts`."""
        if dense.flags.c_contiguous:
            return link.host(dense)
        # A device reaches a strided target through other memory of the host's, from where it is copied by hand.
        host = np.empty(dense.shape, dense.dtype)
        puts.append((dense, host))
        return link.host(host)

    def _bring(self, place: int, target: NDArray[Any], timeout: float) -> None:
        """Copy a chunk, now, to an array of its shape; a link has some seconds for it."""
        link, chunk = self._links[place], self._chunks[place]
        if link is not None:
            link.to_host([(self._part(place), link.host(target))], self._moments.get(link))(timeout)
            return
        memory = self._memories[place]
        if chunk.box.shape == chunk.shape:
            memory.copy_to_host(target)
            return
        whole = np.empty(chunk.shape, chunk.dtype)
        memory.copy_to_host(whole)
        target[...] = whole[chunk.slices]

    def _give_up(self, timeout: float) -> None:
        """Wait for what was begun: it comes into memory that is the next save's, or is given back.

        Raises `DeviceError` where it does not end.
        """
        self._later = []
        try:
            self.wait(timeout)
        except DeviceError as error:
            if error.under_way:
                raise
        except BaseException:  # Ctrl-C once more
            _left.extend(self._waits)
            raise

    @contextlib.contextmanager
    def _naming(self, places: list[int]) -> Iterator[None]:
        """Have an error of a device's copies of some chunks name the first of them, or that which could not begin."""
        try:
            yield
        except DeviceError:
            raise
        except Exception as error:
            reason = f"its device: {type(error).__name__}: {error}"
            linked = error if isinstance(error, LinkError) else LinkError(reason, 0)
            chunk = self._chunks[places[linked.number or 0]]
            more = f" and {len(places) - 1:,} more" if linked.number is None and len(places) > 1 else ""
            what = f"{dotted(chunk.path)} ({chunk.nbytes:,} bytes){more} could not be copied from {linked}"
            raise DeviceError(what, linked.under_way) from (error.__cause__ or error)


def _dense(address: int, chunk: Chunk, device: DeviceChunk) -> NDArray[Any]:
    """Return the corner of a chunk's place in memory that its box fills; the rest of the place becomes zero."""
    memory = (ctypes.c_uint8 * chunk.nbytes).from_address(address + chunk.position)
    dense: NDArray[Any] = np.frombuffer(memory, device.dtype).reshape(chunk.dense_shape)
    # As many indices as there are dimensions give a copy where there are none: the view of a scalar needs the dots.
    inside: Any = (*(slice(0, length) for length in device.box.shape), ...)
    corner: NDArray[Any] = dense[inside]
    if corner.size != dense.size:
        dense[...] = 0
    return corner
