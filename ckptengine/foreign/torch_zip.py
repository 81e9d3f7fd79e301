"""The ZIP that `torch.save` writes, in a file or in a part of one: a pickle, and each storage as a stored entry.

Source: torch/serialization.py and caffe2/serialize/inline_container.cc. All entries lie below one folder: `data.pkl`,
`data/<key>` (the storages, never compressed), `byteorder`, `version`.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from ckptengine.errors import CheckpointDamagedError, ForeignFormatError
from ckptengine.storage.base import StorageView
from ckptengine.storage.parallel import in_parallel

__all__ = ["READS", "Part", "TorchZip", "open_torch_zip"]

READS = 16
"""Small reads in flight at most, where many places have to be looked at."""

_EDGE = 16 << 10
_MAX_PICKLE_NBYTES = 1 << 30
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Part(io.RawIOBase):
    """A range of a file, to be read: its first and its last bytes are read once and kept.

    What `zipfile` and a look for data want of a small ZIP lies there.
    """

    def __init__(self, storage: StorageView, name: str, start: int, nbytes: int) -> None:
        self._storage, self._name, self._start, self._nbytes = storage, name, start, nbytes
        self._at = 0
        self._kept: dict[int, bytes] = {}

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return self._nbytes

    def get(self, position: int, nbytes: int) -> bytes:
        """Return bytes, fewer only at the end."""
        stop = min(position + nbytes, self._nbytes)
        if position < 0 or stop <= position:
            return b""
        for begin in (0, max(0, self._nbytes - _EDGE)):
            if begin <= position and stop <= begin + _EDGE:
                if begin not in self._kept:
                    some = min(_EDGE, self._nbytes - begin)
                    self._kept[begin] = self._storage.read_range(self._name, self._start + begin, some)
                return self._kept[begin][position - begin : stop - begin]
        return self._storage.read_range(self._name, self._start + position, stop - position)

    def readinto(self, buffer: object) -> int:
        """Fill a buffer from where the last read ended."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self.get(self._at, len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; one before the beginning is an `OSError`, as for a file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True, slots=True)
class TorchZip:
    """The pickle, and the entries of the storages by key: where their headers start in the part, and their bytes."""

    part: Part
    where: str
    pickle: bytes
    storages: dict[str, tuple[int, int]]

    def positions(self, keys: Sequence[str]) -> dict[str, int]:
        """Return where the data of storages starts in the part; raises `CheckpointDamagedError` for a wrong header."""
        found: dict[str, int] = {}

        def look(key: str) -> None:
            header, nbytes = self.storages[key]
            data = self.part.get(header, _LOCAL_HEADER.size)
            magic, name, extra = _LOCAL_HEADER.unpack(data) if len(data) == _LOCAL_HEADER.size else (b"", 0, 0)
            position = header + _LOCAL_HEADER.size + name + extra
            if magic != b"PK\x03\x04" or position + nbytes > self.part.nbytes:
                raise CheckpointDamagedError(f"{self.where}: the storage {key} is not where the directory says")
            found[key] = position

        in_parallel(look, list(dict.fromkeys(keys)), READS)
        return found


def open_torch_zip(part: Part, where: str) -> TorchZip:
    """Return what a part of a file holds that `torch.save` wrote.

    Raises `CheckpointDamagedError` for what is no ZIP or is cut off, `ForeignFormatError` for a TorchScript archive, an
    older format, compressed or big-endian tensors.
    """
    start = part.get(0, 2)
    if start[:1] == b"\x80":
        raise ForeignFormatError(
            f"{where}: written by torch.save in the format of before torch 1.6 (or with "
            "_use_new_zipfile_serialization=False), which is a pickle and can't be read in parts. Convert it once: "
            "torch.save(torch.load(path, weights_only=True), new_path)"
        )
    try:
        with zipfile.ZipFile(io.BufferedReader(part, 8192)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            folder = next((name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl")), None)
            if folder is None:
                raise ForeignFormatError(f"{where}: a ZIP without data.pkl: torch.save did not write it")
            if f"{folder}constants.pkl" in names:
                raise ForeignFormatError(
                    f"{where}: a TorchScript program, not weights: save module.state_dict() with torch.save"
                )
            pickle = next(entry for entry in entries if entry.filename == f"{folder}data.pkl")
            if pickle.compress_type != zipfile.ZIP_STORED or pickle.file_size > _MAX_PICKLE_NBYTES:
                raise ForeignFormatError(
                    f"{where}: its pickle is compressed, or larger than {_MAX_PICKLE_NBYTES:,} bytes"
                )
            storages = {}
            for entry in entries:
                if not entry.filename.startswith(f"{folder}data/"):
                    continue
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise ForeignFormatError(
                        f"{where}: {entry.filename} is compressed, so that parts of it can't be read: unpack the ZIP "
                        "and pack it again without compression, or save it with torch.save"
                    )
                storages[entry.filename[len(folder) + 5 :]] = entry.header_offset, entry.file_size
            order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in names else b"little"
            if order != b"little":
                raise ForeignFormatError(f"{where}: written on a machine of the byte order {order!r:.20}")
            return TorchZip(part, where, archive.read(pickle), storages)
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, NotImplementedError, ValueError) as error:
        if isinstance(error, CheckpointDamagedError | ForeignFormatError):
            raise
        raise CheckpointDamagedError(
            f"{where}: no whole ZIP as torch.save writes it ({error}): the file is cut off, or something else"
        ) from None
