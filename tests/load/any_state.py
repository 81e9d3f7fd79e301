"""Generated states: a plan that hypothesis draws, and the state that is built of it, twice with different contents."""

from __future__ import annotations

import copy
import enum
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

import ckptengine as ce

Point = namedtuple("Point", "x y")


class Mood(enum.Enum):
    CALM = 1
    ODD = "two"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class OwnParameter(nn.Parameter):
    pass


class OwnTensor(torch.Tensor):
    pass


def wrapped_like(before: Any, state: Any) -> Any:
    """Put into a PerRank what was in one before: a load hands over what it holds."""
    if isinstance(before, ce.PerRank):
        return ce.PerRank(state)
    if isinstance(before, Mapping) and isinstance(state, Mapping):
        for key, item in state.items():
            if key in before and isinstance(before[key], ce.PerRank | Mapping):
                state[key] = wrapped_like(before[key], item)  # type: ignore[index]
    return state


class Keeper:
    """Keeps what it is given, of any kind."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = wrapped_like(self.state, state)


class Extra(nn.Module):
    """A module with extra state, and a buffer that is not saved."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.extra = state

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    return model


MODULES = {
    "linear": lambda: nn.Linear(3, 2),
    "bfloat16": lambda: nn.Linear(2, 2).to(torch.bfloat16),
    "tied": tied,
    "norm": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)),
    "channels_last": lambda: nn.Conv2d(3, 2, 2).to(memory_format=torch.channels_last),
    "frozen": lambda: nn.Linear(2, 2).requires_grad_(False),
    "empty": lambda: nn.Sequential(nn.Linear(0, 2), nn.Identity()),
    "dict": lambda: nn.ParameterDict({"b": torch.ones(2), "a": torch.ones(())}),
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1), betas=(0.5, 0.75)),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters),
    "rprop": lambda parameters: torch.optim.Rprop(parameters),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters),
}

TORCH_DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.complex32),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]
GRADIENTS = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128}
NUMPY_DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *(getattr(ml_dtypes, name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")),
]

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
finite = st.sampled_from([0.0, -0.0, 1.5, float("inf"), float("-inf"), float("nan"), 5e-324, 1e308])
atoms = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers(-(2**70), 2**70)
    | finite
    | st.floats()
    | st.builds(complex, finite, finite)
    | st.text(max_size=3)
    | st.sampled_from(["\ud800", "$float", "", "a.b", "state", "tensor_subclass"])
    | st.binary(max_size=3)
    | st.sampled_from([Mood.CALM, Mood.ODD, Rights.READ, Rights.READ | Rights.WRITE, Rights(0)])
    | st.sampled_from([pathlib.Path("a/b"), pathlib.Path("/"), pathlib.PureWindowsPath("c:\\x")])
    | st.sampled_from([np.float32(-0.0), np.int8(-3), np.bool_(True), np.uint64(2**63), ml_dtypes.bfloat16(1.5)])
    | st.sampled_from([torch.float32, torch.Size([2, 3]), torch.device("cpu"), np.dtype("int8"), np.dtype("<U3")])
)
hashable = st.integers(-3, 3) | st.text(max_size=2) | st.tuples(st.integers(0, 2), st.booleans())
plain = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(hashable, inner, max_size=2).map(lambda items: defaultdict(list, items))
        | st.builds(Point, inner, inner)
        | st.lists(inner, max_size=3).map(lambda items: deque(items, 5))
        | st.sets(hashable, max_size=3)
        | st.frozensets(hashable, max_size=3)
        | st.lists(hashable, max_size=3).map(Counter)
    ),
    max_leaves=5,
)


@dataclass(frozen=True)
class Plan:
    """What one value of the state is: a kind, what was drawn for it, and the plans of what is inside."""

    kind: str
    about: tuple[Any, ...] = ()
    inner: tuple[Plan, ...] = ()


