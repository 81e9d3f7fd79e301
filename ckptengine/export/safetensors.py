"""safetensors files, byte for byte as the safetensors package writes them, in shards with Hugging Face's index.

Sources: the serializer of safetensors 0.8 (safetensors/src/tensor.rs: tensors by falling dtype, then by name; the
header padded with spaces to 8 bytes) and huggingface_hub/serialization (how tensors are spread over shards).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ckptengine.errors import ForeignFormatError
from ckptengine.export.contents import Contents, Item
from ckptengine.export.stream import FilePlan
from ckptengine.foreign.safetensors import DTYPE_NAMES, MAX_HEADER_NBYTES

__all__ = ["INDEX", "index_of", "plan_safetensors", "shards_of"]

INDEX = "model.safetensors.index.json"
_NAMES = {logical: name for name, logical in DTYPE_NAMES.items()} | {"float4_e2m1fn_x2": "F4"}
# The order of the enum `Dtype`, of which the greatest comes first.
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F4", "BOOL",
)  # fmt: skip


def plan_safetensors(name: str, items: Sequence[Item]) -> FilePlan:
    """Return the plan of one file; raises `ForeignFormatError` naming an array whose dtype the format lacks."""
    for item in items:
        if item.dtype not in _NAMES:
            raise ForeignFormatError(f"{item.name}: safetensors has no {item.dtype}; leave it out with `only`")
    ordered = sorted(items, key=lambda item: (_ORDER.index(_NAMES[item.dtype]), item.name.encode()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in ordered:
        if item.name in header:
            raise ForeignFormatError(f"{item.name}: safetensors can't have that name, or has it already")
        shape = list(item.shape)
        if item.dtype == "float4_e2m1fn_x2" and shape:
            shape[-1] *= 2
        header[item.name] = {"dtype": _NAMES[item.dtype], "shape": shape, "data_offsets": [at, at + item.nbytes]}
        at += item.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise ForeignFormatError(f"{name}: the header of {len(items):,} arrays is larger than the format allows")
    return FilePlan(name, (len(text).to_bytes(8, "little") + text, *ordered))


def shards_of(contents: Contents, max_nbytes: int, stem: str = "model") -> list[FilePlan]:
    """Return the plans of the files that arrays are spread over, each of at most so many bytes of arrays.

    An array that is larger alone has a file of its own, as with `huggingface_hub`; one file is called by its stem.
    """
    shards: list[list[Item]] = []
    room = 0
    large: list[list[Item]] = []
    for item in contents.items:
        if item.nbytes > max_nbytes:
            large.append([item])
            continue
        if not shards or item.nbytes > room:
            shards.append([])
            room = max_nbytes
        shards[-1].append(item)
        room -= item.nbytes
    shards += large
    if len(shards) == 1:
        return [plan_safetensors(f"{stem}.safetensors", shards[0])]
    count = len(shards)
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [plan_safetensors(name, shard) for name, shard in zip(names, shards, strict=True)]


def index_of(plans: Sequence[FilePlan]) -> bytes:
    """Return the index of some files."""
    items = [(item, plan.name) for plan in plans for item in plan.segments if isinstance(item, Item)]
    document = {
        "metadata": {"total_size": sum(item.nbytes for item, _ in items)},
        "weight_map": {item.name: name for item, name in items},
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
