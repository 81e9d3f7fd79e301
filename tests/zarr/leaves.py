"""What a checkpoint of three ranks holds, read through a zarr group."""

import numpy as np
import three_ranks
import zarr


def read(group: zarr.Group, node: str) -> np.ndarray:
    """Return a leaf, put together where it is a group of fragments."""
    leaf = group[node]
    if isinstance(leaf, zarr.Array):
        return np.asarray(leaf[...])
    parts = [(part.attrs["ckptengine"]["offset"], part[...]) for _, part in leaf.arrays()]
    array = np.zeros(leaf.attrs["ckptengine"]["shape"], parts[0][1].dtype)
    for offset, part in parts:
        array[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return array


def check_all(group: zarr.Group) -> None:
    """Assert that a hierarchy holds exactly what the three ranks saved."""
    for node, expected in three_ranks.shared().items():
        check(read(group, node), expected, node)
    for rank in range(three_ranks.RANKS):
        check(read(group, f"ranks/{rank:05d}/rng"), three_ranks.own(rank), str(rank))
    values = group["objects"].attrs["ckptengine"]["values"]
    assert [["schedule", "betas"], {"$tuple": [0.9, 0.95]}] in values
    assert [["step"], 17] in values
    assert [["position", "line"], 200] in group["ranks/00002"].attrs["ckptengine"]["values"]


def check(array: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Assert equality, bit for bit; float8 is stored as its bits."""
    dtype = np.dtype("u1") if expected.dtype.name.startswith("float8") else expected.dtype
    assert (array.shape, array.dtype) == (expected.shape, dtype), name
    assert array.tobytes() == expected.tobytes(), name
