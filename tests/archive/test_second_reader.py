"""The reader that was written from docs/format.md, held against the real one."""

import ast
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import second_reader
import three_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

import ckptengine as ce
from ckptengine.state.values import encode

SOURCE = Path(second_reader.__file__)


def agrees(path: Path) -> None:
    """Assert that both readers find the same arrays, bit for bit, and the same values in a checkpoint."""
    arrays, values = second_reader.read(str(path))
    real = ce.load(path)
    shared = {key[1:]: array for key, array in arrays.items() if key[0] is None}
    for key, array in shared.items():
        expected = at(real, key)
        assert (array.shape, array.dtype.itemsize) == (expected.shape, expected.dtype.itemsize), key
        assert array.dtype == expected.dtype or expected.dtype.kind == "V" or expected.dtype.isbuiltin != 1, key
        assert array.tobytes() == expected.tobytes(), key
    for key, value in values.items():
        if key[0] is None:
            assert encode(at(real, key[1:]), key[1:]) == value
    assert len(shared) == count(real)


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def count(tree: Any) -> int:
    """Return how many arrays a tree holds."""
    if isinstance(tree, np.ndarray):
        return 1
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(map(count, items))


def test_it_reads_a_checkpoint_of_three_ranks_as_ours_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = three_ranks.checkpoint(tmp_path_factory)
    agrees(path)
    arrays, values = second_reader.read(str(path))
    for rank in range(three_ranks.RANKS):
        assert arrays[rank, "rng"].tobytes() == three_ranks.own(rank).tobytes()
        assert values[rank, "position", "line"] == 100 * rank
    assert arrays[None, "model", "tied"] is arrays[None, "model", "h.0.bias"]


def test_it_takes_the_newest_checkpoint_of_a_run_after_going_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ce.Checkpointer(str(run), every=1) as checkpointer:
        for step in (9, 10):
            checkpointer.save(step, {"w": np.full(3, step)})
    with ce.Checkpointer(str(run), every=1) as checkpointer:
        checkpointer.restore({"w": np.zeros(3, int)}, step=9)
        checkpointer.save(9, {"w": np.full(3, 99)})
    agrees(run)
    assert second_reader.read(str(run))[0][None, "w"].tolist() == [99, 99, 99]


DTYPES = st.one_of(
    arrays_of.boolean_dtypes(),
    arrays_of.integer_dtypes(endianness="="),
    arrays_of.unsigned_integer_dtypes(endianness="="),
    arrays_of.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
    arrays_of.complex_number_dtypes(endianness="=", sizes=(64, 128)),
    st.sampled_from([np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e5m2)]),
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(DTYPES)
    shape = draw(arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=nbytes, max_size=nbytes)), np.uint8)
    return (raw % 2 if dtype.kind == "b" else raw).view(dtype).reshape(shape)


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers())
KEYS = st.one_of(st.text(max_size=4), st.sampled_from(["__a", "..", "a/b", "#1", "%", "ranks", "c", "zarr.json"]))
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        arrays() | PLAIN,
        lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(state=STATES)
def test_it_reads_any_state_of_one_process_as_ours_does(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        ce.save(Path(directory) / "checkpoint", state)
        agrees(Path(directory) / "checkpoint")


def test_it_has_at_most_100_lines_and_only_the_imports_that_it_says() -> None:
    text = SOURCE.read_text()
    assert len(text.splitlines()) <= 100
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert names == {"json", "re", "zipfile", "pathlib", "numpy"}
