import ctypes
import hashlib
import time

import numpy as np
import pytest

from ckptengine.archive.image import plan_image
from ckptengine.archive.names import archive_name
from ckptengine.archive.tail import build_tail
from ckptengine.layout.assign import assign
from ckptengine.layout.holdings import holdings_of
from ckptengine.layout.survey import by_path, survey_of, table_of
from ckptengine.save.values import stored_values
from ckptengine.snapshot.feed import Feed
from ckptengine.snapshot.pack import Checksums, CopyTable
from ckptengine.snapshot.snapshotter import Snapshotter
from ckptengine.state.tree import flatten


@pytest.fixture
def archive_of(tmp_path):
    """A function that writes a state's archive of a single rank; returns its path, plan and the tail's SHA-256."""

    def build(state):
        flat = flatten(state)
        held = by_path(holdings_of(flat.arrays), 0)
        survey = survey_of([table_of(held, 0, 1)], np.zeros(1, np.int64))
        assigned = assign(survey, {}, 0, held)
        image = plan_image(archive_name(0), 0, assigned)
        numbers = {leaf.path: number for number, leaf in enumerate(flat.arrays)}
        table = CopyTable(image, flat.arrays, [numbers[item.path] for item in assigned], overlap=False)
        snapshotter, checksums, feed = Snapshotter(), Checksums(image), Feed[None](time.monotonic() + 60)
        assert snapshotter.reserve(image, 60)
        snapshotter.fill(table, checksums, 60.0)
        snapshotter.complete(table, checksums, feed)
        feed.finish(None)
        fixed = b"".join(ctypes.string_at(window.address, window.end - window.begin) for window in feed)
        tail = build_tail(image, stored_values(flat).entries(0), checksums.entries, checksums.blocks)
        path = tmp_path / image.name
        path.write_bytes(fixed + tail)
        snapshotter.close(60.0)
        return path, image, checksums, hashlib.sha256(tail).hexdigest()

    return build


@pytest.fixture
def state():
    rng = np.random.default_rng(5)
    return {
        "model": {
            "w": rng.standard_normal((600, 700)),
            "b": rng.standard_normal(7).astype("f4"),
            "none": np.zeros((0, 3)),
        },
        "scalar": np.array(4.0, "f4"),
        "strided": rng.integers(0, 99, (40, 30))[::2, ::-3],
        "step": 17,
        "odd/key": np.arange(3, dtype=np.uint8),
    }