torches = st.builds(
    lambda *about: Plan("torch", about),
    st.sampled_from(TORCH_DTYPES),
    shapes,
    st.sampled_from(["C", "strided", "offset", "permuted", "channels_last"]),
    st.sampled_from(["tensor", "tensor", "grad", "parameter", "frozen", "own parameter", "own tensor"]),
)
numpys = st.builds(
    lambda *about: Plan("numpy", about),
    st.sampled_from(NUMPY_DTYPES),
    shapes,
    st.sampled_from(["C", "F", "strided", "backwards", "read-only"]),
)
again = st.builds(lambda *about: Plan("again", about), st.integers(0, 9), st.sampled_from(["same", "data", "part"]))
values = st.builds(lambda one, other: Plan("plain", (one, other)), plain, plain)
leaves = torches | torches | numpys | again | values
names = st.text(max_size=3) | st.sampled_from(["a", "b", "a.b", "state", "0", "$x"]) | st.integers(-2, 3)
odd_names = names | st.sampled_from([1.5, -0.0, (1, "x"), True, None])


def containers(inner: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
    """Return plans of containers."""
    several = st.lists(inner, max_size=4).map(tuple)

    def keyed(kind: str, keys: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[Plan]:
        return st.dictionaries(keys, inner, max_size=4, min_size=least).map(
            lambda items: Plan(kind, tuple(items), tuple(items.values()))
        )

    return (
        keyed("dict", names)
        | keyed("dict", odd_names)
        | keyed("ordered", names)
        | keyed("defaultdict", names)
        | several.map(lambda items: Plan("list", (), items))
        | several.map(lambda items: Plan("tuple", (), items))
        | several.map(lambda items: Plan("deque", (), items))
        | st.tuples(inner, inner).map(lambda items: Plan("point", (), items))
    )


def livings(inner: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
    """Return plans of what takes its state itself, around such as are inside."""
    return (
        st.builds(lambda item, empty: Plan("object", (empty,), (item,)), inner, st.booleans())
        | st.builds(lambda item: Plan("extra", (), (item,)), inner)
        | st.builds(lambda item: Plan("per rank", (), (item,)), inner)
        | st.sampled_from(sorted(MODULES)).map(lambda name: Plan("module", (name,)))
        | st.builds(
            lambda *about: Plan("trained", about),
            st.sampled_from(sorted(MODULES)),
            st.sampled_from(sorted(OPTIMIZERS)),
            st.integers(0, 2),
            st.integers(0, 2),
            st.booleans(),
        )
    )


data = st.recursive(leaves, containers, max_leaves=6)
nested = st.recursive(leaves, lambda inner: containers(inner) | livings(inner), max_leaves=6)
anything = data | livings(data) | livings(data) | nested
states = st.dictionaries(names, anything, min_size=1, max_size=4)


class Builder:
    """Builds a state of plans; `fresh` is another one of the same structure, as a restarted job makes it."""

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        self.random = np.random.default_rng(7 if fresh else 3)
        self.pool: list[Any] = []

    def build(self, plan: Plan) -> Any:
        return getattr(self, "_" + plan.kind.replace(" ", "_"))(plan)

    def _bits(self, nbytes: int, boolean: bool) -> np.ndarray[Any, Any]:
        raw = self.random.integers(0, 256, nbytes, np.uint8)
        return raw & 1 if boolean else raw

    def _torch(self, plan: Plan) -> Any:
        dtype, shape, layout, kind = plan.about
        if layout == "channels_last" and len(shape) == 4:
            whole = torch.empty([shape[n] for n in (0, 2, 3, 1)], dtype=torch.uint8)
        else:
            whole = torch.empty([2 * shape[0] + 1, *shape[1:]] if shape and layout != "C" else shape, dtype=torch.uint8)
        tensor = torch.empty(whole.shape, dtype=dtype)
        if tensor.numel():
            flat = tensor.reshape(-1).view(torch.uint8)
            flat.copy_(torch.from_numpy(self._bits(flat.numel(), dtype is torch.bool)))
        if layout == "channels_last" and len(shape) == 4:
            tensor = tensor.permute(0, 3, 1, 2)
        elif shape and layout != "C":
            tensor = tensor[1::2] if layout in ("strided", "permuted") else tensor[1 : shape[0] + 1]
            tensor = tensor.permute(*reversed(range(len(shape)))) if layout == "permuted" else tensor
        takes = dtype in GRADIENTS
        if kind == "own tensor":
            tensor = tensor.as_subclass(OwnTensor)
        elif kind == "own parameter":
            tensor = OwnParameter(tensor, takes)
        elif kind in ("parameter", "frozen"):
            tensor = nn.Parameter(tensor, takes and kind == "parameter")
        elif kind == "grad" and takes:
            tensor = tensor.requires_grad_()
        self.pool.append(tensor)
        return tensor

    def _numpy(self, plan: Plan) -> Any:
        dtype, shape, layout = np.dtype(plan.about[0]), plan.about[1], plan.about[2]
        whole = (*shape[:-1], 2 * shape[-1]) if shape and layout in ("strided", "backwards") else shape
        bits = self._bits(int(np.prod(whole, dtype=int)) * dtype.itemsize, dtype == np.bool_)
        array = bits.copy().view(dtype).reshape(whole)
        if layout == "strided" and shape:
            array = array[..., ::2]
        elif layout == "backwards" and shape:
            array = array[..., ::-2]
        elif layout == "F":
            array = np.asfortranarray(array)
        elif layout == "read-only":
            array.setflags(write=False)
        self.pool.append(array)
        return array

    def _again(self, plan: Plan) -> Any:
        number, how = plan.about
        if not self.pool:
            return self._torch(Plan("torch", (torch.float32, (2, 3), "C", "tensor")))
        one = self.pool[number % len(self.pool)]
        if how == "data" and isinstance(one, torch.Tensor):
            return one.data
        if how == "part" and one.ndim and one.shape[0] > 1:
            return (one.data if isinstance(one, torch.Tensor) else one)[1:]
        return one

    def _plain(self, plan: Plan) -> Any:
        return copy.deepcopy(plan.about[1] if self.fresh else plan.about[0])

    def _items(self, plan: Plan) -> list[tuple[Any, Any]]:
        return [(key, self.build(item)) for key, item in zip(plan.about, plan.inner, strict=True)]

    def _dict(self, plan: Plan) -> Any:
        return dict(self._items(plan))

    def _ordered(self, plan: Plan) -> Any:
        return OrderedDict(self._items(plan))

    def _defaultdict(self, plan: Plan) -> Any:
        return defaultdict(int, self._items(plan))

    def _list(self, plan: Plan) -> Any:
        return [self.build(item) for item in plan.inner]

    def _tuple(self, plan: Plan) -> Any:
        return tuple(self._list(plan))

    def _deque(self, plan: Plan) -> Any:
        return deque(self._list(plan), 9)

    def _point(self, plan: Plan) -> Any:
        return Point(*self._list(plan))

    def _object(self, plan: Plan) -> Any:
        inner = self.build(plan.inner[0])
        return Keeper({} if self.fresh and plan.about[0] else inner)

    def _extra(self, plan: Plan) -> Any:
        return self._filled(Extra(self.build(plan.inner[0])))

    def _per_rank(self, plan: Plan) -> Any:
        return ce.PerRank(self.build(plan.inner[0]))

    def _numbers(self, shape: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.random.standard_normal(tuple(shape))))

    def _filled(self, module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.copy_(self._numbers(tensor.shape) * 4)
        self.pool += module.parameters()
        return module

    def _module(self, plan: Plan) -> Any:
        return self._filled(MODULES[plan.about[0]]())

    def _trained(self, plan: Plan) -> Any:
        """A module and its optimizer, after some steps."""
        name, kind, steps, here, groups = plan.about
        module = self._module(Plan("module", (name,)))
        parameters = [one for one in module.parameters() if one.numel() or kind != "adafactor"]  # it divides by that
        many = groups and len(parameters) > 1
        given = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.25}] if many else parameters
        optimizer = OPTIMIZERS[kind](given)
        for _ in range(here if self.fresh else steps):
            for parameter in parameters:
                gradient = self._numbers(parameter.shape).to(parameter.dtype)
                parameter.grad = gradient if parameter.requires_grad else None
            optimizer.step()
        return {"model": module, "optimizer": optimizer}


def built(plans: dict[Any, Plan], *, fresh: bool) -> dict[Any, Any]:
    """Return the state of plans by its keys."""
    builder = Builder(fresh)
    return {key: builder.build(plan) for key, plan in plans.items()}
