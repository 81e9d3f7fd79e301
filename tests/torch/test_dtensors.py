from __future__ import annotations

import ast
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from ckptengine.torch.dtensor import Run, Split, _left_to_right, local_runs

HERE = pathlib.Path(__file__).parent
WORKER = HERE / "dtensor_worker.py"


def case_names() -> list[str]:
    tree = ast.parse(WORKER.read_text())
    nodes = [*tree.body, *ast.parse((HERE / "dtensor_optimizers.py").read_text()).body]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.decorator_list]
    layouts = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "plain_layouts")
    (returned,) = (node.value for node in layouts.body if isinstance(node, ast.Return))
    assert isinstance(returned, ast.Dict)
    names = [f"layout_{key.value}" for key in returned.keys if isinstance(key, ast.Constant)]
    return names + [function.name for function in functions]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Run all cases in one launch of four ranks."""
    out = tmp_path_factory.mktemp("ranks")
    root = HERE.parent.parent
    paths = [str(root), str(HERE.parent / "state"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = run_ranks(4, WORKER, out, env={"PYTHONPATH": os.pathsep.join(paths)})
    assert done.returncode == 0, done.stdout[-4000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("name", case_names())
def test_four_ranks_agree(name: str, results: list[dict[str, str]]) -> None:
    failures = {rank: result[name] for rank, result in enumerate(results) if result[name] != "ok"}
    assert not failures, next(iter(failures.values()))


def elements(runs: list[Run] | None) -> list[int]:
    assert runs is not None
    return [index for start, length in runs for index in range(start, start + length)]


SPLITS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=3)


@given(st.integers(0, 40), SPLITS, st.data())
@settings(max_examples=200, deadline=None)
def test_runs_from_left_to_right_are_torchs_own_split(
    length: int, sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    splits = [Split(size, data.draw(st.integers(0, size - 1)), factor) for size, factor in sizes]
    expected = torch.arange(length)
    for split in splits:
        placement = Shard(0) if split.factor == 1 else _StridedShard(0, split_factor=split.factor)
        parts, _ = placement._split_tensor(expected, split.size, with_padding=False)
        expected = parts[split.coordinate]
    runs = _left_to_right(length, splits)
    assert elements(runs) == expected.tolist()
    assert all(sum(a) < b[0] or sum(a) > b[0] for a, b in itertools.pairwise(runs))


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_fully_shard_over_tensor_parallel_covers_every_row_once(
    rows: int, data_parallel: int, tensor_parallel: int
) -> None:
    """The sizes are what `fully_shard` makes: it divides each tensor-parallel part again."""
    seen = []
    for tp in range(tensor_parallel):
        outer = (
            torch.arange(rows).tensor_split(tensor_parallel) if rows == 0 else torch.arange(rows).chunk(tensor_parallel)
        )
        part = outer[tp] if tp < len(outer) else torch.arange(0)
        for dp in range(data_parallel):
            inner = part.chunk(data_parallel) if len(part) else ()
            local = inner[dp] if dp < len(inner) else torch.arange(0)
            splits = [Split(data_parallel, dp, tensor_parallel), Split(tensor_parallel, tp, 1)]
            assert elements(local_runs(rows, splits, len(local))) == local.tolist()
            seen += local.tolist()
    assert seen == list(range(rows))


def test_a_local_size_that_fits_no_reading_is_told() -> None:
    assert local_runs(10, [Split(2, 0, 1)], 4) is None
    assert local_runs(10, [Split(2, 0, 2), Split(2, 0, 1)], 4) is None
    assert local_runs(10, [Split(2, 0, 5)], 4) is None
    assert local_runs(0, [Split(2, 0, 3)], 0) == []
    assert local_runs(10, [], 10) == [(0, 10)]


def test_fully_shard_of_seven_rows_on_three_by_two_ranks_is_read_as_it_is_laid_out() -> None:
    """The last rank has row 6, which torch's own reading of the placements gives to the rank before."""
    code = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from ckptengine.state.tree import flatten
dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=6)
mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
model = torch.nn.Sequential(torch.nn.Linear(4, 7, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
fully_shard(model, mesh=mesh["dp"])
(leaf,) = flatten({"model": model}).arrays
assert [(part.box.offset, part.box.shape) for part in leaf.parts] == [((6, 0), (1, 4))], leaf
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
