"""Which ranks a process group has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ckptengine.errors import StateError

__all__ = ["group_ranks"]


def group_ranks(group: Any) -> Sequence[int] | None:
    """Return the global ranks of a process group, or of a `DeviceMesh` of one dimension, in its order.

    None where it is neither; imports nothing. Raises `StateError` for a mesh of several dimensions, and for one whose
    ranks do not ascend.
    """
    mesh: Any = sys.modules.get("torch.distributed.device_mesh")
    if mesh is not None and isinstance(group, mesh.DeviceMesh):
        if group.ndim != 1:
            raise StateError(
                f"Sharded: a mesh of {group.ndim} dimensions {group.mesh_dim_names}; pass one of them, such as "
                f"mesh[{(group.mesh_dim_names or ('tp',))[0]!r}]"
            )
        ranks = [int(rank) for rank in group.mesh.flatten().tolist()]
        if ranks != sorted(ranks):
            raise StateError(
                f"Sharded: the ranks of a mesh are {ranks}, and torch numbers those of its process group in ascending "
                "order: which rank has which part can't be known; pass a list of ranks in the order of their parts"
            )
        return ranks
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        return None
    members: list[int] = dist.get_process_group_ranks(group)
    return members
