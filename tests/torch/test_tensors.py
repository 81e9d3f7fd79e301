from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed._shard.sharded_tensor
from state_memory import load, read_part, save
from torch.distributed._shard.sharded_tensor import ShardedTensor

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, LoadMismatchError, StateError
from ckptengine.schema.dtypes import DTYPES
from ckptengine.schema.leaf import ArrayLeaf, DeviceMemory, HostMemory, Placement
from ckptengine.state.per_rank import PerRank
from ckptengine.state.sharded import ShardedArray
from ckptengine.state.tree import flatten
from ckptengine.state.values import decode, encode
from ckptengine.torch.adapter import TorchAdapter

SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def only_leaf(value: Any) -> ArrayLeaf:
    (leaf,) = flatten({"x": value}).arrays
    return leaf


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 2)])
def test_every_dtype_comes_back_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    dtype = getattr(torch, name)
    tensor = random_bits(dtype, shape)
    target = random_bits(dtype, shape)
    assert load(save({"x": tensor}), {"x": target}).complete
    assert raw(target) == raw(tensor)
    assert only_leaf(tensor).dtype == name


@pytest.mark.parametrize(
    "make",
    [
        lambda base: base.t(),
        lambda base: base[1:, ::2],
        lambda base: base.flatten()[3:],
        lambda base: base.unfold(0, 2, 2),
        lambda base: base[:0],
        lambda base: base[2, 3],
    ],
)
def test_views_are_seen_where_they_lie_and_filled_there(make: Any) -> None:
    base, other = torch.arange(24.0).reshape(4, 6), torch.zeros(4, 6)
    view, target = make(base), make(other)
    stored = save({"x": view})
    load(stored, {"x": target})
    assert torch.equal(target, view)
    assert other.sum() == view.sum()


def test_the_extent_is_the_whole_storage() -> None:
    base = torch.arange(24, dtype=torch.int16).reshape(4, 6)
    (part,) = only_leaf(base[1:, 2:]).parts
    memory = part.memory
    assert isinstance(memory, HostMemory)
    assert (memory.low, memory.nbytes) == (base.data_ptr(), 48)
    assert memory.address == base.data_ptr() + 16
    assert memory.strides == (12, 2)


def test_lazily_conjugated_and_negated_views_are_stored_resolved_and_filled() -> None:
    base = torch.tensor([1 + 2j, 3 - 4j, complex(math.nan, -0.0)])
    for make in (
        lambda base: base.conj(),
        lambda base: base.conj().imag,
        lambda base: base.to(torch.complex32).conj(),
        lambda base: base[::2].conj(),
    ):
        view, target = make(base), make(torch.zeros(3, dtype=torch.complex64))
        assert view.is_conj() or view.is_neg()
        leaf = only_leaf(view)
        expected = view.resolve_conj().resolve_neg()
        assert read_part(leaf.parts[0], leaf.dtype).tobytes() == raw(expected)
        assert load(save({"x": view}), {"x": target}).complete
        assert raw(target.resolve_conj().resolve_neg()) == raw(expected)


def test_expanded_tensors_are_filled_with_what_they_repeat() -> None:
    base = torch.tensor([[1.0], [math.nan], [3.0]])
    stored = save({"x": base.expand(2, 3, 4)})
    assert stored.arrays[("x",), None].shape == (2, 3, 4)
    memory = torch.zeros(3, 1)
    assert load(stored, {"x": memory.expand(2, 3, 4)}).complete
    assert raw(memory) == raw(base)
    with pytest.raises(LoadMismatchError, match="x: the tensor repeats its elements .* put a clone"):
        load(save({"x": torch.arange(24.0).reshape(2, 3, 4)}), {"x": memory.expand(2, 3, 4)})


def test_views_of_overlapping_windows_are_refused_when_they_are_saved() -> None:
    for view in (torch.arange(6.0).unfold(0, 3, 1), torch.arange(6.0).unfold(0, 3, 1).expand(2, 4, 3)):
        with pytest.raises(StateError, match="x: elements of the tensor share memory .* put a clone"):
            flatten({"x": view})


