"""From the files straight to a device: through windows of bounded memory, bit for bit, and what ends it early."""

import numpy as np
import pytest
import torch
from test_copies import LAYOUTS, NAMES, bits, bytes_of, words
from test_fence import launch

import ckptengine as ce
from ckptengine.errors import CheckpointDamagedError, DeviceError
from ckptengine.load import devices
from ckptengine.snapshot.arena import Arena
from ckptengine.torch.accelerator import Link


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(devices, "WINDOW_NBYTES", 1 << 17)


def mixed(device):
    """Return tensors of all dtypes and strides, many windows large, and some in the CPU's memory between them."""
    torch.manual_seed(3)
    state = {}
    for name in NAMES:
        for layout, (shape, view) in LAYOUTS.items():
            state[f"{name}, {layout}"] = view(bits(name, shape, device.name))
        state[f"{name}, here"] = np.arange(1000.0)
    return state


def fill(state, value):
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor):
            words(tensor).fill_(value)
        else:
            tensor[...] = value


def contents(state):
    return {
        name: bytes_of(value) if isinstance(value, torch.Tensor) else value.tobytes() for name, value in state.items()
    }


def test_all_dtypes_and_strides_come_back_through_windows_smaller_than_the_tensors(tmp_path, device, small_windows):
    state = mixed(device)
    if not device.real:
        device.pretended.seconds = 0
    expected = contents(state)
    with ce.Checkpointer(tmp_path / "run") as run:
        run.save(1, state).durable.result()
        fill(state, 0)
        assert run.restore(state) == 1
    device.synchronize()
    found = contents(state)
    assert [name for name in state if found[name] != expected[name]] == []


def test_a_restore_takes_as_much_memory_as_its_windows_and_gives_it_back(tmp_path, device, small_windows, monkeypatch):
    reserved, own = [], []
    reserve, empty = Arena.reserve, np.empty
    monkeypatch.setattr(Arena, "reserve", lambda arena, nbytes: (reserved.append(nbytes), reserve(arena, nbytes)))
    state = {"weight": torch.randn(2000, 1000, device=device.name)}
    expected = bytes_of(state["weight"])
    ce.save(tmp_path / "point", state)
    words(state["weight"]).zero_()
    reserved.clear()
    before = [] if device.real else list(device.pretended.pinned)
    with monkeypatch.context() as patch:
        patch.setattr(devices.np, "empty", lambda *a, **k: (own.append(empty(*a, **k)), own[-1])[1])
        ce.load(tmp_path / "point", into=state, verify=False)
    device.synchronize()
    assert bytes_of(state["weight"]) == expected
    assert reserved == [4 << 17]
    assert max((array.nbytes for array in own), default=0) < 1 << 17
    if not device.real:
        assert device.pretended.pinned == before


@pytest.mark.long
def test_ranks_of_a_node_bring_what_they_read_together_to_their_devices(tmp_path, device):
    assert launch(["replicated", str(tmp_path / "run")], tmp_path, 2) == [0, 0]


def test_parts_of_tensors_are_read_from_larger_ones_and_put_together_of_smaller_ones(tmp_path, device, small_windows):
    whole = torch.arange(700 * 600, dtype=torch.float32).reshape(700, 600)
    ce.save(tmp_path / "whole", {"w": whole})
    target = torch.zeros(300, 250, device=device.name)
    ce.load(tmp_path / "whole", into={"w": ce.ShardedArray(target, (700, 600), (100, 50))}, verify=False)
    device.synchronize()
    assert torch.equal(target.cpu(), whole[100:400, 50:300])
    turned = torch.zeros(600, 700, device=device.name).t()
    ce.load(tmp_path / "whole", into={"w": turned})
    device.synchronize()
    assert torch.equal(turned.cpu(), whole)


def test_a_load_through_torchs_own_calls_gives_the_windows_back(tmp_path, device, small_windows):
    from torch.distributed import checkpoint

    from ckptengine.dcp import Reader

    weight = torch.randn(2000, 300, device=device.name)
    ce.save(tmp_path / "point", {"weight": weight})
    expected = bytes_of(weight)
    words(weight).zero_()
    before = [] if device.real else list(device.pretended.pinned)
    checkpoint.load({"weight": weight}, storage_reader=Reader(tmp_path / "point"), no_dist=True)
    device.synchronize()
    assert bytes_of(weight) == expected
    if not device.real:
        assert device.pretended.pinned == before


def test_a_damaged_chunk_in_the_middle_is_an_error_that_names_it_and_leaves_nothing_under_way(
    tmp_path, device, small_windows
):
    weight = torch.randn(2000, 1000, device=device.name)
    ce.save(tmp_path / "point", {"weight": weight})
    expected = bytes_of(weight)
    file = max((tmp_path / "point").rglob("*.zip"), key=lambda path: path.stat().st_size)
    before = [] if device.real else list(device.pretended.pinned)
    data = bytearray(file.read_bytes())
    data[4_000_000] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match=r"bytes \d+ to \d+ are not those that were written"):
        ce.load(tmp_path / "point", into={"weight": weight})
    if not device.real:
        assert device.pretended.pinned == before
    data[4_000_000] ^= 1
    file.write_bytes(data)
    ce.load(tmp_path / "point", into={"weight": weight})
    device.synchronize()
    assert bytes_of(weight) == expected


