"""Random streams of devices, on a pretended accelerator: there is none here."""

import types

import numpy as np
import pytest
import torch
from state_memory import load, save

import ckptengine as ce

pytestmark = pytest.mark.usefixtures("streams_as_they_were")


class Pretended(types.ModuleType):
    """Stands in for `torch.cuda` with four devices, of which the process uses some."""

    def __init__(self, patch, current=0, initialized=True, used=()):
        super().__init__("pretended")
        self.initialized, self.current, self.used = initialized, current, {current, *used}
        self.states = [torch.full((16,), 10 + index, dtype=torch.uint8) for index in range(4)]
        self.touched, self.late = set(), []
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "device_count", lambda: 4)
        patch.setattr(torch.accelerator, "current_device_index", lambda: self.current)
        patch.setattr(torch.accelerator, "device_index", self.device_index)
        patch.setattr(torch, "get_device_module", lambda device=None: self)
        patch.setattr("ckptengine.torch.random._used", set())
        patch.setattr("ckptengine.torch.random._untouched", {})

    def device_index(self, index):
        class Selected:
            def __enter__(inner):
                inner.before, self.current = self.current, index

            def __exit__(inner, *_):
                self.current = inner.before

        return Selected()

    def is_initialized(self):
        return self.initialized

    def max_memory_reserved(self, index):
        return 512 * (index in self.used)

    def get_rng_state(self, index=None):
        assert self.initialized, "asking for the state would initialize the device"
        return self.states[self.current if index is None else index].clone()

    def set_rng_state(self, state, index=None):
        if not self.initialized:
            self.late.append(state.clone())
            return
        index = self.current if index is None else index
        self.touched.add(index)
        self.states[index] = state.clone()

    def manual_seed(self, seed):
        self.touched.add(self.current)
        self.states[self.current] = torch.from_numpy(np.frombuffer(bytearray(seed.to_bytes(8, "little") * 2), np.uint8))


def test_on_a_pretended_accelerator_only_the_devices_in_use_are_saved(monkeypatch):
    Pretended(monkeypatch, current=1, used=[3])
    assert repr(ce.RNG()) == "RNG(python, numpy, torch.cpu, torch.cuda, torch.cuda:3)"
    Pretended(monkeypatch, initialized=False)
    assert repr(ce.RNG()) == "RNG(python, numpy, torch.cpu)"


def test_on_a_pretended_accelerator_a_device_that_comes_into_use_later_is_saved(monkeypatch):
    device, rng = Pretended(monkeypatch), ce.RNG()
    assert "torch.cuda:2" not in repr(rng)
    device.used.add(2)
    device.states[2] += 1
    assert "torch.cuda:2" in repr(rng)


def test_on_a_pretended_accelerator_the_current_devices_stream_moves_to_another_number(monkeypatch):
    Pretended(monkeypatch, current=1, used=[3])
    stored = save({"rng": ce.RNG()})
    device = Pretended(monkeypatch, current=2, used=[3])
    device.states = [torch.zeros(16, dtype=torch.uint8) for _ in range(4)]
    load(stored, {"rng": ce.RNG()})
    assert [int(state[0]) for state in device.states] == [0, 0, 11, 13]
    assert device.touched == {2, 3}


def test_on_a_pretended_accelerator_a_stream_waits_until_the_device_is_used(monkeypatch, caplog):
    Pretended(monkeypatch, current=1)
    stored = save({"rng": ce.RNG()})
    device = Pretended(monkeypatch, initialized=False)
    load(stored, {"rng": ce.RNG()})
    assert [int(state[0]) for state in device.late] == [11]
    assert not caplog.records


def test_on_a_pretended_accelerator_ranks_get_streams_of_their_own_and_warnings_where_one_moves(monkeypatch, caplog):
    stored = save({"rng": ce.RNG()}, {"rng": ce.RNG()})
    states = []
    for rank in range(2):
        device = Pretended(monkeypatch, current=rank)
        load(stored, {"rng": ce.RNG()}, rank=rank)
        states.append(device.states[rank].tolist())
    assert states[0] != states[1]
    assert "RNG, rank 1: in this process, but not saved, so seeded anew: torch.cuda" in caplog.text
    Pretended(monkeypatch, current=1, used=[3])
    stored = save({"rng": ce.RNG()})
    monkeypatch.undo()
    before = torch.get_rng_state()
    load(stored, {"rng": ce.RNG()})
    assert "RNG, rank 0: saved, but not in this process, so ignored: torch.cuda, torch.cuda:3" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)
