"""Lightning's Trainer: `Resume`."""

from ckptengine.integrations.lightning.callback import Resume

__all__ = ["Resume"]
