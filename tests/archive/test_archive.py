import shutil
import subprocess
import zipfile
import zlib

import numpy as np
import pytest

from ckptengine.archive.image import ALIGNMENT, BLOCK_NBYTES, LARGE_NBYTES
from ckptengine.archive.reader import open_archive
from ckptengine.archive.record import ArchiveRecord
from ckptengine.archive.zip import local_header, parse_local_header, walk_entries
from ckptengine.errors import CheckpointDamagedError
from ckptengine.storage.open import open_storage


def test_an_archive_is_a_zip_whose_crcs_hold(archive_of, state):
    path, *_ = archive_of(state)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        stored = np.frombuffer(archive.read("state/model/w/c/0/0"))
        assert stored.tobytes() == state["model"]["w"].tobytes()
        assert np.frombuffer(archive.read("state/scalar/c"), "f4") == 4.0


@pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
def test_unzip_takes_an_archive_without_complaint(archive_of, state):
    path, *_ = archive_of(state)
    done = subprocess.run(["unzip", "-tq", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_large_chunks_are_aligned_and_the_file_too(archive_of, state):
    path, image, *_ = archive_of(state)
    large = [chunk for chunk in image.chunks if chunk.nbytes >= LARGE_NBYTES]
    assert large
    assert all(chunk.position % ALIGNMENT == 0 for chunk in large)
    assert path.stat().st_size % ALIGNMENT == 0
    assert image.fixed_nbytes % ALIGNMENT == 0


def test_block_checksums_are_zlibs_of_the_file(archive_of, state):
    path, image, checksums, _ = archive_of(state)
    fixed = path.read_bytes()[: image.fixed_nbytes]
    expected = [zlib.crc32(fixed[start : start + BLOCK_NBYTES]) for start in range(0, len(fixed), BLOCK_NBYTES)]
    assert checksums.blocks.tolist() == expected


@pytest.mark.parametrize("where", ["tail", "length", "missing"])
def test_a_damaged_archive_is_refused_by_name(archive_of, state, where):
    path, image, _, digest = archive_of(state)
    size = path.stat().st_size
    data = bytearray(path.read_bytes())
    if where == "tail":
        data[image.fixed_nbytes + 100] ^= 1
    if where == "length":
        data += bytes(4096)
    path.write_bytes(data)
    if where == "missing":
        path.unlink()
    record = ArchiveRecord(image.name, size, image.fixed_nbytes, digest)
    with pytest.raises(CheckpointDamagedError, match="rank-00000"):
        open_archive(open_storage(path.parent), image.name, record)


def test_a_flipped_byte_in_a_range_is_named(archive_of, state):
    path, image, _, digest = archive_of(state)
    record = ArchiveRecord(image.name, path.stat().st_size, image.fixed_nbytes, digest)
    data = bytearray(path.read_bytes())
    data[BLOCK_NBYTES * 3 + 5] ^= 0x40
    path.write_bytes(data)
    archive = open_archive(open_storage(path.parent), image.name, record)
    assert archive.read(0, 100) == bytes(data[:100])
    with pytest.raises(CheckpointDamagedError, match=f"bytes {BLOCK_NBYTES * 3} to"):
        archive.read(BLOCK_NBYTES * 2, BLOCK_NBYTES * 2)


def test_headers_that_lead_out_of_the_file_are_refused():
    entry = local_header(b"name", 50) + bytes(50)
    with pytest.raises(CheckpointDamagedError, match="leads out"):
        parse_local_header(entry, 0, "file")
    with pytest.raises(CheckpointDamagedError, match="unreadable"):
        parse_local_header(b"PK\x03\x04" + bytes(10), 0, "file")
    assert walk_entries(b"", "file") == {}
