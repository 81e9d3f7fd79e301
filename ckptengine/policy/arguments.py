"""What a caller passes, looked at before it is used: the error names the argument, what was expected and found."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from ckptengine.catalog.keep import checked_best
from ckptengine.comm.base import Communicator
from ckptengine.errors import StateError
from ckptengine.policy.preemption import Preemption
from ckptengine.policy.rules import Policy

__all__ = [
    "checked_callable",
    "checked_choice",
    "checked_comm",
    "checked_count",
    "checked_keep_last",
    "checked_location",
    "checked_policy",
    "checked_preemption",
    "checked_seconds",
    "checked_state",
    "checked_step",
]

_T = TypeVar("_T")


def checked_seconds(name: str, value: Any) -> float:
    """Return a number of seconds above zero; raises `TypeError` or `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={_short(value)}: give a number of seconds, such as {name}=600")
    seconds = float(value)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"{name}={_short(value)}: give a number of seconds above 0; every wait must have an end")
    return seconds


def checked_callable(name: str, value: _T) -> _T:
    """Return a function; raises `TypeError`."""
    if not callable(value):
        raise TypeError(f"{name}={_short(value)}: give a function, not its result")
    return value


def checked_count(name: str, value: Any, least: int, what: str) -> int:
    """Return a whole number from `least` on; `what` says of what. Raises `TypeError` or `ValueError`."""
    count = _whole(value)
    if count is None:
        raise TypeError(f"{name}={_short(value)}: give {what}, a whole number from {least} on")
    if count < least:
        raise ValueError(f"{name}={count}: give {what}, a whole number from {least} on")
    return count


def checked_keep_last(value: Any) -> int | Mapping[str, int] | None:
    """Return how many checkpoints are kept: a number, one for each tier, or None."""
    what = "how many checkpoints to keep"
    if value is None:
        return None
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise TypeError(f"keep_last has the key {_short(wrong)}: its keys are names of tiers, such as 'local'")
        return {tier: checked_count(f"keep_last[{tier!r}]", count, 1, what) for tier, count in value.items()}
    return checked_count("keep_last", value, 1, f"{what} (None: all), or one number for each tier,")


def checked_policy(policy: Any, every: Any, keep_last: Any, keep_every: Any, keep_best: Any) -> Policy:
    """Return the policy, or that which the other arguments stand for; raises `TypeError` or `ValueError`."""
    if policy is None:
        if keep_every is not None:
            keep_every = checked_count("keep_every", keep_every, 1, "a number of steps (None: no such ones)")
        return Policy.of(every, checked_keep_last(keep_last), keep_every, checked_best("keep_best", keep_best))
    if not isinstance(policy, Policy):
        raise TypeError(f"policy={_short(policy)}: give a ckptengine.Policy")
    short = {"every": every, "keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best}
    both = next((name for name, value in short.items() if value is not None), None)
    if both is not None:
        raise ValueError(
            f"{both}={_short(short[both])} beside policy=: give one of the two, or add a rule to the policy"
        )
    return policy


def checked_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` for a value that is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={_short(value)}: give {' or '.join(map(repr, choices))}")


def checked_preemption(value: Any) -> Preemption | None:
    """Return a `Preemption`, or None for none."""
    if value is not None and not isinstance(value, Preemption):
        raise TypeError(
            f"preemption={_short(value)}: give a ckptengine.Preemption, or None to leave signals alone; without the "
            "argument SIGTERM and SIGUSR1 end the job with a checkpoint"
        )
    return value


def checked_comm(value: Any) -> Communicator | None:
    """Return a communicator, or None for the one of what is initialized."""
    if value is not None and not isinstance(value, Communicator):
        raise TypeError(
            f"comm={_short(value)}: give ckptengine.SingleProcess() if this process saves by itself, or a "
            "Communicator; without the argument it is that of what is initialized (torch.distributed, MindSpore, MPI)"
        )
    return value


def checked_location(name: str, value: Any) -> str:
    """Return a path or URL as a string."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}={_short(value)}: give a directory, or a URL such as s3://bucket/run")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError(f"{name}={_short(value)}: give the path as str, not bytes")
    return path


def checked_step(step: Any, state: Any) -> int:
    """Return the number of a step; raises `TypeError` where it is none, as where it was swapped with the state."""
    number = _whole(step)
    if number is None:
        swapped = isinstance(step, Mapping) and _whole(state) is not None
        advice = "the two are swapped: write step(number, state)" if swapped else "give the number of the step, an int"
        raise TypeError(f"step={_short(step)} is {_kind(step)}: {advice}")
    if number < 0:
        raise ValueError(f"step {number}: steps count from 0 on")
    return number


def checked_state(state: Any) -> None:
    """Raise `StateError` for a state that maps no names to what is to be saved."""
    if not isinstance(state, Mapping):
        raise StateError(
            f"state is {_kind(state)}: give a dict that names what belongs to the training, such as "
            '{"model": model, "optimizer": optimizer}'
        )


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
