"""Which rules say what a tier keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ckptengine.catalog.keep import Keep, KeepLast, KeepRule

__all__ = ["rules_of"]


def rules_of(keep: Keep, tier: str, tiers: Collection[str]) -> tuple[KeepRule, ...]:
    """Return the rules of one of the `tiers`, none where it keeps all; `keep` is a `Policy`'s.

    Raises `ValueError` where a tier is named that is not there, or the memory is to keep more than it can.
    """
    if not isinstance(keep, Mapping):
        return keep
    unknown = sorted(set(keep) - set(tiers))
    if unknown:
        raise ValueError(f"keep names {', '.join(unknown)}: this run has {', '.join(sorted(tiers))}")
    found = keep.get(tier, ())
    if tier == "memory" and any(rule != KeepLast(1) for rule in found if isinstance(rule, KeepLast)):
        raise ValueError("keep: the memory tier keeps 1, since it needs a second image for the next one")
    return found