def test_a_copy_to_the_device_that_fails_ends_the_restore(tmp_path, device, small_windows, monkeypatch):
    weight = torch.randn(2000, 1000, device=device.name)
    ce.save(tmp_path / "point", {"weight": weight})
    expected, count = bytes_of(weight), [0]
    original = Link.to_device

    def some(link, pairs, after):
        count[0] += 1
        if count[0] == 5:
            raise torch.OutOfMemoryError("out of memory")
        return original(link, pairs, after)

    with monkeypatch.context() as patch:
        patch.setattr(Link, "to_device", some)
        with pytest.raises(
            DeviceError, match=r"rank 0: .*weight \(\d+,\d+ bytes of it\) .*Memory.*: out of memory.*don't use"
        ):
            ce.load(tmp_path / "point", into={"weight": weight})
    ce.load(tmp_path / "point", into={"weight": weight})
    device.synchronize()
    assert bytes_of(weight) == expected


def test_a_restore_that_finds_no_memory_on_the_device_names_what_it_was_for_and_can_be_tried_again(tmp_path, device):
    weight = torch.randn(1700, 1700, device=device.name).t()
    ce.save(tmp_path / "point", {"weight": weight})
    expected = bytes_of(weight)
    words(weight).zero_()
    wanted = (
        r"rank 0: .*point: weight \(11,560,000 bytes of it\) could not be copied to \w+:0: OutOfMemoryError: .*; free "
    )
    with device.without_memory(1 << 10), pytest.raises(DeviceError, match=wanted):
        ce.load(tmp_path / "point", into={"weight": weight})
    ce.load(tmp_path / "point", into={"weight": weight})
    device.synchronize()
    assert bytes_of(weight) == expected


def test_a_restore_without_memory_for_the_optimizers_moments_names_the_first_and_changes_nothing(
    tmp_path, device, monkeypatch
):
    model = torch.nn.Linear(30, 20, device=device.name)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 30, device=device.name)).sum().backward()
    optimizer.step()
    ce.save(tmp_path / "point", {"model": model, "optimizer": optimizer})
    fresh = torch.nn.Linear(30, 20, device=device.name)
    expected = bytes_of(fresh.weight)
    state = {"model": fresh, "optimizer": torch.optim.AdamW(fresh.parameters())}

    def refuse(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 2,400 bytes")

    with monkeypatch.context() as patch:
        patch.setattr("ckptengine.torch.optimizer.new_state_tensor", refuse)
        with pytest.raises(
            DeviceError, match=r"rank 0: .*optimizer\.state\S+: .*no memory for .*Nothing of the state was"
        ):
            ce.load(tmp_path / "point", into=state)
    assert bytes_of(fresh.weight) == expected
    ce.load(tmp_path / "point", into=state)
    assert bytes_of(fresh.weight) == bytes_of(model.weight)


def test_a_load_without_memory_for_a_conversion_names_the_tensor(tmp_path, device, monkeypatch):
    ce.save(tmp_path / "point", {"weight": torch.ones(30, 20)})
    half = torch.zeros(30, 20, dtype=torch.float16, device=device.name)

    def refuse(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 1,200 bytes")

    monkeypatch.setattr("ckptengine.torch.adapter.convert_tensor", refuse)
    with pytest.raises(DeviceError, match=r"rank 0: .*weight: there is no memory for the conversion .*don't use"):
        ce.load(tmp_path / "point", into={"weight": half}, cast=True)


@pytest.mark.parametrize("most", [1 << 10, 100_000])
def test_pieces_of_a_box_cover_it_once_and_none_is_too_large(most):
    copy = devices.Copy(0, 0, 4096, 7 * 50 * 60 * 4, 4, (7, 50, 60), (2, 5, 3), (4, 30, 50), (0, 0, 0))
    seen = np.zeros((4, 30, 50), int)
    numbers = np.arange(7 * 50 * 60).reshape(7, 50, 60)
    for _, position, nbytes, dense, offset, box, start in devices.pieces_of(
        devices.DeviceCopy((), copy, None, None, np.dtype("f4")), most
    ):
        assert np.prod(box) * 4 <= most
        chunk = numbers.reshape(-1)[(position - 4096) // 4 :][: nbytes // 4].reshape(dense)
        inside = chunk[tuple(slice(o, o + n) for o, n in zip(offset, box, strict=True))]
        place = tuple(slice(o, o + n) for o, n in zip(start, box, strict=True))
        assert np.array_equal(inside, numbers[2:6, 5:35, 3:53][place])
        seen[place] += 1
    assert (seen == 1).all()
