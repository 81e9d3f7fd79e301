"""Names of Zarr nodes and ZIP entries, and the escaping between them and the keys of a state."""

from __future__ import annotations

import re

from ckptengine.errors import StateError
from ckptengine.schema.path import Key, Path, dotted

__all__ = [
    "OBJECTS",
    "archive_name",
    "checksums_node",
    "chunk_key",
    "escape",
    "leaf_node",
    "rank_node",
]

OBJECTS = "objects"
"""The group whose attributes hold the replicated plain values."""

# Zarr v3 forbids `/`, names of dots alone and the empty name, and reserves leading `__`; `%` escapes, and a
# leading `#` marks an integer key. Control characters and backslashes would not survive `unzip` everywhere.
_UNSAFE = re.compile(r"[%/\\\x00-\x1f\x7f]")
_METADATA = "zarr.json"  # what each node's own metadata is called: a node of that name could not lie beside it
_ONLY_DOTS = re.compile(r"\.+")
_LONGEST_NODE = 60_000  # a ZIP entry's name holds 65,535 bytes; chunk keys need some of them


def escape(key: Key) -> str:
    """Return the Zarr node name of one key; distinct keys give distinct names.

    `/`, `\\`, `%` and control characters become `%XX`; so do the first character of a name that consists of dots alone
    or is `zarr.json` in any case, a leading `#`, and the first of a leading `__`. The empty string is `%`, and the
    integer 7 is `#7`.
    """
    if isinstance(key, int):
        return f"#{key}"
    if not key:
        return "%"
    name = _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", key)
    if name.startswith(("#", "__")) or _ONLY_DOTS.fullmatch(name) or name.lower() == _METADATA:
        name = f"%{ord(name[0]):02X}{name[1:]}"
    return name


def leaf_node(path: Path, rank: int | None = None) -> str:
    """Return the Zarr node of a leaf: below `state`, or below its rank's group where it is per rank.

    Raises `StateError` where no ZIP entry can have such a name.
    """
    root = "state" if rank is None else rank_node(rank)
    node = "/".join((root, *map(escape, path)))
    try:
        nbytes = len(node.encode())
    except UnicodeEncodeError:
        raise StateError(
            f"{dotted(path)!r:.200}: a lone surrogate can't be part of an array's key; rename it"
        ) from None
    if nbytes > _LONGEST_NODE:
        raise StateError(f"{dotted(path):.100}…: the key has {nbytes} bytes, at most {_LONGEST_NODE} fit; shorten it")
    return node


def rank_node(rank: int) -> str:
    """Return the group of what belongs to one rank alone."""
    return f"ranks/{rank:05d}"


def checksums_node(archive: str) -> str:
    """Return the array that holds the block checksums of an archive, given its file name."""
    return f"checksums/{archive.removesuffix('.zarr.zip')}"


def chunk_key(node: str, cell: tuple[int, ...]) -> str:
    """Return the ZIP entry of one chunk (Zarr v3, default chunk key encoding)."""
    return "/".join((node, "c", *map(str, cell)))


def archive_name(rank: int) -> str:
    """Return the file name of a rank's archive."""
    return f"rank-{rank:05d}.zarr.zip"
