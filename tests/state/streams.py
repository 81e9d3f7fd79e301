"""Random streams of every kind, and states of ranks that hold them."""

import random

import numpy as np
import torch
from state_memory import load

import ckptengine as ce

BITS = (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)


def everything(seed):
    """Return generators of every kind, each in the middle of something, and seed the global ones."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    given = {
        "random": random.Random(seed),
        "legacy": np.random.RandomState(seed),
        "bare": np.random.PCG64(seed),
        "torch": torch.Generator().manual_seed(seed),
    }
    given |= {bits.__name__: np.random.Generator(bits(seed)) for bits in BITS}
    draw(given, 1)
    return given


def draw(given, count=3):
    """Draw from everything in ways that leave something in store: half a pair of normals, half a word."""
    drawn = []
    for _ in range(count):
        drawn += [random.gauss(0, 1), random.random(), np.random.randn(), np.random.random(), torch.randn(1).item()]
        drawn += [torch.randn(3, dtype=torch.float64).tolist(), given["random"].gauss(0, 1), given["legacy"].randn()]
        drawn += [given["bare"].random_raw(), torch.randn(1, generator=given["torch"]).item()]
        drawn += [given[bits.__name__].integers(9999, dtype=np.uint32) for bits in BITS]
    return drawn


def ranks(count, seed=0, **options):
    """Return the states of ranks: `own` differs, everything else is alike."""
    return [
        {"rng": ce.RNG({"own": random.Random(seed + rank), "alike": random.Random(seed)}, **options)}
        for rank in range(count)
    ]


def numbers(state):
    """Draw from the given streams of a state that `ranks` made."""
    given = state["rng"]._given
    return {name: given[name]._generator.random() for name in given}


def resumed(stored, count, **options):
    states = ranks(count, seed=9000, **options)
    for rank, state in enumerate(states):
        load(stored, state, rank=rank, world_size=count)
    return states


def snapshot():
    return random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()
