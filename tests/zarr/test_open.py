"""The whole checkpoint as one lazy group through our own store."""

import pickle
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from leaves import check, check_all
from zarr.core.sync import sync

import ckptengine as ce
import ckptengine.zarr
from ckptengine.archive.image import BLOCK_NBYTES
from ckptengine.errors import CheckpointDamagedError, CheckpointNotFoundError
from ckptengine.load.choose import newest_checkpoint
from ckptengine.storage.archive_read import ArchiveRead
from ckptengine.storage.local import LocalStorage
from ckptengine.zarr import CheckpointStore

pytestmark = pytest.mark.filterwarnings("error")


class CountingStorage(LocalStorage):
    """Local storage that notes which blocks of which archive have been read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.blocks: set[tuple[str, int]] = set()

    def load_archive(self, name: str, read: ArchiveRead) -> int:
        for start, nbytes in read.ranges.tolist():
            last = -(-(start + nbytes) // read.block_nbytes)
            self.blocks |= {(Path(name).name, number) for number in range(start // read.block_nbytes, last)}
        return super().load_archive(name, read)

    def read_range(self, name: str, position: int, nbytes: int) -> bytes:
        last = -(-(position + nbytes) // BLOCK_NBYTES)
        self.blocks |= {(Path(name).name, number) for number in range(position // BLOCK_NBYTES, last)}
        return super().read_range(name, position, nbytes)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def inside_of(archive: Path, key: str) -> set[tuple[str, int]]:
    """Return the blocks of an archive that lie wholly inside of an entry's data."""
    with zipfile.ZipFile(archive) as content:
        info = content.getinfo(key)
    first = (info.header_offset + 8192) // BLOCK_NBYTES + 1
    return {(archive.name, number) for number in range(first, (info.header_offset + info.file_size) // BLOCK_NBYTES)}


def test_the_whole_checkpoint_is_one_hierarchy(checkpoint: Path) -> None:
    group = ckptengine.zarr.open(checkpoint)
    assert group.read_only
    members = dict(group.members(max_depth=None))
    assert {"objects", "checksums/rank-00002", "ranks/00001/rng", "state/model/pieces/2"} <= set(members)
    assert group["state/model/h.0.bias"].dtype == np.dtype(ml_dtypes.bfloat16)
    check_all(group)


def test_no_chunk_is_read_before_its_array_is_indexed(checkpoint: Path, archives: list[Path]) -> None:
    storage = CountingStorage(checkpoint)
    group = zarr.open_group(CheckpointStore(newest_checkpoint(storage)), mode="r")
    array = dict(group.members(max_depth=None))["state/model/large"]
    chunks = [inside_of(archive, f"state/model/large/c/{2 - rank}/0") for rank, archive in enumerate(archives)]
    assert min(map(len, chunks)) > 20
    assert not storage.blocks & set().union(*chunks)

    row = array[800]
    assert row.shape == (1100,)
    assert storage.blocks >= chunks[0]
    assert not storage.blocks & (chunks[1] | chunks[2])


@pytest.mark.parametrize("key", ["state/model/large/c/1/0", "state/items/#0/c/0", "state/model/fragments/1/c/0/0"])
def test_a_flipped_byte_is_named(copy: Path, key: str) -> None:
    (archive,) = copy.glob("data-*/rank-00001.zarr.zip")
    with zipfile.ZipFile(archive) as content:
        info = content.getinfo(key)
        data = content.read(key)
    position = archive.read_bytes().index(data, info.header_offset) + len(data) // 2
    with archive.open("r+b") as file:
        file.seek(position)
        file.write(bytes([archive.read_bytes()[position] ^ 1]))
    group = ckptengine.zarr.open(copy)
    with pytest.raises(CheckpointDamagedError, match="rank-00001") as raised:
        group[key.split("/c/")[0]][...]
    assert str(archive) in str(raised.value)


def test_a_damaged_tail_is_named(copy: Path) -> None:
    (archive,) = copy.glob("data-*/rank-00002.zarr.zip")
    content = bytearray(archive.read_bytes())
    content[-100] ^= 1
    archive.write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match=r"rank-00002.*tail"):
        ckptengine.zarr.open(copy)


def test_a_missing_checkpoint_and_a_missing_archive_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        ckptengine.zarr.open(tmp_path / "nothing")
    (archive,) = copy.glob("data-*/rank-00000.zarr.zip")
    archive.unlink()
    with pytest.raises(CheckpointDamagedError, match=r"rank-00000.* is missing"):
        ckptengine.zarr.open(copy)


def test_a_run_opens_at_its_newest_step_and_a_step_by_its_directory(tmp_path: Path) -> None:
    with ce.Checkpointer(str(tmp_path / "run"), every=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": np.full(3, step)})
    assert ckptengine.zarr.open(tmp_path / "run")["state/w"][0] == 2
    assert ckptengine.zarr.open(tmp_path / "run" / "step-00000001")["state/w"][0] == 1


def test_an_open_store_stays_at_its_checkpoint_and_so_do_its_copies(tmp_path: Path) -> None:
    with ce.Checkpointer(str(tmp_path / "run"), every=1) as checkpointer:
        checkpointer.save(1, {"w": np.full(3, 1)}).durable.result()
        store = CheckpointStore(tmp_path / "run")
        checkpointer.save(2, {"w": np.full(3, 2)})
    for copied in (store, pickle.loads(pickle.dumps(store)), store.with_read_only(True)):
        assert copied == store
        assert zarr.open_group(copied, mode="r")["state/w"][0] == 1
    newer = CheckpointStore(tmp_path / "run")
    assert newer != store
    assert len({newer, store}) == 2


def test_leaves_may_be_called_like_padding(tmp_path: Path) -> None:
    names = ("padding-mask", "checksums", "padding-fixed", "padding-tail")
    ce.save(tmp_path / "one", {name: np.arange(number + 1) for number, name in enumerate(names)})
    group = ckptengine.zarr.open(tmp_path / "one")
    for number, name in enumerate(names):
        check(group[f"state/{name}"][...], np.arange(number + 1), name)
    assert sync(all_keys(CheckpointStore(tmp_path / "one"))).isdisjoint(
        {"checksums/rank-00000/padding-fixed", "checksums/rank-00000/padding-tail"}
    )


def test_the_bytes_of_an_array_are_its_own(tmp_path: Path) -> None:
    ce.save(tmp_path / "one", {"h.1": np.zeros(8, "u1"), "h.10": np.zeros(80, "u1")})
    array = ckptengine.zarr.open(tmp_path / "one")["state/h.1"]
    metadata = sync(array.store_path.store.getsize("state/h.1/zarr.json"))
    assert array.nbytes_stored() == 8 + metadata


async def all_keys(store: CheckpointStore) -> set[str]:
    return {key async for key in store.list()}


def test_writing_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="never changed in place"):
        CheckpointStore(checkpoint, read_only=False)
    group = ckptengine.zarr.open(checkpoint)
    with pytest.raises(ValueError, match="read-only"):
        group["state/model/h.0.weight"][0] = 1


def test_a_leaf_called_like_the_metadata_of_nodes_is_unzipped_listed_and_read(tmp_path: Path) -> None:
    arrays = {"zarr.json": np.arange(3), "b": {"Zarr.JSON": np.arange(4), "x": np.arange(5)}}
    ce.save(tmp_path / "a", arrays)
    (archive,) = (tmp_path / "a").glob("data-*/rank-00000.zarr.zip")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "unzipped")
    for group in (ckptengine.zarr.open(tmp_path / "a"), zarr.open_group(tmp_path / "unzipped", mode="r")):
        assert sorted(name for name, _ in group["state"].members()) == ["%7Aarr.json", "b"]
        assert group["state/%7Aarr.json"][:].tolist() == [0, 1, 2]
        assert group["state/b/%5Aarr.JSON"][:].tolist() == [0, 1, 2, 3]
    loaded = ce.load(tmp_path / "a")
    assert loaded["zarr.json"].tolist() == [0, 1, 2]
    assert loaded["b"]["Zarr.JSON"].tolist() == [0, 1, 2, 3]


def test_a_leaf_that_an_earlier_version_called_so_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("ckptengine.archive.names._METADATA", "\0")
        ce.save(tmp_path / "a", {"zarr.json": np.arange(3)})
    (archive,) = (tmp_path / "a").glob("data-*/rank-00000.zarr.zip")
    assert "state/zarr.json/c/0" in zipfile.ZipFile(archive).namelist()
    assert ce.load(tmp_path / "a")["zarr.json"].tolist() == [0, 1, 2]
