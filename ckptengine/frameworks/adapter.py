"""What a framework must tell the engine about its objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptengine.frameworks.random_stream import RandomStream
from ckptengine.schema.box import Box
from ckptengine.schema.leaf import Part, Placement
from ckptengine.schema.path import Path

__all__ = ["ABOUT", "Adapter", "Layouts", "ModuleEntry", "TensorKind", "TensorView"]

TensorKind = bool | dict[str, Any] | None
"""What a tensor is beside its contents: None for a plain one; for a parameter whether it takes a gradient; for others a
JSON object: `grad`, `class` (of a subclass, by its full name), `attributes` (what else it has), `name`."""

ABOUT = "tensor_subclass"
"""The key under which lies, beside the inner tensors of a tensor subclass, what they make."""


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor as the engine sees it.

    `identity` is equal for two tensors that are the same memory seen in the same way, None where nobody can
    say.
    """

    dtype: str
    shape: tuple[int, ...]
    placement: Placement
    parts: tuple[Part, ...]
    identity: Hashable | None


class Layouts(ABC):
    """How the tensors of a job are spread over its ranks, so that new ones are made like them."""

    @abstractmethod
    def new(self, path: Path, dtype: str, shape: tuple[int, ...]) -> Any:
        """Return a tensor of a global shape for what lies at a path of the state, spread and placed like the live
        tensor that it belongs to; None where no live tensor tells.

        Raises `LoadMismatchError` where several tell different things.
        """

    @abstractmethod
    def pattern(self, path: Path, shape: tuple[int, ...]) -> Any:
        """Return the live tensor like which a tensor of a global shape is to be spread, as `new` finds it."""


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One item of a module's state.

    `name` has no wrappers' prefixes, `key` is the module's own. `buffer` marks what ranks may hold differing
    copies of. `live` tells whether the value is the module's own tensor: what isn't goes back through the
    module's calls. `added` marks what earlier versions of the engine did not save beside the others of its owner.
    """

    name: str
    key: str
    value: Any
    buffer: bool
    live: bool
    added: bool = False


class Adapter:
    """One framework's tensors, modules and optimizers; by default it knows none."""

    name: str = ""
    """The name in tags and, unless `container_of` says another, in `ArrayLeaf.container`."""
    shortages: tuple[type[Exception], ...] = (MemoryError,)
    """What is raised where there is no memory for a new tensor."""

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is one of the framework's tensors."""
        return False

    def container_of(self, tensor: Any) -> str:
        """Return the name of the framework that a tensor is stored as one of."""
        return self.name

    def view(self, tensor: Any, path: Path, *, target: bool) -> TensorView:
        """Return dtype, global shape, and this rank's parts; `target` asks for memory that may be written.

        Raises `StateError` naming the path where the tensor can't be saved, or can't be filled in place.
        """
        raise NotImplementedError

    def is_spread(self, tensor: Any) -> bool:
        """Whether a tensor says itself how it is spread over the ranks."""
        return False

    def part_of(self, tensor: Any, box: Box) -> Any:
        """Return a view of a box of a tensor, None where the framework gives none."""
        return None

    def group_ranks(self, group: Any) -> Sequence[int] | None:
        """Return the global ranks of one of the framework's groups in its order, None where it is none."""
        return None

    def fingerprints(self, tensors: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Return what of a tensor can change while it stays the same object: columns, one item for each tensor.

        That is the address of its memory, its shape, its strides and its dtype, and whatever else a view depends on.
        """
        raise NotImplementedError

    def aliases(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return for each tensor what owns the memory of its one part (`DeviceMemory.alias`), where it lies now."""
        raise NotImplementedError

    def versions(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return a number for each tensor that changes when it is written to, as far as the framework counts that."""
        return [0] * len(tensors)

    def empty(self, dtype: str, shape: tuple[int, ...]) -> Any:
        """Return a new tensor in host memory, contents undefined."""
        raise NotImplementedError

    def is_wrapped(self, tensor: Any) -> bool:
        """Whether a tensor is made of other tensors, which are leaves of their own."""
        return False

    def unwrap(self, tensor: Any, path: Path) -> dict[str, Any]:
        """Return the inner tensors by name (`ShardedArray` for parts), and under `ABOUT` plain values that say what
        they make."""
        raise NotImplementedError

    def new_wrapped(
        self, about: Any, arrays: Mapping[str, tuple[str, tuple[int, ...]]], parameter: Any, path: Path
    ) -> Any:
        """Return a new tensor that `unwrap` says this of, with inner tensors of these dtypes and global shapes, spread
        like a parameter (None: whole); raises `LoadMismatchError` naming the path where that can't be done."""
        raise NotImplementedError

    def new_like(self, tensor: Any, order: tuple[int, ...] | None) -> Any:
        """Return a new tensor like this one (dtype, shape, device, distribution), contents undefined.

        `order` are its dimensions from the outermost in memory to the innermost, None for C order; a framework without
        strides has only that.
        """
        view = self.view(tensor, (), target=False)
        return self.empty(view.dtype, view.shape)

    def tensor_kind(self, tensor: Any) -> TensorKind:
        """Return what a tensor is beside its contents; only for one that is in no module, where the module knows."""
        return None

    def kind_marks(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Return what of `tensor_kind` can change while a tensor stays of its class, one item for each."""
        return ()

    def as_kind(self, tensor: Any, kind: TensorKind, path: Path) -> Any:
        """Return a tensor that is filled later as what `tensor_kind` told of; it may lie in other memory.

        Raises `LoadMismatchError` naming the path where that can't be made.
        """
        return tensor

    def replacement(self, tensor: Any) -> Any:
        """Return a new tensor to fill in place of one that can't be written to, None where it can."""
        return None

    def layouts(self, tensors: Sequence[tuple[Path, Any]]) -> Layouts | None:
        """Return how tensors, given with their paths, are spread; None where the framework's own don't tell."""
        return None

    def convert(self, tensor: Any, buffers: Sequence[np.ndarray[Any, Any]], dtype: str) -> None:
        """Fill a tensor from host buffers of another dtype, one for each of `view`'s parts, in order."""
        raise NotImplementedError

    def is_module(self, value: Any) -> bool:
        """Whether a value is a module: named parameters and buffers that are filled in place."""
        return False

    def check_module(self, module: Any, path: Path) -> None:
        """Raise `StateError` where a module must not be asked for its state."""

    def module_values(self, module: Any) -> Mapping[str, Any]:
        """Return the module's live state by its own keys, in its own order, as fast as the framework can."""
        raise NotImplementedError

    def module_entries(self, module: Any, path: Path, values: Mapping[str, Any]) -> list[ModuleEntry]:
        """Return what the values that the module has given are, in their order."""
        raise NotImplementedError

    def module_tensors(self, module: Any) -> Iterable[Any]:
        """Return the tensors that a module has now, without calling anything that its class may have changed."""
        return ()

    def dtype_without_memory(self, tensor: Any) -> str | None:
        """Return the dtype of a tensor that has a shape and no memory (torch's meta device), None of all others."""
        return None

    def give_memory(self, tensor: Any, dtype: str, cast: bool) -> Callable[[], bool] | None:
        """Give a tensor without memory some, in place, contents undefined, to be filled with what has a dtype.

        It stays as it is where that can't be done, and, without `cast`, where it has another dtype.
        Returns what takes the memory away again and says whether it could, None where none was given.
        """
        return None

    def unsaved_without_memory(self, module: Any) -> list[str]:
        """Return the names of a module's tensors without memory that its state does not have."""
        return []

    def plain_counters(self, value: Any) -> Iterable[tuple[str, Any, dict[str, int]]]:
        """Return the ints in attributes of an optimizer, or of a module and of each in it, that no state holds.

        Each time the dotted name in the module, the owner and its ints. What the framework's own classes keep is none.
        """
        return ()

    def module_loading(self, module: Any) -> frozenset[str] | None:
        """Return None where a module has no loading code of its own, that must run after the fill.

        Else the names of the submodules in it whose tensors may change their shapes by that.
        """
        return None

    def state_owners(self, module: Any) -> Iterable[tuple[str, Any, Any]]:
        """Return, of an optimizer that is a module, what it keeps for its parameters: name, tensor, parameter."""
        return ()

    def load_module(self, module: Any, entries: Mapping[str, Any]) -> Sequence[str]:
        """Have a module's loading code run, and hand over what could not be filled in place, by the module's own keys.

        Returns the keys that it did not take.
        """
        raise NotImplementedError

    def is_optimizer(self, value: Any) -> bool:
        """Whether a value is an optimizer: state by parameter, and groups of hyperparameters."""
        return False

    def bare_name(self, name: str) -> str:
        """Return a name that a user gave a parameter without what wrappers put before the module's own."""
        return name

    def optimizer_groups(self, optimizer: Any) -> list[dict[str, Any]]:
        """Return the live groups; each has its parameters under `params`, the same objects each time.

        Of a parameter that is several, laid one behind the other, it has these.
        """
        raise NotImplementedError

    def bare_optimizer(self, optimizer: Any) -> Any:
        """Return what says by its class what an optimizer's state means: of one that only spreads the state of another
        over the ranks, that other."""
        return optimizer

    def has_one_state(self, optimizer: Any) -> bool:
        """Whether an optimizer keeps one state for all of its parameters, after each other, under the first."""
        return False

    def states_elsewhere(self, optimizer: Any, parameters: Iterable[Any]) -> frozenset[int]:
        """Return, by `id`, the parameters of whose state this rank never has anything, since other ranks do."""
        return frozenset()

    def finish_states(self, optimizer: Any, groups: Sequence[dict[str, Any]], path: Path) -> None:
        """Do what is to be done once the states of all parameters are set; `groups` are those of `optimizer_groups`.

        Raises `LoadMismatchError` naming the path where the states that were set do not fit together.
        """

    def optimizer_state(self, optimizer: Any, parameter: Any) -> dict[str, Any] | None:
        """Return the live state of one parameter, None where it has none; creates nothing."""
        raise NotImplementedError

    def optimizer_states(self, optimizer: Any, parameters: Sequence[Any]) -> list[dict[str, Any] | None] | None:
        """Return `optimizer_state` of each parameter; None where the optimizer has state for anything else."""
        return [self.optimizer_state(optimizer, parameter) for parameter in parameters]

    def check_optimizer(self, optimizer: Any, path: Path) -> None:
        """Raise `StateError` where the state can't be told apart by parameter, or by placement."""

    def check_parameter_state(self, parameter: Any, state: Mapping[Any, Any], path: Path) -> None:
        """Raise `StateError` where it can't be known how a parameter's state is spread over the ranks."""

    def saves_itself(self, optimizer: Any) -> bool:
        """Whether what an optimizer's `state_dict` gives is saved, since it may be more than its state and groups."""
        return False

    def loads_itself(self, optimizer: Any) -> bool:
        """Whether an optimizer's `load_state_dict` must be called, since it may do more than to set these."""
        return False

    def hand_over(self, optimizer: Any, state: Any | None) -> None:
        """Call an optimizer's `load_state_dict`; with its own state where `state` is None."""
        raise NotImplementedError

    def set_optimizer_state(self, optimizer: Any, parameter: Any, state: dict[str, Any] | None) -> None:
        """Replace the state of one parameter; None removes it."""
        raise NotImplementedError

    def pin_host_memory(self, address: int, nbytes: int) -> Callable[[], None] | None:
        """Pin host memory for copies from devices, and return what undoes it; None where that is not possible."""
        return None

    def at_rest(self) -> AbstractContextManager[Any]:
        """Return a context in which no module computes: what is found out about all tensors may be kept for it."""
        return nullcontext()

    def same_device(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return what makes the calling thread's device current for a `with` block of another thread."""
        return nullcontext

    def before_optimizer_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have something called before any of the framework's optimizers steps; return what undoes it."""
        return lambda: None

    def set_hyperparameter(self, group: dict[str, Any], key: str, value: Any, cast: bool) -> None:
        """Set one value of a group, in place where the group holds a tensor that can hold it, or with `cast`."""
        raise NotImplementedError

    def new_state_tensor(
        self,
        group: dict[str, Any],
        parameter: Any,
        key: str,
        dtype: str,
        shape: tuple[int, ...],
        spread: str | None = None,
    ) -> Any:
        """Return a tensor for one item of a parameter's state, placed as the optimizer would place it.

        `spread` is what `state_spread` said of the saved one.
        """
        raise NotImplementedError

    def state_spread(self, parameter: Any, key: str, tensor: Any) -> str | None:
        """Return how an item of a parameter's state is spread over the ranks: `plain`, `replicated` or `parameter`.

        None where `new_state_tensor` makes it so without being told.
        """
        return None

    def encode_value(self, value: Any) -> tuple[str, Any] | None:
        """Return kind (`dtype`, `size`, `device`) and payload of a framework's plain value, or None."""
        return None

    def decode_value(self, kind: str, payload: Any) -> Any:
        """Return the plain value; raises `ValueError` or `AttributeError` where there is no such thing."""
        raise ValueError(kind)

    def tensor_of(self, array: np.ndarray[Any, Any], dtype: str) -> Any:
        """Return an array's memory as a tensor of a logical dtype."""
        raise NotImplementedError

    def make_loader(self, dataset: Any, plan: Iterable[Any], options: dict[str, Any]) -> Any:
        """Return the framework's data loader whose k-th item is `dataset[key]` for the k-th key of `plan`.

        `options` are any others of that loader; raises `TypeError` for one that would change which items come.
        """
        raise NotImplementedError

    def is_stateful_loader(self, value: Any) -> bool:
        """Whether a value is a data loader whose `state_dict` is one rank's place in the data; imports nothing."""
        return False

    def loader_mismatch(
        self, loader: Any, saved: Mapping[Path, Any], saved_world_size: int, world_size: int
    ) -> str | None:
        """Return why such a loader can't go on from a state, and what to do; None where it can.

        `saved` are the plain values of the state by their paths in it.
        """
        return None

    def random_streams(self) -> dict[str, RandomStream]:
        """Return the random streams of the process that the framework draws from, by name, `torch.cpu`."""
        return {}

    def unused_random_stream(self, name: str) -> RandomStream | None:
        """Return a stream that the process could use and does not use yet; None where there is none of that name."""
        return None

    def random_stream_of(self, generator: Any) -> RandomStream | None:
        """Return the stream of one of the framework's generators, None for anything else."""
        return None
