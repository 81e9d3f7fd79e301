"""What `save_checkpoint` is given as a state, and a checkpoint as the dict that `load_checkpoint` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Generator, Parameter, Tensor, nn

from ckptengine.errors import StateError
from ckptengine.mindspore.cell import is_optimizer, module_entries, shared_weights
from ckptengine.mindspore.tensor import as_tensor
from ckptengine.schema.type_name import describe_type

__all__ = [
    "APPENDED",
    "NETWORK",
    "OPTIMIZER",
    "ExactNames",
    "LoadedParameters",
    "StoredArray",
    "optimizers_of",
    "optimizers_own",
    "parameters_of",
    "refuse_split",
    "state_of",
]

NETWORK, OPTIMIZER, APPENDED = "net", "optimizer", "append"
Choice = Callable[[str], Any] | None


# What MindSpore's optimizers put before a weight's name for what they have of their own (`clone(prefix=...)` there).
_SLOTS = (
    *("accum", "accum_update", "adam_m", "adam_v", "ax", "ax_", "exp_avg", "exp_avg_sq", "exp_inf", "lamb_m", "lamb_v"),
    *(
        "linear",
        "max_exp_avg_sq",
        "mean_grad",
        "mean_square",
        "moment",
        "moment1",
        "moment2",
        "momentum_buf",
        "moments",
    ),
    *("prev", "stat", "step_size", "vhat"),
)


class LoadedParameters(dict[str, Any]):
    """Parameters by name, as `mindspore.load_checkpoint` gives them; `progress` is where the training was.

    That is the number of the epoch and of the step, counted over all lives of the job, or None.
    """

    progress: tuple[int, int] | None = None


class ExactNames(dict[str, Any]):
    """Parameters of which some are found by their exact names only.

    Where a weight is missing, MindSpore goes through the names of the dict for one that ends like the weight's, and
    takes what comes before for a prefix: `moment1.weight` for `weight`. Here it does not meet an optimizer's own names.
    """

    def __init__(self, parameters: Mapping[str, Any], exact: frozenset[str]) -> None:
        super().__init__(parameters)
        self._exact = exact

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.keys() if name not in self._exact)


def optimizers_own(net: nn.Cell, names: Iterable[str]) -> frozenset[str]:
    """Return those of a dict's names that are an optimizer's own: of an optimizer in `net`, or of any by their form."""
    own = {name for one in optimizers_of(net) for name in _own_names(one)}
    known = set(names)
    return frozenset(
        name for name in known if name in own or (name.partition(".")[0] in _SLOTS and name.partition(".")[2])
    )


def optimizers_of(network: nn.Cell) -> list[Any]:
    """Return the optimizers in a network's cells, itself included."""
    return [cell for _, cell in network.cells_and_names() if is_optimizer(cell)]


def state_of(saved: Any, appended: Mapping[str, Any] | None, choice: Choice) -> dict[str, Any]:
    """Return the state for what `save_checkpoint` may be given: a cell, a list or dict of parameters.

    A training network's weights are under `net`, what its optimizers have of their own under `optimizer`; so are those
    of an optimizer by itself.
    """
    state: dict[str, Any] = {NETWORK: {}}
    if isinstance(saved, nn.Cell):
        owned = {name for one in optimizers_of(saved) for name in _own_names(one)}
        items = {entry.name: entry.value for entry in module_entries(saved, (NETWORK,)) if entry.live}
        if is_optimizer(saved):  # as MindSpore does: what is loaded into it later needs its weights too
            items = {weight.name: weight for weight in shared_weights(saved)} | items
    else:
        owned, items = set(), dict(_named(saved))
    for name, value in items.items():
        if choice is None or choice(name):
            state.setdefault(OPTIMIZER if name in owned else NETWORK, {})[name] = value
    if appended:
        state[APPENDED] = {name: _plain(value) for name, value in appended.items()}
    return state


def refuse_split(what: str, cell: Any, instead: str) -> None:
    """Raise `StateError` where a compiled cell's parameters are split over devices, saying what can be done instead."""
    for name, layout in cell.parameter_layout_dict.items() if isinstance(cell, nn.Cell) else ():
        if layout[5] or any(place != -1 for entry in layout[1] for place in np.atleast_1d(entry)):
            raise StateError(
                f"{what}: {name} is split over devices, and what this rank has of it is not the whole. Have all ranks "
                f"save and load ckptengine.mindspore.sharded_parameters(network) with ckptengine{instead}"
            )


def _own_names(optimizer: Any) -> list[str]:
    return [entry.name for entry in module_entries(optimizer, (OPTIMIZER,)) if entry.live]


def _named(saved: Any) -> list[tuple[str, Any]]:
    if isinstance(saved, dict):
        items = list(saved.items())
    elif all(isinstance(item, Parameter) for item in saved):
        items = [(item.name, item) for item in saved]
    elif all(isinstance(item, dict) and {"name", "data"} <= set(item) for item in saved):
        items = [(item["name"], item["data"]) for item in saved]
    else:
        raise TypeError('save_checkpoint: a list holds parameters, or dicts {"name": str, "data": Tensor}')
    names = [name for name, _ in items]
    if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError("save_checkpoint: each parameter needs a name (str) of its own")
    for name, value in items:
        if not isinstance(value, (Tensor, str, np.ndarray)):
            raise TypeError(f"save_checkpoint: {name!r} is {describe_type(value)}, not a Parameter, Tensor or str")
    return items


def _plain(value: Any) -> Any:
    return value.get_state() if isinstance(value, Generator) else value


@dataclass(frozen=True, slots=True, eq=False)
class StoredArray:
    """An array of a checkpoint, and its logical dtype."""

    array: np.ndarray[Any, Any]
    dtype: str


def parameters_of(arrays: Mapping[Any, Any], wanted: Callable[[str], Any]) -> dict[str, Any]:
    """Return a loaded checkpoint as parameters by name, strings as they are; a name is what follows the first key.

    Takes what `load_arrays` gives, with arrays as `StoredArray`. Lists, dicts and None among the plain values have no
    place in such a dict.
    Raises `StateError` where two parts of the checkpoint have one name.
    """
    found: dict[str, Any] = {}
    for section, inner in arrays.items():
        leaves = _leaves(inner, ()) if isinstance(inner, (dict, list, tuple)) else [((section,), inner)]
        for path, value in leaves:
            name = ".".join(map(str, path))
            if not wanted(name) or not isinstance(value, (StoredArray, np.generic, bool, int, float, str)):
                continue
            if name in found:
                raise StateError(
                    f"two parts of the checkpoint have a {name!r}: load one with ckptengine.load(only=...)"
                )
            found[name] = value if isinstance(value, str) else _parameter(name, value)
    return found


def _leaves(value: Any, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[tuple[Any, ...], Any]] = []
    for key, item in items:
        where = (*path, key)
        found += _leaves(item, where) if isinstance(item, (dict, list, tuple)) else [(where, item)]
    return found


def _parameter(name: str, value: Any) -> Any:
    if isinstance(value, StoredArray):
        # Not held by any name: else MindSpore copies it through a numpy array, which bfloat16 has not with numpy 2.
        parameter = Parameter(as_tensor(value.array, value.dtype))
    else:
        parameter = Parameter(Tensor(value))
    parameter.name = name
    return parameter
