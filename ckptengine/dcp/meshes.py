"""Meshes on which torch's planners take parts for others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.tensor import DTensor

from ckptengine.errors import StateError
from ckptengine.torch.dtensor import coordinate_in

__all__ = ["refuse_unordered"]


def refuse_unordered(planner: Any) -> None:
    """Raise `StateError` naming a DTensor on a mesh whose ranks do not ascend.

    torch's planners (2.13) count parts in the order of the mesh, and its DTensors in that of the process group: what
    they store of such a tensor has its parts in each other's places.
    """
    state = getattr(planner, "state_dict", None)
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(value, DTensor) or all(placement.is_replicate() for placement in value.placements):
            continue
        mesh = value.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is not None and coordinate_in(mesh) != list(coordinate):
            raise StateError(
                f"{name}: a DTensor on a mesh with the ranks {mesh.mesh.tolist()}: torch's planners put its parts in "
                "each other's places; make the mesh of ascending ranks, or use `ckptengine.save` and `load`"
            )
