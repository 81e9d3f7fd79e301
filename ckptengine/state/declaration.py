"""Declaring how plain tensors are split over the ranks, for code that splits them by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckptengine.comm.agree import on_all
from ckptengine.comm.base import Communicator
from ckptengine.comm.select import current
from ckptengine.errors import StateError
from ckptengine.frameworks.adapter import Adapter
from ckptengine.schema.path import Path
from ckptengine.schema.type_name import describe_type
from ckptengine.state.declared import refuse_distributed
from ckptengine.state.kinds import Inspector, Kind
from ckptengine.state.meeting import Told, ToldShard, meet
from ckptengine.state.shards import Declaration, Parts, Pattern, Rule, Shard, group_ranks, rules_of

__all__ = ["Sharded"]

_DOING = "declaring how tensors are split"


class Sharded(Declaration):
    """Declare that plain tensors are parts of larger ones, which the ranks split by hand.

    - `value`: a module, a tensor, or a dict or list of these. Put the `Sharded` into the state in its place.
    - `rules`: a dict from names to `ce.Shard`, a list of these (the outermost first), `ce.Renumbered`, or the class
      `ce.PerRank`. Names are dotted names in `value` or the beginnings of them; `*` stands for any text without a dot,
      `**` for any text. Tensors that no name fits stay replicas.
    - `dim`, `group`, `parts`, in place of rules: one `ce.Shard` for all tensors in `value`.
    - `comm`, `timeout` (seconds): as for `ce.save`.
    - `moments`: keys of optimizer states (`["m", "v"]`) that have an element for each of the parameter's. They are
      needed if nothing else tells: a preconditioner of a square part has the part's shape. An error names them.

    What the optimizers in the state keep for these parameters is split in the same way. Collective: all ranks make it,
    together and in the same order, and exchange the lengths of their parts, once. Make it again when tensors change
    their shapes.

    Raises `StateError` on all ranks if a pattern fits nothing on any rank, if two fit one tensor, for DTensors and
    `ShardedArray`, if ranks give different numbers of rules, and if ranks of a group declare different things;
    `DeadlineError` naming the missing ranks; `TypeError` for neither or both of `rules` and `dim` (`RankFailedError` on
    the ranks whose own call is right).
    """

    __slots__ = ()

    def __init__(
        self,
        value: Any,
        rules: Mapping[str, Any] | None = None,
        *,
        dim: int | None = None,
        group: Any = None,
        parts: Parts | None = None,
        moments: Iterable[str] = (),
        comm: Communicator | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.value = value
        comm = current(timeout) if comm is None else comm
        rank, world_size = comm.rank, comm.world_size

        def looked() -> _Look:
            self.moments, self._rules = _moments_of(moments), _rules_of(rules, dim, group, parts)
            look = _Look(self._rules, rank, world_size)
            look.at(value)
            return look

        # What is wrong in the call of one rank is an error on all: they would wait for it.
        look = on_all(comm, looked, timeout, _DOING) if world_size > 1 else looked()
        meeting = meet(comm, look.told(), timeout)
        for number in meeting.unfitted():
            raise StateError(
                f"Sharded: {self._rules[number].pattern.text!r} fits no tensor on any rank; * is any text without a "
                f"dot, ** any text. Rank {comm.rank} has {', '.join(look.names[:8]) or 'no tensors'}"
                + (f" and {len(look.names) - 8} more" if len(look.names) > 8 else "")
            )
        self.own = frozenset(look.own)
        self.cuts = {name: meeting.cut(name) for name in look.leaves}
        self.shifts = {name: meeting.shift(name) for name in look.lists}

    def __repr__(self) -> str:
        return f"Sharded({self.value!r}, {len(self.cuts)} tensors)"


def _moments_of(moments: Iterable[str]) -> frozenset[str]:
    if isinstance(moments, str):
        raise TypeError(f"Sharded: moments={moments!r}; give a list of the keys of states")
    return frozenset(moments)


def _rules_of(rules: Mapping[str, Any] | None, dim: int | None, group: Any, parts: Parts | None) -> list[Rule]:
    if (rules is None) == (dim is None) or (rules is not None and (group is not None or parts is not None)):
        raise TypeError("Sharded: give rules (a dict from names to ce.Shard), or dim=, group= and parts= for all")
    return rules_of(rules) if dim is None else [Rule(Pattern(""), (Shard(dim, group, parts=parts),))]


class _Look:
    """What the rules say of the tensors in a value, on this rank."""

    def __init__(self, rules: list[Rule], rank: int, world_size: int) -> None:
        self._rules, self._rank, self._world_size = rules, rank, world_size
        self._groups: dict[tuple[int, ...], int] = {}
        self._fitted = [False] * len(rules)
        self.names: list[str] = []
        self.own: list[str] = []
        self.leaves: dict[str, tuple[tuple[int, ...], tuple[ToldShard, ...]]] = {}
        self.lists: dict[str, tuple[int, int]] = {}
        for rule in rules:  # in their order: groups have the same numbers on all ranks
            said = [shard.group for shard in rule.shards]
            for group in said if rule.numbered is None else [rule.numbered.group]:
                ranks = group_ranks(group, rank, world_size)
                self._groups.setdefault(ranks, len(self._groups))

    def told(self) -> Told:
        """Return what the other ranks are told."""
        return Told(self.leaves, self.lists, tuple(self._fitted), tuple(self._groups))

    def at(self, value: Any) -> None:
        """Look at everything in a value; raises `StateError` naming what a rule can't hold for."""
        inspector = Inspector()
        if inspector.inspect(value, ()).kind not in (
            Kind.MODULE,
            Kind.TENSOR,
            Kind.WRAPPED,
            Kind.SHARDED,
            Kind.DICT,
            Kind.SEQUENCE,
        ):
            raise StateError(
                f"Sharded: {describe_type(value)} is neither a module nor a tensor, nor a dict or list of these"
            )
        numbers: dict[str, tuple[set[int], int]] = {}
        modules = [prefix for prefix, _ in inspector.named_modules(value, ())]
        for name, tensor, adapter, where in inspector.named_tensors(value, ()):
            self.names.append(name)
            self._number(name, numbers, modules)
            self._leaf(name, tensor, adapter, where)
        for name, (found, group) in numbers.items():
            if found != set(range(len(found))):
                raise StateError(
                    f"Sharded: {name} has the numbers {sorted(found)} on rank {self._rank}; ce.Renumbered is for lists "
                    "that each rank numbers from 0 on"
                )
            self.lists[name] = len(found), group

    def _leaf(self, name: str, tensor: Any, adapter: Adapter | None, where: Path) -> None:
        fitting = [
            number for number, rule in enumerate(self._rules) if rule.numbered is None and rule.pattern.match(name)
        ]
        if not fitting:
            return
        if len(fitting) > 1:
            texts = " and ".join(repr(self._rules[number].pattern.text) for number in fitting)
            raise StateError(f"Sharded: {texts} both fit {name}; let one pattern fit each tensor")
        self._fitted[fitting[0]] = True
        rule = self._rules[fitting[0]]
        refuse_distributed(tensor, adapter, where)
        if rule.own:
            self.own.append(name)
            return
        shape = tuple(tensor.shape)
        self.leaves[name] = shape, tuple(self._told_shard(name, shape, shard, rule) for shard in rule.shards)

    def _told_shard(self, name: str, shape: tuple[int, ...], shard: Shard, rule: Rule) -> ToldShard:
        dim = shard.dim + len(shape) if shard.dim < 0 else shard.dim
        if not 0 <= dim < len(shape):
            which = f"let {rule.pattern.text!r} fit" if rule.pattern.text else "give a dict of patterns for"
            raise StateError(
                f"Sharded: {name or 'the tensor'}: split along dimension {shard.dim}, and it has shape {shape}; "
                f"{which} the tensors that are split along it, by names such as '**.weight'"
            )
        siblings = [one for one in rule.shards if (one.dim + len(shape) if one.dim < 0 else one.dim) == dim]
        parts = {tuple((one.parts or {}).items()) for one in siblings if one.parts}
        if len(parts) > 1:
            raise StateError(
                f"Sharded: {name or 'the tensor'}: two splits of dimension {dim} have different parts; name them in one"
            )
        lengths = shard.lengths(shape[dim])
        if lengths is None:
            raise StateError(
                f"Sharded: {name or 'the tensor'}: a dimension of {shape[dim]} can't be shared by the parts "
                f"{shard.parts} on rank {self._rank}; give sizes in proportion to what a rank has"
            )
        names = shard.parts or {"": 1}
        ranks = group_ranks(shard.group, self._rank, self._world_size)
        return ToldShard(dim, tuple(zip(names, lengths, strict=True)), self._groups[ranks])

    def _number(self, name: str, numbers: dict[str, tuple[set[int], int]], modules: list[str]) -> None:
        for place, rule in enumerate(self._rules):
            fits = None if rule.numbered is None else rule.pattern.match(name)
            if fits is None or rule.numbered is None:
                continue
            number, dot, _ = name[fits.end() + 1 :].partition(".")
            if not (number.isdecimal() and dot):
                raise StateError(
                    f"Sharded: {rule.pattern.text!r} fits {name}, where no number follows; ce.Renumbered is for the "
                    "name of a list of modules, such as '**.experts'"
                )
            # Only a module's own names are changed, so the number must be in these: what precedes them is shorter.
            if not any(name.startswith(prefix) and len(prefix) <= fits.end() + 1 for prefix in modules):
                raise StateError(
                    f"Sharded: {rule.pattern.text!r} fits {name}, which is numbered by a dict or a list, not by a "
                    f"module (rank {self._rank}); pass the module itself, not its state_dict(), and put modules of a "
                    "list into one, such as torch.nn.ModuleList"
                )
            self._fitted[place] = True
            ranks = group_ranks(rule.numbered.group, self._rank, self._world_size)
            found = numbers.setdefault(name[: fits.end()], (set(), self._groups[ranks]))
            if found[1] != self._groups[ranks]:
                raise StateError(f"Sharded: two rules number {name[: fits.end()]} anew; give one")
            found[0].add(int(number))
