"""Directories of PyTorch's distributed checkpoint: a file of serialized tensors and values, and a pickled `.metadata`.

Source: torch/distributed/checkpoint/filesystem.py (`_write_item`), metadata.py, _nested_dict.py and _traverse.py (how a
nested state is flattened) of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptengine.errors import ForeignFormatError
from ckptengine.export.contents import Contents, Item
from ckptengine.export.optimizers import within_modules
from ckptengine.export.pickles import Call, Global, Record, Storage, pickled
from ckptengine.export.stream import FilePlan, Segment
from ckptengine.export.torch_file import torch_segments
from ckptengine.schema.path import Path, dotted

__all__ = ["plan_dcp"]

_FILE = "__0_0.distcp"
_METADATA = "torch.distributed.checkpoint.metadata"


def plan_dcp(contents: Contents) -> tuple[FilePlan, tuple[str, bytes]]:
    """Return the plan of the file of tensors, and name and bytes of the metadata, which are written last.

    Raises `ForeignFormatError` naming what it can't hold.
    """
    nested = within_modules(contents.nested(lambda item: item), contents)
    segments: list[Segment] = []
    entries: dict[str, Record] = {}
    places: dict[Record, Record] = {}
    paths: dict[str, Path] = {}
    position = 0
    for path, value in _flat(nested, ()):
        name = dotted(path)
        if name in entries:
            raise ForeignFormatError(f"{name}: two leaves have that name, which DCP can't tell apart; use `rename`")
        if isinstance(value, Item):
            data = pickled(Storage("0", value.dtype, value.shape))
            blob = torch_segments(data, [("0", value)], len(segments))
            offset = (0,) * len(value.shape)
            entries[name] = _tensor(value)
            index = {"fqn": name, "offset": _size(offset), "index": 0}
        else:
            blob = torch_segments(pickled(value), [], len(segments))
            entries[name] = Record(Global(_METADATA, "BytesStorageMetadata"), {})
            index = {"fqn": name, "offset": None, "index": None}
        nbytes = sum(len(one) if isinstance(one, bytes) else one.nbytes for one in blob)
        info = {"relative_path": _FILE, "offset": position, "length": nbytes}
        places[Record(Global(_METADATA, "MetadataIndex"), index)] = Record(
            Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), info
        )
        paths[name] = path
        segments += blob
        position += nbytes
    state = {
        "state_dict_metadata": entries,
        "planner_data": paths,
        "storage_data": places,
        "storage_meta": None,
        "version": None,
    }
    metadata = pickled(Record(Global(_METADATA, "Metadata"), state))
    return FilePlan(_FILE, tuple(segments), sums=True), (".metadata", metadata)


def _size(lengths: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (lengths,))


def _tensor(item: Item) -> Record:
    chunk = {"offsets": _size((0,) * len(item.shape)), "sizes": _size(item.shape)}
    properties = (
        Global("torch", item.dtype),
        Call(Global("torch.serialization", "_get_layout"), ("torch.strided",)),
        False,
        Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,)),
        False,
    )
    return Record(
        Global(_METADATA, "TensorStorageMetadata"),
        {
            "properties": Record(Global(_METADATA, "TensorProperties"), properties),
            "size": _size(item.shape),
            "chunks": [Record(Global(_METADATA, "ChunkStorageMetadata"), chunk)],
        },
    )


def _flat(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield what DCP takes for leaves: all but dicts, and lists that hold dicts or tensors; keys of dicts are text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, (*path, str(key)))
    elif isinstance(value, list) and path and any(_divides(item) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, (*path, number))
    else:
        yield path, value


def _divides(item: Any) -> bool:
    if isinstance(item, Mapping | Item):
        return True
    return isinstance(item, list) and any(_divides(inner) for inner in item)
