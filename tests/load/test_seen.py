"""Watched memory tells writes that no framework counts, in whatever way it lies."""

import numpy as np
import pytest

from ckptengine.load.seen import Watch
from ckptengine.state.extents import extents
from ckptengine.state.tree import flatten

BASE = np.arange(4096, dtype=np.float32)


def arrays():
    base = BASE.copy()
    return {
        "flat": np.arange(1000.0),
        "few": np.arange(3, dtype=np.int8),
        "one": np.array(1.0),
        "columns": base.reshape(64, 64)[:, 3:40:2],
        "turned": np.arange(600, dtype=np.int16).reshape(20, 30).T,
        "backwards": np.arange(500)[::-1],
        "halves": np.arange(64, dtype=np.float16),
        "complex": np.ones(40, np.complex128),
    }


@pytest.mark.parametrize("name", list(arrays()))
@pytest.mark.parametrize("whole", [True, False])
def test_a_write_is_seen_in_the_array_that_it_went_to_alone(name, whole):
    state = arrays()
    leaves = flatten(state).arrays
    numbers = range(len(leaves)) if whole else ()
    watch = Watch(leaves, [extents(leaf) for leaf in leaves], numbers)
    assert watch.unchanged().all()
    state[name][...] += 7
    assert [leaf.path[0] for leaf, same in zip(leaves, watch.unchanged(), strict=True) if not same] == [name]


def test_writes_between_the_elements_of_an_array_are_none_of_its_own():
    base = np.zeros((64, 64))
    leaves = flatten({"columns": base[:, ::2]}).arrays
    watch = Watch(leaves, [extents(leaf) for leaf in leaves], ())
    base[:, 1::2] = 5
    assert watch.unchanged().all()


def test_nothing_to_watch_is_unchanged():
    leaves = flatten({"empty": np.zeros((0, 3))}).arrays
    assert Watch(leaves, [()], ()).unchanged().tolist() == [True]
    assert Watch((), (), ()).unchanged().tolist() == []
