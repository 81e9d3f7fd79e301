"""Serialized tensors inside of files: where their elements lie."""

from __future__ import annotations

from collections.abc import Sequence

from ckptengine.errors import CheckpointDamagedError
from ckptengine.foreign.description import ForeignFile, Order
from ckptengine.foreign.names import NAMES, VALUES, TensorRef, storage_of
from ckptengine.foreign.torch_tree import stored_order
from ckptengine.foreign.torch_zip import READS, Part, open_torch_zip
from ckptengine.foreign.unpickle import unpickle
from ckptengine.schema.dtypes import DTYPES
from ckptengine.storage.base import StorageView
from ckptengine.storage.parallel import in_parallel

__all__ = ["Blobs", "Request"]

Request = tuple[int, int, int, str, str, tuple[int, ...]]
"""A serialized tensor: file, first byte, bytes, and the leaf's name, dtype and the shape that it must have."""


class Blobs:
    """Looks into tensors that `torch.save` wrote one by one, each a small ZIP of its own in a file."""

    def __init__(self, storage: StorageView, files: Sequence[ForeignFile]) -> None:
        self._storage, self._files = storage, files

    def find(self, requests: Sequence[Request]) -> list[tuple[int, Order | None]]:
        """Return for each where in its file its elements start, and their order (None: C order).

        Raises `CheckpointDamagedError` naming file and leaf where there is another tensor.
        """
        found: dict[int, tuple[int, Order | None]] = {}

        def look(number: int) -> None:
            found[number] = self._find(*requests[number])

        in_parallel(look, range(len(requests)), READS)
        return [found[number] for number in range(len(requests))]

    def _find(
        self, file: int, start: int, nbytes: int, name: str, dtype: str, shape: tuple[int, ...]
    ) -> tuple[int, Order | None]:
        path = self._files[file].name
        where = f"{self._storage.location(path)}, {name} at byte {start}"
        archive = open_torch_zip(Part(self._storage, path, start, nbytes), where)
        ref = unpickle(archive.pickle, NAMES, where, storage_of, VALUES)
        if not isinstance(ref, TensorRef):
            raise CheckpointDamagedError(f"{where}: a {type(ref).__name__} in the place of a tensor")
        if (ref.dtype, ref.size) != (dtype, shape):
            raise CheckpointDamagedError(
                f"{where}: {ref.dtype} of shape {ref.size}, the metadata says {dtype} of shape {shape}"
            )
        order = stored_order(ref.size, ref.stride)
        if order is None:
            raise CheckpointDamagedError(f"{where}: its strides {ref.stride} are none that DCP writes")
        key = ref.storage.key
        itemsize = DTYPES[dtype].itemsize
        last = ref.offset + sum((n - 1) * step for n, step in zip(ref.size, ref.stride, strict=True))
        if key not in archive.storages or (last + 1) * itemsize > archive.storages[key][1]:
            raise CheckpointDamagedError(f"{where}: its storage is missing or too short")
        position = start + archive.positions([key])[key] + ref.offset * itemsize
        return position, None if order == tuple(range(len(shape))) else order
