"""zarr's own tests of stores, on a store that is never written to.

Tests that write through the store run with what they would have written committed as a checkpoint instead; those
that want an empty store run on one with what every checkpoint has.
"""

from pathlib import Path
from typing import Any

import keyed_checkpoint
import pytest
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.testing.store import StoreTests
from zarr.testing.utils import assert_bytes_equal

from ckptengine.zarr import CheckpointStore

FIRST = {"zarr.json", "checksums/zarr.json", "checksums/rank-00000/zarr.json", "checksums/rank-00000/c/0"}
"""The keys of a checkpoint that holds nothing."""

REFUSED = "store was opened in read-only mode and does not support writing"


class TestCheckpointStore(StoreTests[CheckpointStore, cpu.Buffer]):
    store_cls = CheckpointStore
    buffer_cls = cpu.Buffer

    @pytest.fixture
    def store_kwargs(self, tmp_path: Path) -> dict[str, Any]:
        keyed_checkpoint.write(tmp_path, {})
        return {"checkpoint": str(tmp_path)}

    async def set(self, store: CheckpointStore, key: str, value: Buffer) -> None:
        """Commit a checkpoint with one more key, and have the store, which stays at its checkpoint, open that one."""
        directory = Path(store.checkpoint.location)
        entries = {name: data for name, data in keyed_checkpoint.read(directory).items() if name not in self.own()}
        if key == "zarr.json" or hasattr(store, "root_was_set"):
            entries["zarr.json"] = keyed_checkpoint.read(directory)["zarr.json"]
        keyed_checkpoint.write(directory, entries | {key: value.to_bytes()})
        was_open = store._is_open
        store.__init__(directory)
        if was_open:
            await store._open()
