"""Files as `torch.save` writes them: a ZIP of a pickle and of one stored entry for each array.

Source: torch/serialization.py (`_save`), torch/_tensor.py (`_reduce_ex_internal`) and
caffe2/serialize/inline_container.cc of torch 2.13. `torch.load(weights_only=True)` and `mmap=True` read them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ckptengine.export.contents import Contents, Item
from ckptengine.export.optimizers import with_numbers
from ckptengine.export.pickles import Names, Storage, pickled
from ckptengine.export.stream import FilePlan, Segment
from ckptengine.export.zip_file import zip_segments

__all__ = ["plan_torch_file", "torch_segments"]

_ALIGNMENT = 64


def plan_torch_file(name: str, contents: Contents) -> FilePlan:
    """Return the plan of one file; raises `ForeignFormatError` naming what it can't hold."""
    storages: dict[int, Storage] = {}

    def array(item: Item) -> Storage:
        return storages.setdefault(item.leaf, Storage(str(len(storages)), item.dtype, item.shape))

    data = pickled(with_numbers(contents.nested(array), contents), Names())
    items = {storages[item.leaf].key: item for item in contents.items}
    return FilePlan(name, tuple(torch_segments(data, list(items.items()), 0)), sums=True)


def torch_segments(data: bytes, items: Sequence[tuple[str, Item]], first: int) -> list[Segment]:
    """Return the segments of a ZIP as `torch.save` writes it: a pickle, and the arrays by the keys of their storages.

    `first` is the place of its first segment among those of the file.
    """
    arrays: list[tuple[str, list[bytes | Item]]] = [(f"archive/data/{key}", [item]) for key, item in items]
    entries: list[tuple[str, list[bytes | Item]]] = [
        ("archive/data.pkl", [data]),
        ("archive/.format_version", [b"1"]),
        ("archive/.storage_alignment", [str(_ALIGNMENT).encode()]),
        ("archive/byteorder", [b"little"]),
        *arrays,
        ("archive/version", [b"3\n"]),
        ("archive/.data/serialization_id", [hashlib.sha256(data).hexdigest()[:40].encode()]),
    ]
    return zip_segments(entries, first, _ALIGNMENT)
