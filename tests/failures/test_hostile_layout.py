"""Layout files that were made to do harm: every digest is right, the content is not."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forged import as_fragments, change_columns, change_rows, with_column, with_leaf
from hostile import read_all, refused, state
from numcodecs.zstd import Zstd

import ckptengine as ce
from ckptengine.archive.column import MAX_CHUNK_ITEMS, encode_column

ROWS: list[tuple[str, Callable[[Any], Any]]] = [
    ("an archive that is not there", lambda r: with_column(r, "archive", 0, 1)),
    ("a negative archive", lambda r: with_column(r, "archive", 0, -1)),
    ("a position before the file", lambda r: with_column(r, "position", 0, -4096)),
    ("a position in the tail", lambda r: with_column(r, "position", 0, 500_000)),
    ("a position beyond the file", lambda r: with_column(r, "position", 0, 1 << 61)),
    ("a position that overflows", lambda r: with_column(r, "position", 0, (1 << 63) - 1)),
    ("a box outside", lambda r: with_column(as_fragments(r), "offsets", 0, 5)),
    ("a box before", lambda r: with_column(as_fragments(r), "offsets", 0, -5)),
    ("a box far away", lambda r: with_column(as_fragments(r), "offsets", 0, (1 << 63) - 1)),
    ("a box too large", lambda r: with_column(as_fragments(r), "lengths", 0, 101)),
    ("a box too small", lambda r: with_column(as_fragments(r), "lengths", 0, 99)),
    ("an empty box", lambda r: with_column(as_fragments(r), "lengths", 0, 0)),
    ("a negative box", lambda r: with_column(as_fragments(r), "lengths", 0, -100)),
    ("more boxes than rows", lambda r: dataclasses.replace(as_fragments(r), lengths=np.ones(4, np.int64))),
    ("fewer boxes than rows", lambda r: with_leaf(r, 0, chunk_shape=None)),
    ("more fragments than elements", lambda r: with_leaf(as_fragments(r), 0, shape=(0, 1000))),
    ("a chunk of another size", lambda r: with_leaf(r, 0, chunk_shape=(50, 1000))),
    ("another dtype", lambda r: with_leaf(r, 0, dtype="float64")),
    ("an unknown dtype", lambda r: with_leaf(r, 0, dtype="object")),
    ("a larger array", lambda r: with_leaf(r, 0, shape=(200, 1000))),
    ("a huge array", lambda r: with_leaf(r, 0, shape=(1 << 31, 1 << 29))),
    ("a huge array of fragments", lambda r: with_leaf(r, 0, shape=(1 << 31, 1 << 29), chunk_shape=None)),
    ("an array without rows", lambda r: with_leaf(r, 0, shape=(1 << 40,), rows=(0, 0), chunk_shape=None)),
    ("a negative shape", lambda r: with_leaf(r, 0, shape=(-100, -1000))),
    ("many dimensions", lambda r: with_leaf(r, 0, shape=(1,) * 70)),
    ("rows of another", lambda r: with_leaf(r, 0, rows=(0, 2))),
    ("negative rows", lambda r: with_leaf(r, 0, rows=(-1, 1))),
    ("a chunk of nothing", lambda r: with_leaf(r, 0, chunk_shape=(0, 1000))),
    ("an empty path", lambda r: with_leaf(r, 0, path=())),
    ("a path of other things", lambda r: with_leaf(r, 0, path=(None, 1.5))),
    ("the same path twice", lambda r: with_leaf(r, 0, path=r.leaves[1].path)),
    ("no rows at all", lambda r: without_rows(r)),
]


def without_rows(rows: Any) -> Any:
    empty = {name: np.array(getattr(rows, name))[:0] for name in ("archive", "position")}
    return dataclasses.replace(rows, leaves=(), offsets=rows.offsets[:0], lengths=rows.lengths[:0], **empty)


@pytest.mark.parametrize(("change"), [c for _, c in ROWS], ids=[n for n, _ in ROWS])
def test_an_evil_layout_is_refused(place: Path, change: Callable[[Any], Any], bounded: None) -> None:
    change_rows(place, change)
    raised = read_all(place)
    assert raised[1] is not None, "the state has leaves that this layout does not give"
    for error in filter(None, raised[:3]):
        assert str(place) in str(error), error


def test_a_layout_of_fragments_is_read_as_that_of_a_grid(place: Path) -> None:
    change_rows(place, as_fragments)
    assert not any(read_all(place))
    assert ce.load(place)["a"].tobytes() == state()["a"].tobytes()


def test_a_huge_leaf_that_no_byte_backs_allocates_nothing(place: Path, bounded: None) -> None:
    change_rows(place, lambda r: with_leaf(r, 0, shape=(0, 1 << 60), rows=(0, 0), chunk_shape=None))
    read_all(place)


def column_metadata(shape: Any, dtype: Any, chunk: Any, shard: Any = None) -> bytes:
    grid = {"configuration": {"chunk_shape": chunk if shard is None else shard}}
    codecs = [{"configuration": {"chunk_shape": chunk}}]
    return json.dumps({"shape": shape, "data_type": dtype, "chunk_grid": grid, "codecs": codecs}).encode()


METADATA = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"{" * 50_000,
    b"[" * 100_000,
    *(
        column_metadata(shape, dtype, *chunks)
        for shape, dtype, *chunks in (
            ([-1], "int64", [1]),
            ([1 << 62], "int64", [1]),
            ([1 << 62], "int64", [1], [1 << 62]),
            ([1 << 32], "int64", [65536]),
            ([1 << 32], "int64", [65536], [1 << 32]),
            ([1 << 80], "int64", [65536], [1 << 80]),
            ([10], "int64", [1 << 40]),
            ([10], "int64", [0]),
            ([10], "int64", [-1]),
            ([10], "int64", [1], [5]),
            ([10], "int64", [5], [15]),
            ([10.5], "int64", [1]),
            ([0], "int64", [1]),
            ([True], "int64", [True]),
            ([], "int64", []),
            ([1, 1], "int64", [1, 1]),
            ([1], "object", [1]),
            ([1], "float64", [1]),
            ([1], "uint8", [1]),
            ([1], "(1,,2)i8", [1]),
            ([1], "i8,i8", [1]),
            ([1], "no such dtype", [1]),
            ([1], {"names": ["a"], "formats": ["i8"]}, [1]),
            ([1], ["i8"], [1]),
            ([1], None, [1]),
            ([1], "m8[s]", [1]),
        )
    ),
]


@pytest.mark.parametrize("number", range(len(METADATA)))
@pytest.mark.parametrize("column", ["archive", "leaves", "position"])
def test_evil_metadata_of_a_column_is_refused(place: Path, number: int, column: str, bounded: None) -> None:
    entry = f"layout/{column}/zarr.json"
    change_columns(place, lambda name, data: METADATA[number] if name == entry else data)
    refused(place)


def frame(nbytes: int) -> bytes:
    return bytes(Zstd(level=1).encode(bytes(nbytes)))


CHUNKS = {
    "nothing": b"",
    "no frame": b"\x00" * 100,
    "half a frame": frame(10_000)[:-2],
    "a frame of another size": frame(10),
    "a frame of much more": frame(64 << 20),
    # A frame header that claims 2**60 bytes (RFC 8878, 3.1.1: single segment, 8 bytes of content size).
    "a frame that claims the most": b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\x00\x00",
    "a frame of unknown size": b"\x28\xb5\x2f\xfd\x00\x58\x01\x00\x00",
}


def shard(chunk: bytes, start: int = 0, nbytes: int | None = None) -> bytes:
    """An entry of one chunk and its index, which may lie."""
    return chunk + struct.pack("<QQ", start, len(chunk) if nbytes is None else nbytes)


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_an_evil_chunk_of_a_column_is_refused(place: Path, chunk: bytes, bounded: None) -> None:
    change_columns(place, lambda name, data: shard(chunk) if name == "layout/position/c/0" else data)
    refused(place)


@pytest.mark.parametrize(
    ("start", "nbytes"),
    [
        (0, 0),
        (0, 1),
        (1, 40),
        (0, 1 << 20),
        (41, 1),
        (1 << 40, 40),
        (2**64 - 1, 40),
        (2**64 - 1, 2**64 - 1),
        (8, 2**63),
    ],
)
@pytest.mark.parametrize("column", ["position", "leaves"])
def test_an_evil_index_of_a_column_is_refused(place: Path, start: int, nbytes: int, column: str, bounded: None) -> None:
    chunk = frame(4 * 8).ljust(40, b"\x00")
    data = shard(chunk, start, nbytes)
    change_columns(place, lambda name, old: data if name == f"layout/{column}/c/0" else old)
    refused(place)


@pytest.mark.parametrize("data", [b"", b"\x00" * 15, b"\x00" * 16], ids=len)
def test_an_entry_without_room_for_its_index_is_refused(place: Path, data: bytes, bounded: None) -> None:
    change_columns(place, lambda name, old: data if name == "layout/archive/c/0" else old)
    refused(place)


@pytest.mark.parametrize("column", ["archive", "position"])
def test_many_claims_of_one_chunk_allocate_nothing(place: Path, column: str, bounded: None) -> None:
    kind = {"archive": "int32", "position": "int64"}[column]
    count, items = 1 << 18, 1 << 16
    chunk = frame(items * np.dtype(kind).itemsize)
    data = chunk + struct.pack("<QQ", 0, len(chunk)) * count
    forged = {
        f"layout/{column}/zarr.json": column_metadata([count * items], kind, [items], [count * items]),
        f"layout/{column}/c/0": data,
    }
    change_columns(place, lambda name, old: forged.get(name, old))
    refused(place)


def test_a_table_of_leaves_that_claims_gibibytes_is_refused(place: Path, bounded: None) -> None:
    count, items = 1 << 16, 1 << 16
    chunk = frame(items)
    forged = {
        "layout/leaves/zarr.json": column_metadata([count * items], "uint8", [items], [count * items]),
        "layout/leaves/c/0": chunk + struct.pack("<QQ", 0, len(chunk)) * count,
    }
    change_columns(place, lambda name, old: forged.get(name, old))
    assert "table of leaves claims 4,294,967,296 bytes" in refused(place)


LEAVES = {
    "no list": {"a": 1},
    "numbers": [1, 2],
    "an empty leaf": [{}],
    "text": "leaves",
    "huge numbers": [{"path": ["a"], "shape": [10**300]}],
}


@pytest.mark.parametrize("leaves", LEAVES.values(), ids=LEAVES)
def test_an_evil_table_of_leaves_is_refused(place: Path, leaves: Any, bounded: None) -> None:
    data = json.dumps(leaves).encode()
    forged = {
        "layout/leaves/zarr.json": column_metadata([len(data)], "uint8", [len(data)]),
        "layout/leaves/c/0": shard(bytes(Zstd(level=1).encode(data))),
    }
    change_columns(place, lambda name, old: forged.get(name, old))
    refused(place)


def test_a_table_of_leaves_that_a_few_bytes_claim_is_refused_before_it_is_made(place: Path, bounded: None) -> None:
    text = b"[" + b"[]," * (80 << 20) + b"[]]"  # 240 MB that compress to some kilobytes and parse to 5 GB
    metadata, data = encode_column(np.frombuffer(text, np.uint8), MAX_CHUNK_ITEMS, differences=False)
    assert len(data) < 1 << 20
    del text
    entries = {"layout/leaves/zarr.json": metadata, "layout/leaves/c/0": data}
    change_columns(place, lambda name, content: entries.get(name, content))
    assert "table of leaves claims" in refused(place)


def test_more_chunks_than_the_archives_have_room_for_are_refused(place: Path, bounded: None) -> None:
    def change(rows: Any) -> Any:
        wide = with_leaf(rows, 0, chunk_shape=(1, 1), rows=(0, 100_000))
        count = 100_000 + len(rows.archive) - 1
        later = tuple(
            dataclasses.replace(leaf, rows=(leaf.rows[0] + 99_999, leaf.rows[1] + 99_999)) for leaf in rows.leaves[1:]
        )
        zeros = {"archive": np.zeros(count, np.int32), "position": np.zeros(count, np.int64)}
        return dataclasses.replace(wide, leaves=(wide.leaves[0], *later), **zeros)

    change_rows(place, change)
    assert "have no room" in refused(place)
