"""The central directory, and entries read through it."""

import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.archive import zip as zipfmt
from ckptengine.archive.directory import DirectoryEntry, read_directory, read_entry
from ckptengine.archive.reader import open_archive
from ckptengine.archive.record import ArchiveRecord
from ckptengine.errors import CheckpointDamagedError
from ckptengine.storage.local import LocalStorage


@pytest.fixture
def archive(archive_of, state):
    path, image, _, digest = archive_of(state)
    record = ArchiveRecord(path.name, path.stat().st_size, image.fixed_nbytes, digest)
    return open_archive(LocalStorage(path.parent), path.name, record)


def test_every_entry_reads_as_zipfile_reads_it(archive):
    with zipfile.ZipFile(archive.location) as content:
        directory = read_directory(archive)
        assert set(directory) == set(content.namelist())
        for name, entry in directory.items():
            data = content.read(name)
            assert entry.nbytes == len(data)
            for start, stop in ((0, len(data)), (len(data) // 3, len(data) // 2), (len(data), len(data))):
                assert read_entry(archive, name, entry, start, stop) == data[start:stop], name


def test_a_header_of_another_entry_is_damage(archive):
    directory = read_directory(archive)
    other = directory["state/model/b/c/0"]
    for entry in (other, DirectoryEntry(other.header_position + 1, 7)):
        with pytest.raises(CheckpointDamagedError, match=r"rank-00000.*is not that of entry 'state/scalar/c'"):
            read_entry(archive, "state/scalar/c", entry, 0, 4)
    with pytest.raises(CheckpointDamagedError, match="the tail has no entry"):
        read_entry(archive, "state/scalar/c", DirectoryEntry(archive.fixed_nbytes, 4), 0, 4)


SIZES = st.integers(0, 2**40) | st.sampled_from([2**32 - 2, 2**32 - 1, 2**32])


@given(st.lists(st.tuples(st.text(max_size=9), SIZES, SIZES), max_size=5))
def test_records_read_as_they_were_written(entries):
    data = b"".join(zipfmt.directory_record(name.encode(), 7, size, header) for name, size, header in entries)
    assert list(zipfmt.parse_directory(data, len(entries))) == entries


@given(st.binary(max_size=200), st.integers(0, 3))
def test_anything_else_is_an_error(data, count):
    if (data, count) != (b"", 0):
        with pytest.raises((ValueError, struct.error)):
            list(zipfmt.parse_directory(data, count))