def test_other_devices_go_through_copies() -> None:
    """A mock of a device: the copies are torch's own, the memory is the CPU's."""
    from ckptengine.torch import tensor as module

    for dtype in (torch.bool, torch.bfloat16, torch.float32, torch.complex128, torch.float8_e4m3fn):
        source = random_bits(dtype, (4, 6))[:, ::2]
        target = torch.zeros(4, 6, dtype=dtype)[:, ::2]
        host = np.empty((6, 4), DTYPES[str(dtype).removeprefix("torch.")].numpy)[::2].T
        module._copied(source, source, ()).copy_to_host(host[:, :])
        memory = module._copied(target, target, ())
        assert isinstance(memory, DeviceMemory)
        memory.copy_from_host(host)
        assert raw(target) == raw(source)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(2).to_sparse(), "x: tensor with layout torch.sparse_coo"),
        (lambda: torch.eye(2).to_sparse_csr(), "x: tensor with layout torch.sparse_csr"),
        (lambda: torch.empty(2, device="meta"), "x: tensor on the meta device"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "x: a nested tensor"),
        (
            lambda: torch.masked.masked_tensor(torch.ones(2), torch.ones(2) > 0),
            "x: MaskedTensor is more than its data",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
            r"x: a nested tensor \(NestedTensor\)",
        ),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "x: quantized tensor"),
        (lambda: torch.nn.UninitializedParameter(), "x: UninitializedParameter has no shape"),
        (lambda: torch.empty(2, dtype=torch.uint4), "x: tensors of dtype torch.uint4"),
    ],
)
def test_tensors_without_plain_memory_are_refused_by_path(make: Any, message: str) -> None:
    with pytest.raises(StateError, match=f"state.{message}"):
        flatten({"state": {"x": make()}})


def test_fake_and_freed_tensors_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
    with pytest.raises(StateError, match="x: "):
        flatten({"x": fake})
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    with pytest.raises(StateError, match="x: the tensor's memory was freed"):
        flatten({"x": freed})


def test_parameters_that_a_runtime_has_emptied_are_refused_with_the_way_that_works() -> None:
    """DeepSpeed's ZeRO-3 leaves a parameter of shape (0,) between the steps, with its own attributes on it."""
    model = torch.nn.Linear(4, 3)
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_status, parameter.ds_shape = 0, "NOT_AVAILABLE", parameter.shape
        parameter.data = torch.empty(0)
    expected = r"model.weight: a parameter of DeepSpeed ZeRO-3, of shape \(0,\) here, of \(3, 4\) in all.*GatheredParam"
    with pytest.raises(StateError, match=expected):
        flatten({"model": model})
    stored = save({"model": torch.nn.Linear(4, 3)})
    with pytest.raises(StateError, match=expected):
        load(stored, {"model": model}, strict=False)


def test_parameters_of_deepspeed_zero_1_and_2_are_refused_without_their_engine() -> None:
    """They are whole, but the next step makes them of master weights that such a restore would not have filled."""
    model = torch.nn.Linear(4, 3)
    for parameter in model.parameters():
        parameter._hp_mapping = None
    with pytest.raises(StateError, match=r"model.weight: a parameter of DeepSpeed ZeRO, .*put the DeepSpeed engine"):
        load(save({"model": torch.nn.Linear(4, 3)}), {"model": model})


def test_parameters_of_the_first_fsdp_are_refused_without_their_module_too() -> None:
    from torch.distributed.fsdp._common_utils import _set_fsdp_flattened

    model = torch.nn.Linear(4, 3)
    for parameter in model.parameters():
        _set_fsdp_flattened(parameter)
    with pytest.raises(StateError, match="weight: a parameter of FullyShardedDataParallel, .*put the Fully"):
        flatten(dict(model.named_parameters()))


