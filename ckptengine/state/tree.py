"""From the user's state to leaves, and from leaves to nested dicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckptengine.errors import CheckpointDamagedError, StateError
from ckptengine.frameworks.adapter import ABOUT, Adapter, TensorView
from ckptengine.frameworks.registry import adapter_of_loader, at_rest
from ckptengine.schema.head import MAX_NDIM
from ckptengine.schema.leaf import ArrayLeaf, Placement
from ckptengine.schema.path import Key, Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.asked import Asked
from ckptengine.state.cut import Cut, cut_view
from ckptengine.state.forms import Form, container_kind, form_of, rebuild
from ckptengine.state.kinds import Inspector, Kind, children, optimizer_names
from ckptengine.state.outline import Container, Outline, class_name, part_order, sorted_keys
from ckptengine.state.own_state import GROUPS, STATE, named_state, numbered, numbers_of, parts_of
from ckptengine.state.per_rank import PerRank
from ckptengine.state.sharded import ShardedArray
from ckptengine.state.steps import (
    AbsentStep,
    DeclaredStep,
    DictStep,
    ModuleStep,
    ObjectStep,
    OptimizerStep,
    OwnOptimizerStep,
    PerRankStep,
    PlainStep,
    SequenceStep,
    ShardedStep,
    Step,
    TensorStep,
    WrappedStep,
)
from ckptengine.state.trace import Trace, head_of
from ckptengine.state.values import MAX_DEPTH
from ckptengine.state.walked import Leaves, Side

__all__ = ["FlatState", "Wanted", "flatten", "flatten_loaded", "flatten_traced", "sharded_parts", "unflatten"]


Wanted = Callable[[Any, Path], bool]


@dataclass(frozen=True, slots=True)
class FlatState:
    """A state as leaves.

    `arrays` are in the order in which they were met. `values` and `rank_values` are the user's own plain
    values, not copied and not yet checked: `encode` does both. `aliases` leads from each further path of tied
    memory to its first path. `containers` has the forms of those that were walked;
    `rank_containers` the same inside `PerRank`. `outline` and `rank_outline` say how the state is built, so that what
    is built from a checkpoint can be built, and checked, in the same way. `empty` has the classes of modules and
    objects that gave nothing to save, `groups` the paths of the optimizers' groups, whose parameters are named.
    """

    arrays: tuple[ArrayLeaf, ...]
    values: dict[Path, Any]
    rank_values: dict[Path, Any]
    aliases: dict[Path, Path]
    containers: dict[Path, Form]
    rank_containers: dict[Path, Form]
    outline: Outline = field(default_factory=Outline)
    rank_outline: Outline = field(default_factory=Outline)
    empty: dict[Path, str] = field(default_factory=dict)
    groups: tuple[Path, ...] = ()


def flatten(state: Mapping[str, Any]) -> FlatState:
    """Return the leaves of a state; changes nothing.

    Takes a mapping with keys that are str or int. Raises `StateError` naming path and type of what can't be
    saved (what is wrong inside a plain value is found by `encode`).
    """
    return flatten_traced(state)[0]


def flatten_traced(state: Mapping[str, Any], asked: Asked | None = None) -> tuple[FlatState, Trace]:
    """Return `flatten`'s leaves, and the trace by which the next state is compared with this one.

    Modules and objects that are in `asked` are not asked again.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"the state is {describe_type(state)}; pass a dict such as {{'model': model}}")
    with at_rest():
        walk = _Walk(state, Asked() if asked is None else asked)
    return walk.result(), walk.trace()


def flatten_loaded(
    state: Mapping[str, Any], wanted: Wanted, views: Callable[[], Mapping[int, TensorView]]
) -> FlatState:
    """Return `flatten`'s leaves of what is wanted, given a value and its path; nothing else is looked at.

    `views` is called once, when everything in the state has been asked, and gives the views that are known by the `id`
    of their tensors, which it keeps alive.
    """
    with at_rest():
        return _Walk(state, Asked(), wanted, views).result()


