"""When to save and what to keep: small frozen rules that can be combined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.catalog.keep import Best, Keep, KeepEvery, KeepLast, KeepRule, checked_steps
from ckptengine.policy.interval import Auto, seconds_of

__all__ = ["AtSteps", "Every", "Policy", "SaveRule"]


@dataclass(frozen=True, slots=True)
class Every:
    """Save at each multiple of a number of steps, `Every(100)`, or after a time, `Every("10min")` (rank 0's clock).

    The units of a time are `s`, `min`, `h` and `d`. Raises `ValueError` for any other interval.
    """

    interval: int | str

    def __post_init__(self) -> None:
        if self.steps is None and not self.seconds:
            raise ValueError(
                f'every={self.interval!r}: give a number of steps, a time such as "90s", "10min" or "2h", "auto", or '
                "an Auto"
            )

    @property
    def steps(self) -> int | None:
        """The number of steps, None where the interval is a time."""
        whole = isinstance(self.interval, int) and not isinstance(self.interval, bool) and self.interval > 0
        return self.interval if whole and isinstance(self.interval, int) else None

    @property
    def seconds(self) -> float | None:
        """The time in seconds, None where the interval is a number of steps."""
        return seconds_of(self.interval) if isinstance(self.interval, str) else None

    def __str__(self) -> str:
        return f"every {self.interval}{'' if self.steps is None else ' steps'}"


@dataclass(frozen=True, slots=True)
class AtSteps:
    """Save after these steps: `AtSteps([1000, 5000])`. Raises the same errors as `KeepSteps`."""

    steps: Iterable[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", checked_steps(self.steps))

    def __str__(self) -> str:
        return f"after the steps {', '.join(map(str, sorted(self.steps)))}"


SaveRule = Every | AtSteps | Auto


@dataclass(frozen=True, slots=True)
class Policy:
    """Say when to save and which checkpoints to keep, for `Checkpointer(policy=...)`.

    - `save`: one or several of `Every`, `AtSteps` and `Auto`. A save is due when any of them says so. Of an `Auto` and
      times, the shortest counts. Without a rule, only `Checkpointer.save` saves.
    - `keep`: one or several of `KeepLast`, `KeepEvery`, `KeepSteps` and `Best`. A checkpoint that any of them keeps
      stays, and the newest always stays. Without a rule, everything stays. A dict gives each tier its own rules, under
      the names `memory`, `local`, and `run` or the URL's protocol; a tier that is not in the dict keeps everything. An
      object of your own with the method `kept` of `KeepRule` is a rule, too.

        Policy(save=[Every(1000), Every("10min")], keep=[KeepLast(3), KeepEvery(10_000), Best("loss")])

    Raises `TypeError` for anything that is not a rule, `ValueError` for more than one `Auto`.
    """

    save: SaveRule | Sequence[SaveRule] = ()
    keep: KeepRule | Sequence[KeepRule] | Mapping[str, KeepRule | Sequence[KeepRule]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "save", self.save_rules)
        object.__setattr__(self, "keep", self.keep_rules)

    @property
    def save_rules(self) -> tuple[SaveRule, ...]:
        """The rules by which a save is due."""
        return _save_rules(self.save)

    @property
    def keep_rules(self) -> Keep:
        """The rules by which checkpoints are kept."""
        if not isinstance(self.keep, Mapping):
            return _keep_rules(self.keep)
        wrong = next((name for name in self.keep if not isinstance(name, str)), None)
        if wrong is not None:
            raise TypeError(f"keep has the key {wrong!r}: its keys are names of tiers, such as 'local'")
        return {name: _keep_rules(rules) for name, rules in self.keep.items()}

    @classmethod
    def of(
        cls,
        every: int | str | Auto | None = None,
        keep_last: int | Mapping[str, int] | None = None,
        keep_every: int | None = None,
        best: Sequence[Best] = (),
    ) -> Policy:
        """Return what the short arguments of a Checkpointer stand for: beside `keep_last` the others keep more."""
        save: tuple[SaveRule, ...] = ()
        if every is not None:
            save = (Auto() if every == "auto" else every if isinstance(every, Auto) else Every(every),)
        more: tuple[KeepRule, ...] = (*([] if keep_every is None else [KeepEvery(keep_every)]), *best)
        if isinstance(keep_last, Mapping):
            return cls(save, {name: (KeepLast(count), *more) for name, count in keep_last.items()})
        return cls(save, () if keep_last is None else (KeepLast(keep_last), *more))

    def describe(self) -> str:
        """Return in words when a save is due."""
        return " and ".join(map(str, self.save_rules))


def _save_rules(rules: Any) -> tuple[SaveRule, ...]:
    found = (rules,) if isinstance(rules, SaveRule) else rules
    if not isinstance(found, Sequence) or not all(isinstance(rule, SaveRule) for rule in found):
        raise TypeError(f"save={rules!r}: give an Every, an AtSteps or an Auto, or a list of these")
    if sum(isinstance(rule, Auto) for rule in found) > 1:
        raise ValueError(f"save={rules!r}: give one Auto; it takes both an overhead and a mean time between failures")
    return tuple(found)


def _keep_rules(rules: Any) -> tuple[KeepRule, ...]:
    found = (rules,) if _keeps(rules) else rules
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(map(_keeps, found)):
        raise TypeError(f"keep={rules!r}: give a KeepLast, a KeepEvery, a KeepSteps or a Best, or a list of these")
    return tuple(found)


def _keeps(rule: Any) -> bool:
    return not isinstance(rule, type) and callable(getattr(rule, "kept", None))
