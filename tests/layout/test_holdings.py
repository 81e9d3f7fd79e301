from __future__ import annotations

from ckptengine.layout.holdings import holdings_of
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import ArrayLeaf, HostMemory, Part, Placement


def test_a_leaf_becomes_its_boxes() -> None:
    memory = HostMemory(0, (8, 4), 0, 0, None)
    parts = (Part(Box((0, 2), (3, 2)), memory), Part(Box((0, 6), (3, 1)), memory))
    leaf = ArrayLeaf(("model", 3, "w"), "bfloat16", (3, 8), Placement.SHARDED, parts, "torch")
    (held,) = holdings_of([leaf])
    assert (held.path, held.dtype, held.shape, held.placement, held.container) == (
        ("model", 3, "w"),
        "bfloat16",
        (3, 8),
        Placement.SHARDED,
        "torch",
    )
    assert held.offsets.tolist() == [[0, 2], [0, 6]]
    assert held.lengths.tolist() == [[3, 2], [3, 1]]
