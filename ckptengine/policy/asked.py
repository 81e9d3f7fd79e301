"""What all ranks have to give a Checkpointer alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptengine.catalog.keep import Best, KeepEvery, KeepLast, KeepSteps
from ckptengine.policy.interval import Auto, seconds_of
from ckptengine.policy.rules import Every, Policy, SaveRule
from ckptengine.policy.settings import Settings

__all__ = ["asked_of"]


def asked_of(settings: Settings) -> dict[str, object]:
    """Return the arguments by which all ranks do the same at the same time, with their names.

    Others may differ: what rank 0 alone does, as `on_commit`, and what each rank does by itself, as `arena_nbytes`.
    Rank 0 alone deletes from the run; from a local tier, or from memory, the first rank of each node does.
    """
    several = settings.local is not None or settings.memory
    return {
        "every (or export_every, policy.save)": _when(settings.policy),
        "local": _given(settings.local),
        "memory": _given(settings.memory or None),
        "keep_last (or keep_every, keep_best, policy.keep)": _kept(settings.policy) if several else None,
        "preemption": _given(settings.preemption),
        "on_error": "raise" if settings.raises else "warn",
        "max_failures": settings.max_failures,
        "when_busy": "skip" if settings.skips else "wait",
    }


def _given(value: object) -> str | None:
    return None if value is None else "given"


def _when(policy: Policy) -> str | None:
    return " and ".join(sorted({_due(rule) for rule in policy.save_rules})) or None


def _due(rule: SaveRule) -> str:
    """Return a rule in words, with times in seconds."""
    if isinstance(rule, Auto):
        return f"{replace(rule, mtbf=seconds_of(rule.mtbf))!r}"
    if isinstance(rule, Every) and rule.seconds is not None:
        return f"every {rule.seconds:.15g} s"
    return f"{rule}"


def _kept(policy: Policy) -> str | None:
    keep = policy.keep_rules
    if isinstance(keep, Mapping):
        return ", ".join(f"{tier}: {_rules(keep[tier])}" for tier in sorted(keep)) or None
    return _rules(keep)


def _rules(rules: tuple[Any, ...]) -> str | None:
    return " and ".join(sorted(set(map(_rule, rules)))) or None


def _rule(rule: object) -> str:
    if isinstance(rule, KeepSteps):
        return f"KeepSteps({sorted(rule.steps)})"
    return repr(rule) if isinstance(rule, (KeepLast, KeepEvery, Best)) else type(rule).__qualname__
