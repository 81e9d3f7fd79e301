from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptengine.data.readers import BinaryRows, Calling, JsonLines, Lines, NpyRows, Reader
from ckptengine.data.shards import Shards
from ckptengine.errors import StateError, StorageError


def relaxed(examples: int) -> settings:
    """So many examples, however busy the machine is."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def write_lines(path: Path, lines: int) -> str:
    path.write_bytes(b"".join(b"%d\n" % number for number in range(lines)))
    return str(path)


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 4097, 9999, 12287, 12288, 29_999, 30_000])
@pytest.mark.parametrize("marked", [True, False])
def test_lines_are_found_by_their_number(tmp_path: Path, start: int, marked: bool) -> None:
    path = write_lines(tmp_path / "a", 30_000)
    counted = Lines().count(path)
    assert counted.records == 30_000
    lines = Lines().open(path, start, counted.marks if marked else ())
    assert list(itertools.islice(lines, 3)) == [str(n) for n in range(start, min(start + 3, 30_000))]


def test_marks_save_reading_the_file_up_to_a_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a", 30_000)
    marks = Lines().count(path).marks
    lines = path.encode() and Path(path).read_bytes()
    assert marks == tuple(lines.index(b"\n%d\n" % n) + 1 for n in range(4096, 30_000, 4096))


@given(st.lists(st.sampled_from([b"", b"a", b"\r", b"\xc3\xa4 b"]), max_size=8), st.booleans(), st.data())
@relaxed(60)
def test_any_text_is_the_same_lines_from_any_start(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ended: bool, data: st.DataObject
) -> None:
    text = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    path = tmp_path_factory.mktemp("text") / "t"
    path.write_bytes(text)
    # str.splitlines breaks at more than a newline, so lines are taken apart by hand.
    expected = [line.removesuffix(b"\r").decode() for line in text.split(b"\n")]
    if expected[-1] == "" and not text.endswith(b"\r"):
        expected.pop()
    start = data.draw(st.integers(0, len(expected)))
    skipped = data.draw(st.integers(0, len(expected) - start))
    assert Lines().count(str(path)).records == len(expected)
    lines_read = Lines().open(str(path), start)
    lines_read.skip(skipped)
    assert list(lines_read) == expected[start + skipped :]


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"b": 2}\n')
    records = JsonLines().open(str(path), 0)
    assert next(records) == {"a": 1}
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 can't be parsed"):
        next(records)


@pytest.mark.parametrize("kind", ["npy", "raw"])
def test_rows_of_one_size_are_read_from_any_number_on_without_reading_what_is_before(tmp_path: Path, kind: str) -> None:
    rows = np.arange(60, dtype=np.int16).reshape(10, 2, 3)
    path = tmp_path / "rows"
    reader: Reader
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, rows)
        reader = NpyRows()
    else:
        path.write_bytes(b"head" + rows.tobytes())
        reader = BinaryRows("<i2", (2, 3), offset=4)
    assert reader.count(str(path)).records == 10
    read = reader.open(str(path), 3)
    first = next(read)
    first[:] = 0  # a record is the caller's own
    read.skip(2)
    assert [row.tolist() for row in read] == rows[6:].tolist()
    assert list(reader.open(str(path), 10)) == []


def test_a_binary_file_with_a_part_of_a_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    with pytest.raises(ValueError, match="10 bytes are not 0 and a multiple of 4"):
        BinaryRows("<i4").count(str(tmp_path / "a"))


class Counting(Lines):
    """Lines that remember which files were counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[str] = []

    def count(self, path: str):
        self.counted.append(os.path.basename(path))
        return super().count(path)


def test_counts_are_kept_beside_the_run_and_only_what_changed_is_read_again(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / name, 5000 + n) for n, name in enumerate("abc")]
    cache = tmp_path / "run" / "shards.json"
    first = Shards.count(paths, Counting(), cache=cache)
    assert first.counts == (5000, 5001, 5002)
    assert [len(marks) for marks in first.marks] == [1, 1, 1]
    reader = Counting()
    assert Shards.count(paths, reader, cache=cache) == first
    assert reader.counted == []
    write_lines(tmp_path / "b", 7)
    assert Shards.count(paths, reader, cache=cache).counts == (5000, 7, 5002)
    assert reader.counted == ["b"]
    assert [path.name for path in cache.parent.iterdir()] == ["shards.json"]


LINES = "ckptengine.data.readers.Lines"


@pytest.mark.parametrize(
    "data",
    [
        "",
        [],
        {"version": 1},
        {"version": 1, "reader": LINES},
        {"version": 1, "reader": LINES, "shards": {"a": [1, 2, "3", []]}},
    ],
)
def test_a_damaged_cache_of_counts_is_an_error_that_names_it(tmp_path: Path, data: object) -> None:
    path = write_lines(tmp_path / "a", 3)
    (tmp_path / "cache").write_text(json.dumps(data) if data else "")
    with pytest.raises(StateError, match="cache is no cache of record counts"):
        Shards.count([path], cache=tmp_path / "cache")


def test_a_cache_of_another_version_or_reader_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1\n2\n")
    (tmp_path / "cache").write_text(json.dumps({"version": 99, "reader": LINES, "shards": {}}))
    for reader, count in ((Lines(), 2), (BinaryRows("<i2"), 2), (BinaryRows("<i4"), 1), (Lines(), 2)):
        assert Shards.count([tmp_path / "a"], reader, cache=tmp_path / "cache").counts == (count,)


def test_a_data_set_that_was_moved_is_the_same_and_one_with_other_names_is_not(tmp_path: Path) -> None:
    digests = []
    for folder, names in (("x", ("p/a", "q/b")), ("y/z", ("p/a", "q/b")), ("w", ("p/a", "q/c"))):
        paths = [tmp_path / folder / name for name in names]
        for path in paths:
            path.parent.mkdir(parents=True)
            write_lines(path, 2)
        digests.append(Shards.given(paths, [2, 2]).digest)
    assert digests[0] == digests[1] != digests[2]


def test_wrong_shards_are_refused_with_what_to_give(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a", 3)
    with pytest.raises(ValueError, match="no shards"):
        Shards.given([], [])
    with pytest.raises(ValueError, match="2 counts for 1 shards"):
        Shards.given([path], [1, 2])
    with pytest.raises(ValueError, match="a count of -1"):
        Shards.given([path], [-1])
    with pytest.raises(TypeError, match="list of files"):
        Shards.given(path, [1])
    with pytest.raises(StorageError, match="gone: the shard can't be read"):
        Shards.count([tmp_path / "gone"])
    with pytest.raises(TypeError, match="a reader is"):
        Shards.count([path], 3)  # type: ignore[arg-type]


def test_a_plain_function_is_a_reader(tmp_path: Path) -> None:
    def read(path: str, start: int):
        yield from range(start, 5)

    assert Shards.count([write_lines(tmp_path / "a", 1)], read).counts == (5,)
    assert list(Calling(read).open("a", 3)) == [3, 4]
