"""Checkpoints that were made to do harm: every digest is right, the content is not."""

import dataclasses
import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forged import (
    CHECKSUMS,
    as_fragments,
    change_columns,
    change_manifest,
    change_rows,
    change_tail,
    change_values,
    data_path,
    manifest_path,
    replace_entry,
    with_column,
    with_leaf,
    write_manifest_text,
)
from numcodecs.zstd import Zstd

import ckptengine as ce
from ckptengine.archive.directory import read_directory, read_entry
from ckptengine.archive.zip import end_records_nbytes
from ckptengine.errors import CheckpointDamagedError, CheckpointError
from ckptengine.inspect import describe, list_run, verify
from ckptengine.load.choose import newest_checkpoint
from ckptengine.storage.local import LocalStorage

GIB = 1 << 30
SECRET = b"a secret outside of the checkpoint" * 1000


def state(tied: np.ndarray[Any, Any] | None = None) -> dict[str, Any]:
    tied = np.arange(700.0) if tied is None else tied
    return {
        "a": np.arange(100_000, dtype=np.float32).reshape(100, 1000),
        "b": tied,
        "c": tied,
        "list": [np.ones(3), 1],
        "step": 5,
        "own": ce.PerRank({"seed": 1, "x": np.ones(5)}),
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("original") / "point"
    ce.save(place, state())
    (place.parent / "secret").write_bytes(SECRET)
    return place


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original.parent, tmp_path / "all")
    return tmp_path / "all" / "point"


