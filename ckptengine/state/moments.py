"""Which states of an optimizer have one element for each of the parameter's, where their shapes don't tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptengine.schema.path import Path

__all__ = ["Moments"]

_Shape = tuple[int, ...]

# What torch's optimizers (2.13) keep in the shape of their parameters, and MindSpore's (2.9) under other names.
_KNOWN = frozenset(
    {
        *("acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer"),
        *("prev", "square_avg", "step_size", "sum", "variance"),
        *("accum", "accum_update", "adam_m", "adam_v", "ax_", "lamb_m", "lamb_v", "linear", "mean_grad", "mean_square"),
        *("moment", "moment1", "moment2", "moments", "momentum_buf", "stat", "vhat"),
    }
)


class Moments:
    """What is known of an optimizer's states by their keys.

    A preconditioner of a square matrix has the matrix's shape. That one of its kind is a moment is seen by those of
    other matrices, which are not square; or it has a name that torch's and MindSpore's optimizers give to moments, or
    one that the user has `said`.
    """

    def __init__(
        self,
        states: Iterable[tuple[_Shape, Mapping[Path, _Shape]]] = (),
        said: frozenset[str] = frozenset(),
    ) -> None:
        """Take the shapes of parameters, and of the arrays in their states by their keys."""
        self._said = said
        self._seen: dict[Path, bool] = {}
        for shape, arrays in states:
            if len(shape) > 1 and shape[-1] != shape[-2]:
                for keys, own in arrays.items():
                    kind = _kind(keys)
                    self._seen[kind] = self._seen.get(kind, True) and own == shape

    def has(self, keys: Path) -> bool:
        """Whether an array of the parameter's shape has an element for each of its elements."""
        kind = _kind(keys)
        if not self._said.isdisjoint(kind):
            return True
        return self._seen.get(kind, not _KNOWN.isdisjoint(kind))


def _kind(keys: Path) -> Path:
    """Return keys without the parameter's name, which MindSpore's optimizers have in them: `moment1.fc.weight`."""
    last = keys[-1]
    return (*keys[:-1], last.partition(".")[0] if isinstance(last, str) else last)