def test_tied_memory_is_found_across_frameworks() -> None:
    tensor = torch.zeros(2, 3)
    flat = flatten({"a": tensor, "b": tensor.detach(), "c": tensor.numpy(), "t": tensor.t(), "r": PerRank(tensor)})
    assert flat.aliases == {("b",): ("a",), ("c",): ("a",)}
    assert [leaf.placement for leaf in flat.arrays] == [
        Placement.REPLICATED,
        Placement.REPLICATED,
        Placement.PER_RANK,
    ]


def test_dtypes_are_cast_when_told() -> None:
    stored = save({"a": torch.tensor([1.5, -2.25]), "b": torch.tensor([1.5]).to(torch.float8_e5m2)})
    state = {"a": torch.zeros(2, 2, dtype=torch.bfloat16)[:, 0], "b": torch.zeros(1, dtype=torch.float64)}
    with pytest.raises(LoadMismatchError, match="a: dtype bfloat16 here, float32 in the checkpoint"):
        load(stored, state)
    report = load(stored, state, cast=True)
    assert report.cast == ("a", "b")
    assert state["a"].tolist() == [1.5, -2.25]
    assert state["b"].tolist() == [1.5]


def test_numpy_and_torch_read_each_others_leaves() -> None:
    stored = save({"x": torch.arange(3), "y": np.arange(3.0)})
    state = {"x": np.zeros(3, np.int64), "y": torch.zeros(3, dtype=torch.float64)}
    assert load(stored, state).complete
    assert state["x"].tolist() == state["y"].tolist() == [0, 1, 2]


def test_hand_sharded_tensors_are_placed() -> None:
    stored = save(*({"x": ShardedArray(torch.full((2,), i), (4,), (2 * i,))} for i in range(2)))
    whole = torch.zeros(4, dtype=torch.int64)
    load(stored, {"x": whole}, world_size=1)
    assert whole.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "value",
    [
        torch.bfloat16,
        torch.float4_e2m1fn_x2,
        torch.Size([2, 0]),
        torch.device("cuda", 1),
        torch.device("cpu"),
    ],
)
def test_torch_dtypes_sizes_and_devices_are_plain_values(value: Any) -> None:
    again = decode(encode([value], ()))[0]
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize("data", [{"$torch.dtype": "nn"}, {"$torch.device": "nodevice"}, {"$torch.size": "a"}])
def test_torch_values_that_do_not_exist_are_damage(data: Any) -> None:
    with pytest.raises(CheckpointDamagedError):
        decode(data)


def test_new_tensors_have_the_saved_type() -> None:
    assert TorchAdapter().empty("bfloat16", (2, 0)).dtype is torch.bfloat16


def test_masked_and_old_sharded_tensors_are_refused_by_path() -> None:
    masked = torch.masked.masked_tensor(torch.ones(3), torch.tensor([True, False, True]))
    with pytest.raises(StateError, match=r"a\.m: MaskedTensor is more than its data; put `get_data"):
        flatten({"a": {"m": masked}})
    sharded = torch.Tensor._make_wrapper_subclass(ShardedTensor, (4,), dtype=torch.float32)
    with pytest.raises(StateError, match=r"a\.m: ShardedTensor is torch's old form .*DTensor"):
        flatten({"a": {"m": sharded}})


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float8_e4m3fn", "float32", "int64", "bool", "complex64", "complex32", "uint8", "float16"]
)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3)])
def test_a_checkpoint_read_as_torch_has_the_tensors_that_were_saved(tmp_path, dtype, shape):
    bits = torch.randint(0, 2, (*shape, torch.empty(0, dtype=getattr(torch, dtype)).element_size()), dtype=torch.uint8)
    tensor = bits.view(getattr(torch, dtype)).reshape(shape)
    ce.save(tmp_path, {"a": {"t": tensor, "n": 3}})
    found = ce.load(tmp_path, as_torch=True)
    assert found["a"]["n"] == 3
    assert (found["a"]["t"].dtype, found["a"]["t"].shape) == (tensor.dtype, tensor.shape)
    assert found["a"]["t"].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