@pytest.fixture
def bounded() -> Iterator[None]:
    """No more than another GiB of address space, and no more than a minute."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIB, kept[1]))
    began = time.monotonic()
    yield
    resource.setrlimit(resource.RLIMIT_AS, kept)
    assert time.monotonic() - began < 60


def read_all(place: Path) -> list[BaseException | None]:
    """Read a checkpoint in every way that there is; return what each raised. Only CheckpointErrors come out."""
    ways: list[Callable[[], object]] = [
        lambda: ce.load(place),
        lambda: ce.load(place, into=state(np.zeros(700))),
        lambda: ce.load(place, into=state(np.zeros(700)), strict=False),
        lambda: list_run(place),
        lambda: describe(place),
        lambda: verify(place),
        lambda: walk(place),
    ]
    raised: list[BaseException | None] = []
    for way in ways:
        try:
            way()
            raised.append(None)
        except CheckpointError as error:
            raised.append(error)
            assert "a secret" not in str(error)  # noqa: PT017
    return raised


def walk(place: Path) -> None:
    """Read the archives by their central directories, as the Zarr store does."""
    checkpoint = newest_checkpoint(LocalStorage(place))
    archive = checkpoint.archive(0)
    for name, entry in read_directory(archive).items():
        read_entry(archive, name, entry, 0, entry.nbytes)


def refused(place: Path) -> str:
    """Read a checkpoint that must not be loadable; return the message."""
    first, second, *_ = read_all(place)
    assert first is not None
    assert second is not None
    return str(first)


MANIFESTS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("a layout elsewhere", lambda d: d["layout"].update(name="../../secret")),
    ("an archive elsewhere", lambda d: d["archives"][0].update(name="../../secret")),
    ("an absolute archive", lambda d: d["archives"][0].update(name="/etc/passwd")),
    ("an archive named ..", lambda d: d["archives"][0].update(name="..")),
    ("an attempt elsewhere", lambda d: d.update(attempt="../../../etc")),
    ("an attempt with a slash", lambda d: d.update(attempt="aaaa/bbbb")),
    ("an attempt with a newline", lambda d: d.update(attempt="aaaaaaaa\n")),
    ("a negative size", lambda d: d["archives"][0].update(nbytes=-1)),
    ("a huge size", lambda d: d["archives"][0].update(nbytes=1 << 62)),
    ("a size beyond 64 bits", lambda d: d["archives"][0].update(nbytes=1 << 80)),
    ("a float size", lambda d: d["archives"][0].update(nbytes=8192.0)),
    ("a tail before the file", lambda d: d["archives"][0].update(tail_position=-4096)),
    ("a tail after the file", lambda d: d["archives"][0].update(tail_position=1 << 40)),
    ("a tail at an odd place", lambda d: d["archives"][0].update(tail_position=1)),
    ("a tail that is everything", lambda d: d["archives"][0].update(tail_position=0)),
    ("no digest", lambda d: d["archives"][0].pop("tail_sha256")),
    ("a digest that is none", lambda d: d["archives"][0].update(tail_sha256="0" * 63)),
    ("a larger world", lambda d: d.update(world_size=2)),
    ("a huge world", lambda d: d.update(world_size=1 << 60)),
    ("an empty world", lambda d: d.update(world_size=0)),
    ("a negative world", lambda d: d.update(world_size=-1)),
    ("the same archive twice", lambda d: d.update(world_size=2, archives=d["archives"] * 2)),
    ("the layout as archive", lambda d: d.update(archives=[d["layout"]])),
    ("no archives", lambda d: d.update(archives=[])),
    ("archives that are no list", lambda d: d.update(archives={"0": d["archives"][0]})),
    ("blocks of one byte", lambda d: d.update(block_nbytes=1)),
    ("blocks of no bytes", lambda d: d.update(block_nbytes=0)),
    ("huge blocks", lambda d: d.update(block_nbytes=1 << 62)),
    ("a newer version", lambda d: d.update(format_version=2)),
    ("version 0", lambda d: d.update(format_version=0)),
    ("a version that is text", lambda d: d.update(format_version="1")),
    ("a version that is true", lambda d: d.update(format_version=True)),
    ("another generation", lambda d: d.update(generation=7)),
    ("a parent that is text", lambda d: d.update(parent="ab")),
    ("a time that is none", lambda d: d.update(created="yesterday")),
    ("metadata that is a list", lambda d: d.update(metadata=[])),
]


@pytest.mark.parametrize(("change"), [c for _, c in MANIFESTS], ids=[n for n, _ in MANIFESTS])
def test_an_evil_manifest_is_refused(place: Path, change: Callable[[Any], Any], bounded: None) -> None:
    change_manifest(place, change)
    message = refused(place)
    assert str(place) in message


TEXTS = {
    "not JSON": "{]",
    "a list": "[1, 2]",
    "nothing": "",
    "null": "null",
    "a number": "1e999",
    "a huge number": '{"format_version": ' + "9" * 100_000 + "}",
    "binary": "\udcff\udc80",
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a name twice": '{"format_version":1,"format_version":1}',
    "not a number": '{"format_version": NaN}',
    "a newer version without anything else": '{"format_version": 99}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_manifest_that_is_none_is_refused(place: Path, text: str, bounded: None) -> None:
    manifest_path(place).write_bytes(text.encode(errors="surrogateescape"))
    assert str(manifest_path(place)) in refused(place)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e400", "1" + "0" * 5000])
def test_a_number_that_json_can_write_and_python_cannot_hold_is_harmless(
    place: Path, number: str, bounded: None
) -> None:
    text = manifest_text(place).replace('"metadata":{}', f'"metadata":{{"x":{number}}}')
    write_manifest_text(place, text)
    refused(place)


@pytest.mark.parametrize("depth", [*range(10, 1000, 45), *range(880, 1000, 3)])
def test_metadata_of_any_depth_is_read_or_refused(place: Path, depth: int) -> None:
    text = manifest_text(place).replace('"metadata":{}', f'"metadata":{{"x":{"[" * depth}{"]" * depth}}}')
    write_manifest_text(place, text)
    read_all(place)


def manifest_text(place: Path) -> str:
    document = json.loads(manifest_path(place).read_text())
    del document["sha256"]
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


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
    assert "at most 268435456 bytes" in refused(place)


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


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("no values", lambda v: v.pop("values")),
    ("values that are text", lambda v: v.update(values="abc")),
    ("values that are no pairs", lambda v: v.update(values=[[1, 2, 3]])),
    ("a path that is text", lambda v: v.update(values=[["step", 1]])),
    ("a path of lists", lambda v: v.update(values=[[[["step"]], 1]])),
    ("an empty path", lambda v: v.update(values=[[[], 1]])),
    ("a long path", lambda v: v.update(values=[[["x"] * 5000, 1]])),
    ("a path twice", lambda v: v["values"].append([["step"], 6])),
    ("a value inside a value", lambda v: v["values"].append([["step", "inner"], 6])),
    ("a value inside an array", lambda v: v["values"].append([["a", "inner"], 6])),
    ("a value in place of an array", lambda v: v["values"].append([["a"], 6])),
    ("an unknown tag", lambda v: v.update(values=[[["step"], {"$pickle": "gASVAAAAAAAAAC4="}]])),
    ("a deep value", lambda v: v.update(values=[[["step"], nested(200)]])),
    ("a dtype of code", lambda v: v.update(values=[[["step"], {"$dtype": "(1,,2)i8"}]])),
    ("a huge dtype", lambda v: v.update(values=[[["step"], {"$dtype": "<U999999999"}]])),
    ("a numpy scalar of nothing", lambda v: v.update(values=[[["step"], {"$numpy": ["float32", ""]}]])),
    ("a dict with a list as key", lambda v: v.update(values=[[["step"], {"$dict": [[[1], 2]]}]])),
    ("bytes that are none", lambda v: v.update(values=[[["step"], {"$bytes": "!"}]])),
    ("an alias of nothing", lambda v: v.update(aliases=[[["c"], ["nowhere"]]])),
    ("an alias of itself", lambda v: v.update(aliases=[[["c"], ["c"]]])),
    ("an alias of an alias", lambda v: v.update(aliases=[[["c"], ["d"]], [["d"], ["c"]]])),
    ("an alias that is a number", lambda v: v.update(aliases=[[["c"], 5]])),
    ("containers that are numbers", lambda v: v.update(containers=[5])),
    ("an unhashable container", lambda v: v.update(containers=[[["list"], ["list"]]])),
]  # fmt: skip


@pytest.mark.parametrize(("change"), [c for _, c in VALUES], ids=[n for n, _ in VALUES])
@pytest.mark.parametrize("node", ["objects", "ranks/00000"])
def test_evil_values_are_refused_or_do_not_matter(
    place: Path, change: Callable[[Any], Any], node: str, bounded: None
) -> None:
    change_values(place, lambda values: change(values) if node == "objects" or "aliases" in values else values, node)
    for error in filter(None, read_all(place)[:3]):
        assert str(place) in str(error), error


def end_record(tail: bytearray, offset: int, value: int) -> None:
    """Change a number of the ZIP64 end record (APPNOTE 4.3.14)."""
    struct.pack_into("<Q", tail, len(tail) - end_records_nbytes + offset, value)


TAILS: list[tuple[str, Callable[[bytearray], Any]]] = [
    ("many entries", lambda t: end_record(t, 32, (1 << 64) - 1)),
    ("no entries", lambda t: end_record(t, 32, 0)),
    ("a huge directory", lambda t: end_record(t, 40, (1 << 64) - 1)),
    ("a directory before the file", lambda t: end_record(t, 48, 0)),
    ("a directory beyond the file", lambda t: end_record(t, 48, (1 << 64) - 1)),
    ("no end", lambda t: t.__setitem__(slice(len(t) - end_records_nbytes, None), bytes(end_records_nbytes))),
    ("no tail", lambda t: t.clear()),
    ("a tail of zeros", lambda t: t.__setitem__(slice(None), bytes(len(t)))),
    ("an entry that never ends", lambda t: struct.pack_into("<QQ", t, t.index(b"\x01\x00\x10\x00") + 4, *(2**63,) * 2)),
    ("a directory entry elsewhere", lambda t: struct.pack_into("<I", t, t.rindex(b"PK\x01\x02") + 42, 2**32 - 2)),
    ("a directory entry of a long name", lambda t: struct.pack_into("<H", t, t.rindex(b"PK\x01\x02") + 28, 65535)),
    ("a directory entry of a huge size", lambda t: struct.pack_into("<I", t, t.rindex(b"PK\x01\x02") + 24, 2**32 - 1)),
    ("an empty table", lambda t: replace_entry(t, f"{CHECKSUMS}/c/0", b"")),
    ("a longer table", lambda t: replace_entry(t, f"{CHECKSUMS}/c/0", bytes(4096))),
    ("a table that is no JSON", lambda t: replace_entry(t, f"{CHECKSUMS}/zarr.json", b"{")),
    ("a table about nothing", lambda t: replace_entry(t, f"{CHECKSUMS}/zarr.json", b"{}")),
    ("a table of lists", lambda t: replace_entry(t, f"{CHECKSUMS}/zarr.json", b'{"attributes":[]}')),
    ("values that are deep", lambda t: replace_entry(t, "objects/zarr.json", b"[" * 100_000)),
    ("values that are no object", lambda t: replace_entry(t, "objects/zarr.json", b"[]")),
    ("values of no attributes", lambda t: replace_entry(t, "objects/zarr.json", b'{"attributes":5}')),
]


@pytest.mark.parametrize(("change"), [c for _, c in TAILS], ids=[n for n, _ in TAILS])
@pytest.mark.parametrize("name", ["rank-00000.zarr.zip", "layout.zarr.zip"])
def test_an_evil_tail_is_refused_or_does_not_matter(
    place: Path, change: Callable[[bytearray], Any], name: str, bounded: None
) -> None:
    try:
        change_tail(place, change, name)
    except KeyError:
        pytest.skip("the layout file has no such entry")
    for error in filter(None, read_all(place)[:3]):
        assert str(place) in str(error), error


def test_a_table_of_wrong_checksums_refuses_every_byte(place: Path, bounded: None) -> None:
    def spoil(tail: bytearray) -> None:
        at = tail.index(b"/c/0")
        tail[at + 40] ^= 1

    change_tail(place, spoil)
    with pytest.raises(CheckpointDamagedError, match=r"rank-00000\.zarr\.zip"):
        ce.load(place)


def test_nothing_outside_of_the_checkpoint_is_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = os.open

    def noted(path: Any, *arguments: Any, **more: Any) -> int:
        opened.append(os.path.realpath(path))
        return original(path, *arguments, **more)

    monkeypatch.setattr(os, "open", noted)
    whole = manifest_path(place).read_bytes()
    for _, change in MANIFESTS:
        change_manifest(place, change)
        read_all(place)
        manifest_path(place).write_bytes(whole)
    change_tail(place, lambda tail: end_record(tail, 48, 0))
    read_all(place)
    assert opened
    assert not [path for path in opened if not path.startswith(f"{place}/")]


def test_a_sparse_file_of_a_huge_size_is_refused_without_reading_it(place: Path, bounded: None) -> None:
    archive = data_path(place) / "rank-00000.zarr.zip"
    os.truncate(archive, 1 << 42)
    assert "4398046511104 bytes long" in refused(place)
