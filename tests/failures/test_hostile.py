"""Checkpoints that were made to do harm: every digest is right, the content is not."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forged import (
    CHECKSUMS,
    change_manifest,
    change_tail,
    change_values,
    data_path,
    manifest_path,
    replace_entry,
    write_manifest_text,
)
from hostile import read_all, refused

import ckptengine as ce
from ckptengine.archive.zip import end_records_nbytes
from ckptengine.errors import CheckpointDamagedError

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
