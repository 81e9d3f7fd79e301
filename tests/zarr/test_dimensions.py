"""Names of dimensions that are given when a checkpoint is read: what xarray wants."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.core.sync import sync

import ckptengine as ce
import ckptengine.zarr
from ckptengine.zarr import CheckpointStore

WEIGHT = "state/model/weight"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = {"weight": np.arange(24, dtype="f4").reshape(6, 4), "bias": np.arange(6.0), "scale": np.array(2.5)}
    ce.save(tmp_path / "run", {"model": model, "step": 3})
    return tmp_path / "run"


def names_of(group: zarr.Group) -> dict[str, tuple[str | None, ...] | None]:
    return {name: array.metadata.dimension_names for name, array in group["state/model"].arrays()}


def test_arrays_have_no_names_where_none_are_asked_for(run: Path) -> None:
    assert set(names_of(ckptengine.zarr.open(run)).values()) == {None}


def test_automatic_names_are_each_arrays_own(run: Path) -> None:
    group = ckptengine.zarr.open(run, dimension_names="auto")
    assert names_of(group) == {"weight": ("weight_0", "weight_1"), "bias": ("bias_0",), "scale": ()}
    assert (group[WEIGHT][...] == np.arange(24, dtype="f4").reshape(6, 4)).all()
    assert dict(group[WEIGHT].attrs) == dict(ckptengine.zarr.open(run)[WEIGHT].attrs)


def test_given_names_are_taken_and_the_others_are_automatic(run: Path) -> None:
    group = ckptengine.zarr.open(run, dimension_names={WEIGHT: ("out", "in")})
    assert names_of(group) == {"weight": ("out", "in"), "bias": ("bias_0",), "scale": ()}


def test_the_checkpoint_stays_as_it_is(run: Path) -> None:
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ckptengine.zarr.open(run, dimension_names="auto")[WEIGHT][...]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_a_store_in_another_process_and_its_sizes_have_the_names_too(run: Path) -> None:
    store = CheckpointStore(run, dimension_names={WEIGHT: ("out", "in")})
    again = pickle.loads(pickle.dumps(store))
    key = f"{WEIGHT}/zarr.json"
    assert again == store == store.with_read_only(True)
    assert store != CheckpointStore(run)
    document = again.get_sync(key)
    assert document is not None
    assert b'"dimension_names": ["out", "in"]' in document.to_bytes()
    assert sync(store.getsize(key)) == len(document)
    below = sync(store.getsize_prefix(WEIGHT)) - sync(CheckpointStore(run).getsize_prefix(WEIGHT))
    assert below == len(document) - sync(CheckpointStore(run).getsize(key))


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"state/model/wieght": ("a", "b")}, KeyError, "no array 'state/model/wieght'"),
        ({"state/model": ("a", "b")}, KeyError, "no array 'state/model'"),
        ({WEIGHT: ("a",)}, ValueError, r"weight has 2 dimensions \(shape \[6, 4\]\), 1 names are given: a"),
        ({WEIGHT: ("a", "a")}, ValueError, "has a name twice"),
        ({WEIGHT: "ab"}, TypeError, "not a sequence of strings"),
        ("automatic", ValueError, 'give "auto", or a dict'),
    ],
)
def test_names_that_do_not_fit_are_refused_when_the_checkpoint_is_opened(
    run: Path, given: object, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        ckptengine.zarr.open(run, dimension_names=given)  # type: ignore[arg-type]
