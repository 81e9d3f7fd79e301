"""How objects with `load_state_dict`, and what each rank has of its own, are bound."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ckptengine.errors import CheckpointError, LoadMismatchError
from ckptengine.frameworks.adapter import Adapter
from ckptengine.schema.path import Path, dotted
from ckptengine.schema.type_name import describe_type
from ckptengine.state.bind.extras import items_of, leave_out
from ckptengine.state.bind.groups import saved_groups
from ckptengine.state.bind.rates import Groups, check_rates, other_number, other_order
from ckptengine.state.bind.tensors import TensorBinder
from ckptengine.state.bind.work import OBJECTS, SET
from ckptengine.state.kinds import Inspected, Kind
from ckptengine.state.nested import per_rank_items, replace_contents, take_out
from ckptengine.state.per_rank import PerRank, Resize
from ckptengine.state.saved import Node, own_tree, with_places

__all__ = ["ObjectBinder", "hand_over"]


class ObjectBinder(TensorBinder):
    """Binds what takes its state as a whole."""

    def _bind_object(
        self, target: Any, path: Path, node: Node | None, per_rank: bool, call: Callable[[Any], object] | None = None
    ) -> None:
        """Bind an object; `call` is what takes its state, its `load_state_dict` where it is None."""
        if not self._selection.holds(path):
            self._selection.refuse_part(path)
            return
        current = self._inspector.asked.state_of(target, path)
        inner = [] if per_rank else list(per_rank_items(current, ()))
        if node is None and not (inner and self._source.own.find(path)):
            self._absent(path, per_rank)
            return
        places = (
            with_places(self._source.saved, node, path, (keys for keys, _ in inner), self._source.rename)
            if inner
            else node
        )
        if places is not None and self._another_class(target, path, places):
            return
        reason = None if places is None else other_number(target, current, places)
        if reason is None and places is not None and self._source.regrouped:
            reason = other_order(target, places, self._moved_groups)
        if reason is not None:
            self._mismatch(path, reason, places)
            return
        self._rebuilt.objects[path], self._rebuilt.before[path] = target, current
        if inner and inner[0][0] == ():  # all of its state is the rank's own
            self._bind_per_rank(inner[0][1], path, node)
            self._work.act(OBJECTS, functools.partial(_hand_over_own, target, inner[0][1], path, call))
            return
        rebuilt: Any = {} if places is None else self._rebuild(places, path, current)
        self._found.loaded.append(dotted(path))
        for keys, holder in inner:
            self._bind_per_rank(holder, (*path, *keys), None if node is None else node.find(keys))
        if inner:
            self._work.act(SET, functools.partial(take_out, rebuilt))
        if places is not None and not per_rank and self._options.world_size > 1:
            had = self._source.had.get(path)
            alike = had is not None and self._source.is_split_alike()
            self._rebuilt.items.append(items_of(path, places, current, had, alike))
            self._work.act(SET, functools.partial(leave_out, rebuilt, self._rebuilt.left_out, path))
        self._work.act(OBJECTS, functools.partial(hand_over, target, rebuilt, path, call))
        if self._source.regrouped:
            self._work.act(OBJECTS, functools.partial(check_rates, target, path))

    def _moved_groups(self, optimizer: Any) -> Groups | None:
        """Return the groups that an optimizer is to have, where they are not those that were saved together."""
        for path in self._source.regrouped:
            place = self._source.shared.find(path) if self._rebuilt.objects[path[:-1]] is optimizer else None
            if place is not None and (groups := saved_groups(place)) is not None:
                return [group.others for group in groups]
        return None

    def _bind_loader(self, loader: Any, adapter: Adapter, path: Path, own: Node | None) -> None:
        """As an object in a PerRank; but its state is not asked for, which would start its workers."""
        if not self._selection.holds(path):
            self._selection.refuse_part(path)
        elif own is None:
            self._absent(path, per_rank=True)
        elif reason := adapter.loader_mismatch(
            loader, own.plain_values(), self._source.saved.world_size, self._options.world_size
        ):
            self._mismatch(path, reason, own)
        else:
            rebuilt = self._rebuild(own, path)
            self._rebuilt.derived.append(path)  # it is not asked for its state, so nobody can say what it is now
            self._found.loaded.append(dotted(path))
            self._work.act(OBJECTS, functools.partial(loader.load_state_dict, rebuilt))

    def _bind_per_rank(self, target: PerRank, path: Path, shared: Node | None) -> None:
        own = self._source.own.find(path)
        put = functools.partial(setattr, target, "value")
        if own is None:
            self._bind(target.value, put, path, shared, per_rank=True)
        elif not self._source.resized and target.ranks is None:
            self._bind(target.value, put, path, own, per_rank=True)
        elif self._selection.holds(path):
            self._resize(target, path, own)

    def _resize(self, target: PerRank, path: Path, own: Node) -> None:
        saved_size = self._source.saved.world_size
        found, resize = self._inspector.inspect(target.value, path), target.resize
        if resize is None or found.kind is Kind.OPTIMIZER:
            hint = "an optimizer can't be resized"
            if resize is None:
                hint = "pass PerRank(value, resize=...) to say what becomes of it"
            reason = f"saved per rank by {saved_size} ranks, loaded by {self._options.world_size}"
            self._mismatch(path, f"{reason}; {hint}", own)
            return
        own.use()
        self._rebuilt.derived.append(path)
        mine = 0 if self._source.resized else self._options.rank
        ranks = range(saved_size)
        wanted = (
            ranks if target.ranks is None else target.ranks(saved_size, self._options.rank, self._options.world_size)
        )
        values = []
        for rank in wanted:
            if rank not in ranks:
                raise ValueError(f"{dotted(path)}: PerRank's `ranks` asks for rank {rank} of {saved_size} that saved")
            node = own if rank == mine else own_tree(self._source.saved, rank, self._source.rename).find(path)
            values.append(None if node is None else self._rebuild(node, path))
        self._found.loaded.append(dotted(path))
        self._work.act(SET, functools.partial(self._set_resized, target, resize, values, found, path))

    def _set_resized(self, target: PerRank, resize: Resize, values: list[Any], found: Inspected, path: Path) -> None:
        new = resize(values, self._options.rank, self._options.world_size)
        if found.kind is Kind.MODULE:
            keys = {entry.name: entry.key for entry in self._inspector.entries(target.value, found.adapter, path)}
            found.adapter.load_module(target.value, {keys[name]: item for name, item in new.items()})
        elif found.kind is Kind.OBJECT:
            target.value.load_state_dict(new)
        elif type(target.value) is type(new) and isinstance(new, (dict, list)):
            replace_contents(target.value, new)
        else:
            target.value = new


def _hand_over_own(target: Any, own: PerRank, path: Path, call: Callable[[Any], object] | None) -> None:
    """Give an object what a PerRank holds by then."""
    hand_over(target, own.value, path, call)


def hand_over(target: Any, state: Any, path: Path, call: Callable[[Any], object] | None = None) -> None:
    """Give something its state back, by `call` or its own `load_state_dict`.

    Raises `LoadMismatchError` naming path, class and error where it does not take it.
    """
    try:
        (call or target.load_state_dict)(state)
    except CheckpointError:
        raise
    except Exception as error:
        raise LoadMismatchError(
            f"{dotted(path)}: load_state_dict of {describe_type(target)} refused what was saved: "
            f"{type(error).__name__}: {error}"
        ) from error
