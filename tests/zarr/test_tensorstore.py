"""Checkpoints read by TensorStore, with none of our code on the way."""

from pathlib import Path

import numpy as np
import pytest
import three_ranks
from buckets import Bucket
from leaves import check

import ckptengine as ce
from ckptengine.errors import CheckpointNotFoundError
from ckptengine.zarr import open_tensorstore, tensorstore_spec

ts = pytest.importorskip("tensorstore")


@pytest.mark.parametrize("node", three_ranks.shared())
def test_it_reads_each_leaf_over_all_archives(checkpoint: Path, node: str) -> None:
    array = ts.open(tensorstore_spec(checkpoint, node), read=True).result()
    expected = three_ranks.shared()[node]
    assert array.domain.origin == (0,) * expected.ndim
    check(array.read().result(), expected, node)


def test_it_reads_what_each_rank_has_of_its_own(checkpoint: Path) -> None:
    for rank in range(three_ranks.RANKS):
        array = ts.open(tensorstore_spec(checkpoint, f"ranks/{rank:05d}/rng"), read=True).result()
        check(array.read().result(), three_ranks.own(rank), str(rank))


def test_it_reads_parts_across_chunks_and_fragments(checkpoint: Path) -> None:
    for node in ("state/model/h.0.columns", "state/model/pieces", "state/model/large"):
        array = ts.open(tensorstore_spec(checkpoint, node), read=True).result()
        expected = np.ascontiguousarray(three_ranks.shared()[node][3:5, 2:7])
        check(array[3:5, 2:7].read().result(), expected, node)


def test_it_opens_a_single_archive_by_its_zip_driver(archives: list[Path]) -> None:
    weight = three_ranks.shared()["state/model/h.0.weight"]
    for rank, archive in enumerate(archives):
        for node, expected in (
            (f"ranks/{rank:05d}/rng", three_ranks.own(rank)),
            (f"state/model/fragments/{rank}", three_ranks.shared()["state/model/fragments"][three_ranks.BOXES[rank]]),
        ):
            kvstore = {"driver": "zip", "base": f"file://{archive}", "path": f"{node}/"}
            array = ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
            check(array.read().result(), np.ascontiguousarray(expected), node)
        kvstore = {"driver": "zip", "base": f"file://{archive}", "path": "state/model/h.0.weight/"}
        array = ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        rows = slice(4 * rank, min(4 * rank + 4, 10))
        check(array[rows].read().result(), weight[rows], "rows")


def test_names_that_only_begin_alike_are_not_mixed_up(tmp_path: Path) -> None:
    arrays = {"a": np.arange(3), "a/c": np.arange(4), "ac": np.arange(5), "c": {"c": np.arange(6)}}
    ce.save(tmp_path / "odd #1%20", arrays)
    for node, expected in (("a", arrays["a"]), ("a%2Fc", arrays["a/c"]), ("ac", arrays["ac"]), ("c/c", np.arange(6))):
        array = ts.open(tensorstore_spec(tmp_path / "odd #1%20", f"state/{node}"), read=True).result()
        check(array.read().result(), expected, node)


def test_what_is_no_leaf_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"there is no leaf 'state/model/h.1.bias'"):
        tensorstore_spec(checkpoint, "state/model/h.1.bias")
    with pytest.raises(KeyError, match=r"'state/items' is a group of leaves.*state/items/#0"):
        tensorstore_spec(checkpoint, "state/items")
    with pytest.raises(KeyError, match="'objects' is a group"):
        tensorstore_spec(checkpoint, "objects")
    with pytest.raises(CheckpointNotFoundError):
        tensorstore_spec(tmp_path, "state/a")


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("node", ["state/model/h.0.weight", "state/model/fragments", "state/scalar"])
def test_an_assignment_never_reaches_an_archive(checkpoint: Path, node: str) -> None:
    before = files(checkpoint)
    spec = tensorstore_spec(checkpoint, node)
    for array in (open_tensorstore(checkpoint, node), ts.open(spec).result(), ts.open(spec, open=True).result()):
        assert (array.readable, array.writable) == (True, False)
        with pytest.raises(ValueError, match="not support writing"):
            array[...] = 0
    with pytest.raises(ValueError, match="only reading is supported"):
        ts.open(spec, read=True, write=True).result()
    assert files(checkpoint) == before
    check(open_tensorstore(checkpoint, node).read().result(), three_ranks.shared()[node], node)


def test_stores_that_tensorstore_can_not_read_are_refused() -> None:
    ce.save("memory://tensorstore/a", {"w": np.arange(3)})
    with pytest.raises(ValueError, match=r"memory://tensorstore/a/.*no driver for memory://"):
        tensorstore_spec("memory://tensorstore/a", "state/w")


def test_a_checkpoint_in_a_bucket_is_read_by_the_s3_driver(in_environment: Bucket) -> None:
    weight = np.arange(6, dtype="f4").reshape(2, 3)
    url = f"{in_environment.url}/final"
    ce.save(url, {"w": weight})
    array = open_tensorstore(url, "state/w")
    assert "s3" in str(array.spec().to_json())
    check(array.read().result(), weight, "w")
