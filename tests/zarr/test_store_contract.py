"""zarr's own tests of stores, on a store that is never written to.

Tests that write through the store run with what they would have written committed as a checkpoint instead; those
that want an empty store run on one with what every checkpoint has.
"""

from functools import partial
from pathlib import Path
from typing import Any

import keyed_checkpoint
import pytest
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.core.sync import _collect_aiterator
from zarr.testing.store import StoreTests

from ckptengine.zarr import CheckpointStore

FIRST = {"zarr.json", "checksums/zarr.json", "checksums/rank-00000/zarr.json", "checksums/rank-00000/c/0"}
"""The keys of a checkpoint that holds nothing."""

REFUSED = "store was opened in read-only mode and does not support writing"


class TestCheckpointStore(StoreTests[CheckpointStore, cpu.Buffer]):
    store_cls = CheckpointStore
    buffer_cls = cpu.Buffer

    @pytest.fixture
    def store_kwargs(self, tmp_path: Path) -> dict[str, Any]:
        self.kept: dict[str, bytes] = {}
        keyed_checkpoint.write(tmp_path, self.kept)
        return {"checkpoint": str(tmp_path)}

    async def set(self, store: CheckpointStore, key: str, value: Buffer) -> None:
        """Commit a checkpoint with one more key, and open it: a store stays at the checkpoint that it has opened."""
        self.kept[key] = value.to_bytes()
        directory, was_open = Path(store.checkpoint.location), store._is_open
        keyed_checkpoint.write(directory, self.kept)
        store.__init__(directory)
        if was_open:
            await store._open()

    async def get(self, store: CheckpointStore, key: str) -> Buffer:
        return self.buffer_cls.from_bytes(keyed_checkpoint.read(Path(store.checkpoint.location))[key])

    def committing(self, store: CheckpointStore) -> CheckpointStore:
        """Return a store whose `set` commits a checkpoint, so that a test that writes can be run as it is."""
        store.set = partial(self.set, store)
        return store

    def test_store_repr(self, store: CheckpointStore, tmp_path: Path) -> None:
        assert repr(store) == f"CheckpointStore({str(tmp_path)!r})"
        assert str(store) == str(tmp_path)

    def test_store_supports_writes(self, store: CheckpointStore) -> None:
        assert not store.supports_writes
        assert not store.supports_deletes

    def test_store_supports_listing(self, store: CheckpointStore) -> None:
        assert store.supports_listing

    # Written through the store: committed instead, the test is zarr's.

    async def test_serializable_store(self, store: CheckpointStore) -> None:
        await super().test_serializable_store(self.committing(store))

    async def test_getsize_prefix(self, store: CheckpointStore) -> None:
        await super().test_getsize_prefix(self.committing(store))

    async def test_exists(self, store: CheckpointStore) -> None:
        await super().test_exists(self.committing(store))

    # A store of this kind is read-only, whatever is asked for.

    def test_store_read_only(self, store: CheckpointStore) -> None:
        assert store.read_only
        with pytest.raises(AttributeError):
            store.read_only = False

    @pytest.mark.parametrize("read_only", [True, False])
    async def test_store_open_read_only(self, open_kwargs: dict[str, Any], read_only: bool) -> None:
        if read_only:
            await super().test_store_open_read_only(open_kwargs, read_only)
        else:
            with pytest.raises(ValueError, match="never changed in place"):
                await self.store_cls.open(**open_kwargs, read_only=False)

    @pytest.mark.parametrize("key", ["zarr.json", "c/0"])
    async def test_set(self, store: CheckpointStore, key: str) -> None:
        with pytest.raises(ValueError, match=REFUSED):
            await store.set(key, self.buffer_cls.from_bytes(b"1"))

    async def test_set_not_open(self, store_not_open: CheckpointStore) -> None:
        await self.test_set(store_not_open, "c/0")

    async def test_set_many(self, store: CheckpointStore) -> None:
        with pytest.raises(ValueError, match=REFUSED):
            await store._set_many([("c/0", self.buffer_cls.from_bytes(b"1"))])

    async def test_set_if_not_exists(self, store: CheckpointStore) -> None:
        old, new = self.buffer_cls.from_bytes(b"0000"), self.buffer_cls.from_bytes(b"1111")
        await self.set(store, "k", old)
        await store.set_if_not_exists("k", new)
        assert await store.get("k", default_buffer_prototype()) == old
        with pytest.raises(ValueError, match=REFUSED):
            await store.set_if_not_exists("k2", new)

    async def test_clear(self, store: CheckpointStore) -> None:
        with pytest.raises(NotImplementedError):
            await store.clear()

    # No checkpoint is empty: what is listed is compared with what there was before.

    async def test_is_empty(self, store: CheckpointStore) -> None:
        assert not await store.is_empty("")
        assert await store.is_empty("foo")
        await self.set(store, "foo/bar", self.buffer_cls.from_bytes(b"something"))
        assert await store.is_empty("fo")
        assert not await store.is_empty("foo/")
        assert not await store.is_empty("foo")
        assert await store.is_empty("spam/")

    @pytest.mark.parametrize("prefix", ["", "a/", "a/b/", "a/b/c/", "foo/bar/", "fo", "foo/bar/c/1", "x"])
    async def test_list_prefix(self, store: CheckpointStore, prefix: str) -> None:
        assert sorted(await _collect_aiterator(store.list())) == sorted(FIRST)
        keys = {"a/zarr.json", "a/b/zarr.json", "a/b/c/zarr.json", "foo/bar/c/1", "foo/bar/zarr.json", "foo/baz/c/0"}
        for key in keys:
            await self.set(store, key, self.buffer_cls.from_bytes(b""))
        assert sorted(await _collect_aiterator(store.list())) == sorted(FIRST | keys)
        expected = sorted(key for key in FIRST | keys if key.startswith(prefix))
        assert sorted(await _collect_aiterator(store.list_prefix(prefix))) == expected

    async def test_list(self, store: CheckpointStore) -> None:
        await self.test_list_prefix(store, "foo/")

    async def test_list_empty_path(self, store: CheckpointStore) -> None:
        await self.test_list_prefix(store, "")

    async def test_list_dir(self, store: CheckpointStore) -> None:
        assert sorted(await _collect_aiterator(store.list_dir(""))) == ["checksums", "zarr.json"]
        assert await _collect_aiterator(store.list_dir("foo")) == ()
        for key in ("foo/zarr.json", "foo/c/1", "foo/bar/first", "foo/bar/second/zarr.json"):
            await self.set(store, key, self.buffer_cls.from_bytes(b"1"))
        for root, expected in {"foo": ["bar", "c", "zarr.json"], "foo/bar": ["first", "second"], "fo": []}.items():
            assert sorted(await _collect_aiterator(store.list_dir(root))) == expected
            assert sorted(await _collect_aiterator(store.list_dir(f"{root}/"))) == expected
        assert sorted(await _collect_aiterator(store.list_dir(""))) == ["checksums", "foo", "zarr.json"]
