"""Which ranks a group of MindSpore's has."""

from __future__ import annotations

from mindspore.communication import get_group_size, get_world_rank_from_group_rank

__all__ = ["group_ranks"]


def group_ranks(group: str) -> list[int]:
    """Return the ranks of a group, given its name, in its order."""
    return [get_world_rank_from_group_rank(group, number) for number in range(get_group_size(group))]
