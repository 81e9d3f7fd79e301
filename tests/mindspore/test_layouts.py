"""MindSpore's layouts as boxes. They are synthetic: compiling real ones needs several accelerators."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn
from mindspore.parallel._tensor import _load_tensor, _load_tensor_by_layout

import ckptengine as ce
from ckptengine.errors import StateError
from ckptengine.layout.device_matrix import device_matrix_box
from ckptengine.mindspore import sharded_parameters
from ckptengine.mindspore.layout import box_of_layout

ROOT = Path(__file__).parents[2]


def cut(array, box):
    return array[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]


@st.composite
def layouts(draw):
    matrix = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3))
    places = draw(st.permutations(range(len(matrix))))
    tensor_map = [place if draw(st.booleans()) else -1 for place in places]
    sizes = [1 if place == -1 else matrix[len(matrix) - 1 - place] for place in tensor_map]
    return matrix, tensor_map, [size * draw(st.integers(1, 3)) for size in sizes]


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_a_ranks_box_is_the_slice_that_mindspore_itself_cuts(layout):
    matrix, tensor_map, shape = layout
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for rank in range(int(np.prod(matrix))):
        box = device_matrix_box(shape, matrix, tensor_map, rank)
        theirs = _load_tensor(Tensor(array), matrix, tensor_map, shape, rank)
        assert cut(array, box).tolist() == theirs.tolist()
        entry = (matrix, tensor_map, list(box.shape), 0, True, "", shape)
        assert box_of_layout(entry, rank) == (tuple(shape), box)
        if all(place == -1 for place in tensor_map):
            continue
        assert cut(array, box).tolist() == _load_tensor_by_layout(Tensor(array), entry, rank).asnumpy().tolist()


def test_uneven_reshaped_and_impossible_layouts_are_errors_that_name_the_parameter():
    network = nn.Dense(4, 6)
    good = ([2, 2], [1, 0], [3, 2], 0, True, "", [6, 4])
    whole = ([2, 2], [-1, -1], [6, 4], 0, True, "", [6, 4])
    for position, value, text in (
        (4, False, "uneven split"),
        (3, 1, "field size"),
        (2, [2, 3], "reshapes its slice"),
        (1, [1, 2], "names place 2"),
        (6, [7, 4], "can't be split evenly"),
    ):
        layout = [*good[:position], value, *good[position + 1 :]]
        with pytest.raises(StateError, match=rf"weight: .*{text}"):
            sharded_parameters(network, {"weight": layout}, rank=0)
    state = sharded_parameters(network, {"weight": whole}, rank=3)
    assert state["weight"].box.shape == (6, 4)
    assert state["bias"] is network.bias
    with pytest.raises(StateError, match="has 3"):
        box_of_layout([[2], [0], [3]], 0)


def test_the_optimizers_sharding_cuts_the_slice_again():
    layout = ([2, 4], [-1, 0], [4, 3], 0, True, "some-group", [])
    shape, box = box_of_layout(layout, 6, lambda name: (2, 1))
    assert shape == (8, 12)
    assert (box.offset, box.shape) == ((4, 6), (4, 3))


def test_a_checkpoint_of_two_by_four_devices_loads_on_four_by_one(tmp_path):
    def run(what, ranks):
        command = [sys.executable, str(ROOT / "tests/mindspore/layout_job.py"), str(tmp_path), what]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        jobs = [
            subprocess.Popen([*command, str(rank), str(ranks)], env=environment, stderr=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        errors = [job.communicate(timeout=120)[1] for job in jobs]
        assert [job.returncode for job in jobs] == [0] * ranks, "\n".join(errors)

    run("save", 8)
    run("load", 4)
    from tests.mindspore import layout_job

    arrays = ce.load(tmp_path / "checkpoint")
    for name, (shape, *_) in layout_job.LAYOUTS.items():
        assert arrays[name].tobytes() == layout_job.whole(name, shape).tobytes()