def sharded_parts(array: ShardedArray, path: Path, *, target: bool) -> TensorView:
    """Return a hand-sharded array's view: the local part's memory at its place in the global array."""
    return replace(cut_view(array.cut, array.adapter, array.local, path, target=target), identity=None)


class _Walk:
    """One walk over a state."""

    def __init__(
        self,
        state: Mapping[str, Any],
        asked: Asked,
        wanted: Wanted | None = None,
        views: Callable[[], Mapping[int, TensorView]] = dict,
    ) -> None:
        self._inspector = Inspector(asked)
        self._wanted = wanted
        self._inspector.ask(state, wanted=wanted or (lambda value, path: True))
        self._views = views()
        self._inspector.declare(state)
        self._names = self._inspector.parameter_names(state)
        self._sides = Side(), Side()
        """What ranks share, and what this rank has of its own."""
        self._leaves = Leaves()
        self._empty: dict[Path, str] = {}
        self._groups: list[Path] = []  # of optimizers
        self._in_module = False
        self._objects = 0  # those that the walk is in
        self._declarations = 0  # those that the walk is in
        self._sequences = 0  # lists and tuples that the walk is in, within the innermost object
        self._root = self._visit_items(state, (), per_rank=False)
        if wanted is None:  # nothing is saved of a state that was loaded: nothing waits for its copy
            self._leaves.fence()

    def result(self) -> FlatState:
        """Return what was found."""
        shared, own = self._sides
        return FlatState(
            arrays=tuple(self._leaves.arrays),
            values=shared.values,
            rank_values=own.values,
            aliases=self._leaves.aliases,
            containers=shared.forms,
            rank_containers=own.forms,
            outline=shared.outline(),
            rank_outline=own.outline(),
            empty=self._empty,
            groups=tuple(self._groups),
        )

    def trace(self) -> Trace:
        """Return what was met."""
        return self._leaves.trace(self._root)

    def _visit(self, value: Any, path: Path, *, per_rank: bool, buffer: bool = False) -> Step:
        if len(path) > MAX_DEPTH:
            raise StateError(f"{dotted(path[:3])}…: nested more than {MAX_DEPTH} deep (or inside itself); flatten it")
        if self._wanted is not None and not self._wanted(value, path):
            return PlainStep(path, per_rank)
        found = self._inspector.inspect(value, path)
        match found.kind:
            case Kind.PLAIN:
                self._sides[per_rank].values[path] = value
                return PlainStep(path, per_rank)
            case Kind.TENSOR:
                view = self._views.get(id(value)) or self._inspector.view(value, found.adapter, path, target=False)
                per_rank = per_rank or self._inspector.declared.is_own(value)
                cut = self._inspector.declared.cut_of(value)
                self._add(value, view, found.adapter, path, per_rank=per_rank, buffer=buffer, cut=cut)
                if cut is not None and cut.spread is not None:
                    self._sides[per_rank].spreads[path] = cut.spread
                if self._wanted is None and not self._in_module:
                    self._note_kind(value, found.adapter, path, per_rank)
                return TensorStep(type(value))
            case Kind.WRAPPED:
                inner = found.adapter.unwrap(value, path)
                self._sides[per_rank].values[(*path, ABOUT)] = inner.pop(ABOUT)
                parts = {k: self._visit(v, (*path, k), per_rank=per_rank, buffer=buffer) for k, v in inner.items()}
                return WrappedStep(type(value), found.adapter, path, parts, per_rank)
            case Kind.SHARDED:
                if per_rank:
                    raise StateError(f"{dotted(path)}: a ShardedArray inside PerRank; pass its local part instead")
                view = sharded_parts(value, path, target=False)
                self._add(value.local, view, found.adapter, path, cut=value.cut)
                return ShardedStep(value)
            case Kind.PER_RANK:
                if per_rank:
                    raise StateError(f"{dotted(path)}: a PerRank inside a PerRank; remove the inner one")
                if self._objects and self._sequences:  # a load finds it by its keys in what state_dict() gives
                    raise StateError(
                        f"{dotted(path)}: a PerRank in a list or tuple that state_dict() gives, where a load can't "
                        "find it; put the whole list into a PerRank, or have state_dict() give a dict"
                    )
                return PerRankStep(type(value), self._visit(value.value, path, per_rank=True))
            case Kind.DECLARED:
                if per_rank or self._objects:
                    inside = "PerRank" if per_rank else "what state_dict() gives"
                    raise StateError(f"{dotted(path)}: a ce.Sharded in {inside}; put it into the state itself")
                self._declarations += 1
                declared = self._visit(value.value, path, per_rank=per_rank)
                self._declarations -= 1
                return DeclaredStep(value, declared)
            case Kind.MODULE:
                steps: dict[Any, Step] = {}
                entries = self._inspector.entries(value, found.adapter, path)
                if not entries:
                    self._empty[path] = class_name(value)
                self._build(path, "module", per_rank, keys=[entry.name for entry in entries])
                for entry in entries:
                    where = (*path, entry.name)
                    self._in_module = entry.live  # extra state is made anew
                    steps[entry.key] = self._visit(entry.value, where, per_rank=per_rank, buffer=entry.buffer)
                self._in_module = False
                return ModuleStep(value, found.adapter, steps, path)
            case Kind.OPTIMIZER:
                if found.adapter.saves_itself(value):
                    return self._visit_own_optimizer(value, found.adapter, path, per_rank)
                return self._visit_optimizer(value, found.adapter, path, per_rank)
            case Kind.OBJECT:
                per_rank = per_rank or adapter_of_loader(value) is not None
                self._build(path, "object", per_rank, class_name(value))
                own = self._inspector.asked.state_of(value, path)
                if isinstance(own, Mapping) and not own:
                    self._empty[path] = class_name(value)
                given = own.value if isinstance(own, PerRank) else own
                if self._inspector.inspect(given, path).kind in (Kind.OBJECT, Kind.MODULE, Kind.OPTIMIZER):
                    raise StateError(
                        f"{dotted(path)}: state_dict() of {describe_type(value)} gives a {describe_type(given)} "
                        "itself, which would be loaded in its place; have it give a dict with that in it"
                    )
                self._objects, self._sequences, outside = self._objects + 1, 0, self._sequences
                step = ObjectStep(type(value), self._visit(own, path, per_rank=per_rank), path)
                self._objects, self._sequences = self._objects - 1, outside
                return step
            case Kind.DICT | Kind.SEQUENCE:
                form = form_of(value, path)
                if form is not None and path:
                    self._sides[per_rank].forms[path] = form
                return self._visit_items(value, path, per_rank)

    def _note_kind(self, tensor: Any, adapter: Adapter, path: Path, per_rank: bool) -> None:
        """Note what a tensor that was just added is beside its contents, for it may be made anew."""
        self._leaves.free.append(len(self._leaves.visited) - 1)
        kind = adapter.tensor_kind(tensor)
        if kind is None:
            return
        if isinstance(kind, dict) and kind.get("attributes") and self._objects:
            raise StateError(
                f"{dotted(path)}: {describe_type(tensor)} has attributes beside its contents "
                f"({', '.join(kind['attributes'])}), which would be lost; put a plain tensor and them into the state"
            )
        self._sides[per_rank].kinds[path] = kind

    def _build(self, path: Path, kind: str, per_rank: bool, cls: str = "", keys: Iterable[Key] | None = None) -> None:
        """Note a container; keys that are sorted anyway are not worth a note."""
        order = None if keys is None else tuple(keys)
        if order is not None and list(order) == sorted_keys(order):
            order = None
        self._sides[per_rank].containers.append(Container(path, kind, cls, order))

    def _visit_items(self, value: Any, path: Path, per_rank: bool) -> DictStep | SequenceStep:
        items = children(value, path)
        keys = [key for key, _ in items] if isinstance(value, Mapping) else None
        self._build(path, container_kind(value), per_rank, keys=keys)
        if type(value) is OrderedDict and getattr(value, "_metadata", None) is not None:
            self._sides[per_rank].metadata[path] = vars(value)["_metadata"]
        self._sequences += keys is None
        steps = [self._visit(item, (*path, key), per_rank=per_rank) for key, item in items]
        self._sequences -= keys is None
        if isinstance(value, Mapping):
            return DictStep.of(value, steps)
        return SequenceStep(type(value), steps, getattr(value, "maxlen", None))

    def _add(
        self,
        tensor: Any,
        view: TensorView,
        adapter: Adapter,
        path: Path,
        *,
        per_rank: bool = False,
        buffer: bool = False,
        cut: Cut | None = None,
    ) -> None:
        placement, parts, identity, shape = view.placement, view.parts, view.identity, view.shape
        if per_rank:
            if placement is Placement.SHARDED:
                raise StateError(f"{dotted(path)}: a distributed tensor inside PerRank; remove the PerRank")
            placement, identity = Placement.PER_RANK, None
        saves = self._wanted is None  # else nothing is stored of it, and no later walk is compared with this one
        if saves and parts and (order := part_order(parts[0])) is not None:
            self._sides[per_rank].orders[path] = order
        if len(shape) > MAX_NDIM:
            raise StateError(
                f"{dotted(path)}: a tensor of {len(shape)} dimensions; {MAX_NDIM} is the most that can be saved"
            )
        if buffer and placement is Placement.REPLICATED:
            placement = Placement.WHOLE
        kind = {
            "by_hand": cut is not None and placement is Placement.SHARDED,
            "undeclared": self._declarations > 0 and placement is Placement.WHOLE,
        }
        container = adapter.container_of(tensor)
        leaf = ArrayLeaf(path, view.dtype, shape, placement, parts, container, **kind)
        head = head_of(view.dtype, view.shape, view.placement, view.parts) if saves else ()
        self._leaves.add(tensor, adapter, leaf, identity, cut, head)

    def _visit_own_optimizer(self, optimizer: Any, adapter: Adapter, path: Path, per_rank: bool) -> OwnOptimizerStep:
        """An optimizer that says of itself what it needs; its parameters still have their names in that."""
        adapter.check_optimizer(optimizer, path)
        groups = adapter.optimizer_groups(optimizer)
        names = optimizer_names(groups, self._names)
        own = self._inspector.asked.state_of(optimizer, path)
        parts = parts_of(own, groups)
        owners: dict[Path, Any] = {}
        states = {} if parts is None else parts[0]
        moments = self._inspector.declared.moments((p, states.get(number)) for p, number in numbered(groups))
        for group, group_names, numbers in zip(groups, names, numbers_of(groups), strict=True):
            for parameter, name, number in zip(group["params"], group_names, numbers, strict=True):
                self._leaves.stepped.add(id(parameter))
                owners[(*path, STATE, name)] = parameter
                if states.get(number):
                    self._inspector.declared.add_state(parameter, states[number], (*path, STATE, name), moments)
                    adapter.check_parameter_state(parameter, states[number], path)
                    self._note_shape(parameter, (*path, STATE, name), per_rank)
        self._build(path, "object", per_rank, class_name(optimizer))
        first = len(self._leaves.visited)
        self._objects += 1
        inner = self._visit(named_state(own, groups, names), path, per_rank=per_rank)
        self._objects -= 1
        if parts is not None:
            self._note_spreads(adapter, owners, first, per_rank)
            self._groups += () if per_rank else ((*path, GROUPS),)
        return OwnOptimizerStep(optimizer, adapter, names, inner, path)

    def _note_shape(self, parameter: Any, path: Path, per_rank: bool) -> None:
        """Note the shape of a parameter that is not itself in the state: its own state need not have it."""
        if id(parameter) not in self._names:
            self._sides[per_rank].shapes[path] = self._inspector.declared.shape_of(parameter)

    def _note_spreads(self, adapter: Adapter, owners: Mapping[Path, Any], first: int, per_rank: bool) -> None:
        """Note how the tensors of parameters' states are spread, given the parameters by the paths of their states."""
        depth, side = len(next(iter(owners), ())), self._sides[per_rank]
        for one in self._leaves.visited[first:]:
            parameter, where = owners.get(one.path[:depth]), one.path[-1]
            if parameter is None or one.adapter is not adapter or (*one.path[:-1], ABOUT) in side.values:
                continue  # what a tensor subclass is made of is spread as that is
            spread = adapter.state_spread(parameter, str(where), one.tensor)
            if spread is not None:
                side.spreads[one.path] = spread

    def _visit_optimizer(self, optimizer: Any, adapter: Adapter, path: Path, per_rank: bool) -> OptimizerStep:
        adapter.check_optimizer(optimizer, path)
        groups = adapter.optimizer_groups(optimizer)
        names = optimizer_names(groups, self._names)
        states: list[Step] = []
        self._build(
            path, "optimizer", per_rank, class_name(adapter.bare_optimizer(optimizer)), ("state", "param_groups")
        )
        held = [
            n
            for g, ns in zip(groups, names, strict=True)
            for p, n in zip(g["params"], ns, strict=True)
            if adapter.optimizer_state(optimizer, p) is not None
        ]
        self._build((*path, "state"), "dict", per_rank, keys=held)
        side = self._sides[per_rank]
        empty = side.empty = side.empty or []
        first, owners = len(self._leaves.visited), {}
        moments = self._inspector.declared.moments(
            (p, adapter.optimizer_state(optimizer, p)) for group in groups for p in group["params"]
        )
        for group, group_names in zip(groups, names, strict=True):
            for parameter, name in zip(group["params"], group_names, strict=True):
                before = len(self._leaves.arrays)
                owners[(*path, "state", name)] = parameter
                self._leaves.stepped.add(id(parameter))
                state = adapter.optimizer_state(optimizer, parameter)
                if state is None:
                    states.append(AbsentStep())
                    continue
                self._inspector.declared.add_state(parameter, state, (*path, "state", name), moments)
                own = per_rank or self._inspector.declared.is_own(parameter)
                states.append(self._visit_items(state, (*path, "state", name), own))
                self._leaves.states.update(range(before, len(self._leaves.arrays)))
                if state:
                    self._note_shape(parameter, (*path, "state", name), per_rank)
                else:
                    empty.append((*path, "state", name))
        self._note_spreads(adapter, owners, first, per_rank)
        plain_groups = [{**group, "params": group_names} for group, group_names in zip(groups, names, strict=True)]
        group_step = self._visit(plain_groups, (*path, GROUPS), per_rank=per_rank)
        self._groups += () if per_rank else ((*path, GROUPS),)
        return OptimizerStep(optimizer, adapter, names, states, group_step)


