"""Whether ranks that hold the same box of a sharded array hold the same in it.

Such ranks are replicas of each other: those of HSDP and of FSDP1's HYBRID_SHARD, and ranks that split a tensor over a
part of the job. Who they are is known once all boxes are; where there are none, nothing is read and nobody is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

import ckptengine._native as _native
from ckptengine.comm.agree import from_all
from ckptengine.comm.base import Communicator
from ckptengine.errors import SaveFailedError
from ckptengine.layout.survey import Boxes, Group, Kind, Survey
from ckptengine.layout.tiling import linear
from ckptengine.save.replicas import Crcs, box_crcs, box_path, compare_replicas
from ckptengine.schema.box import Box
from ckptengine.schema.head import is_zero_sized
from ckptengine.schema.leaf import ArrayLeaf, Placement
from ckptengine.schema.path import Path

__all__ = ["Copies", "compare_copies", "copies_in"]

_DOING = "comparing what several ranks hold"

Copies = Mapping[int, Boxes]
"""By group: its boxes on all ranks, some of which several ranks hold."""


def copies_in(survey: Survey, boxes: Mapping[int, Boxes]) -> Copies:
    """Return the boxes of the groups of sharded leaves of which two ranks hold the same box; the same on all ranks."""
    found = {}
    for number, group in enumerate(survey.groups):
        if group.head.placement is not Placement.SHARDED or group.holders.size < 2 or is_zero_sized(group.head.shape):
            continue
        if group.kind is Kind.WHOLE:
            found[number] = _whole(group)
        elif number in boxes and _differ(group, boxes[number], boxes[number].ranks):
            found[number] = boxes[number]
    return found


def _whole(group: Group) -> Boxes:
    shape = (group.holders.size, len(group.head.shape))
    return Boxes(np.zeros(shape, np.int64), np.broadcast_to(group.head.shape, shape), group.holders)


def _ends(group: Group, boxes: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the first and the last element of each box, which tell it from all others."""
    shape = group.head.shape
    return linear(shape, boxes.offsets), linear(shape, boxes.offsets + boxes.lengths - 1)


def compare_copies(
    comm: Communicator, survey: Survey, copies: Copies, leaves: Iterable[ArrayLeaf], timeout: float
) -> None:
    """Compare the contents of boxes that several ranks hold; all ranks call it, with what `copies_in` returned.

    Each tells 4 bytes for each box of a group, whatever the number of its leaves. Raises, on all ranks,
    `ReplicaMismatchError` naming leaves, boxes and ranks.
    """
    if not copies:
        return
    paths: dict[int, list[Path]] = {number: [] for number in copies}
    for head, number in survey.leaves:
        if number in paths:
            paths[number].append(head.path)
    wanted = {path for of_group in paths.values() for path in of_group}
    held = [leaf for leaf in leaves if leaf.path in wanted]
    crcs: dict[Path, int] = {}

    def told() -> bytes:
        crcs.update(box_crcs(held))
        return b"".join(_told(boxes, paths[number], crcs, comm.rank).tobytes() for number, boxes in copies.items())

    messages = from_all(comm, told, timeout, _DOING)
    odd = [number for number, said in _by_group(copies, messages).items() if _differ(survey.groups[number], *said)]
    if not odd:
        return
    # Which leaf it is: all ranks have come to the same, and tell more of it.
    number = odd[0]
    rows = [(path, box) for path in paths[number] for box in _boxes_of(copies[number], comm.rank)]
    said = from_all(comm, lambda: np.asarray([crcs[box_path(*row)] for row in rows], "<u4").tobytes(), timeout, _DOING)
    named = [([rank], _named(copies[number], paths[number], rank, words)) for rank, words in enumerate(said)]
    compare_replicas(named)


def _boxes_of(boxes: Boxes, rank: int) -> list[Box]:
    mine = boxes.ranks == rank
    rows = zip(boxes.offsets[mine].tolist(), boxes.lengths[mine].tolist(), strict=True)
    return [Box(tuple(offset), tuple(lengths)) for offset, lengths in rows]


def _told(boxes: Boxes, paths: Sequence[Path], crcs: Mapping[Path, int], rank: int) -> np.ndarray:
    """Return for each box of this rank one CRC32 of what all leaves of the group have in it."""
    mine = _boxes_of(boxes, rank)
    words = [np.asarray([crcs[box_path(path, box)] for path in paths], np.uint32) for box in mine]
    return np.asarray([_native.crc32(one) for one in words], "<u4")


def _by_group(copies: Copies, messages: Sequence[bytes]) -> dict[int, tuple[Boxes, np.ndarray]]:
    """Return for each group its boxes, and what their ranks have said of each, in the same order."""
    counts = np.stack([np.bincount(boxes.ranks, minlength=len(messages)) for boxes in copies.values()])
    of_rank = counts.sum(axis=0)
    if (of_rank * 4 != [len(message) for message in messages]).any():
        raise SaveFailedError("a rank's planning message is damaged; nothing was written, save again")
    words = np.frombuffer(b"".join(messages), "<u4")
    starts = np.cumsum(of_rank) - of_rank + np.cumsum(counts, axis=0) - counts
    return {
        number: (boxes, words[np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())])
        for (number, boxes), start, count in zip(copies.items(), starts, counts, strict=True)
    }


def _differ(group: Group, boxes: Boxes, words: np.ndarray) -> bool:
    """Whether the words of any two equal boxes differ."""
    first, last = _ends(group, boxes)
    order = np.lexsort((last, first))
    first, last, words = first[order], last[order], words[order]
    return bool(((first[1:] == first[:-1]) & (last[1:] == last[:-1]) & (words[1:] != words[:-1])).any())


def _named(boxes: Boxes, paths: Sequence[Path], rank: int, words: bytes) -> Crcs:
    rows = [box_path(path, box) for path in paths for box in _boxes_of(boxes, rank)]
    return tuple(zip(rows, np.frombuffer(words, "<u4").tolist(), strict=True))