def unflatten(
    values: Mapping[Path, Any],
    arrays: Mapping[Path, Any],
    containers: Mapping[Path, Form],
    aliases: Mapping[Path, Path],
) -> dict[Key, Any]:
    """Return leaves as nested dicts, with lists and tuples where the state had them.

    Takes plain values and arrays by path; an alias gives the same object as its first path (and nothing where
    that was left out). A sequence of which some items were left out comes as a dict from number to item.
    Raises `CheckpointDamagedError` where one leaf's path leads through another leaf.
    """
    leaves = {**values, **arrays}
    leaves.update({path: leaves[first] for path, first in aliases.items() if first in leaves})
    root: dict[Key, Any] = {}
    inner: dict[Path, dict[Key, Any]] = {(): root}
    for path, leaf in leaves.items():
        if not 0 < len(path) <= MAX_DEPTH:
            raise CheckpointDamagedError(f"a leaf's path has {len(path)} keys; from 1 to {MAX_DEPTH} are possible")
        if path in inner:
            raise CheckpointDamagedError(f"the leaf {dotted(path)} has other leaves inside it")
        for depth in range(1, len(path)):
            if path[:depth] in leaves:
                raise CheckpointDamagedError(f"the leaf {dotted(path[:depth])} has other leaves inside it")
            if path[:depth] not in inner:
                inner[path[:depth]] = inner[path[: depth - 1]][path[depth - 1]] = {}
        inner[path[:-1]][path[-1]] = leaf
    for path in sorted(containers, key=len, reverse=True):  # the inner ones first
        items = inner.get(path)
        if path and items is not None:
            inner[path[:-1]][path[-1]] = rebuild(containers[path], items, None, path, strict=False)
    return root
