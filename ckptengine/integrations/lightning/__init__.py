"""Lightning: `Resume` for its Trainer; `CheckpointIO` for those who keep `ModelCheckpoint`, and for Fabric."""

from ckptengine.integrations.lightning.callback import Resume
from ckptengine.integrations.lightning.io import CheckpointIO

__all__ = ["CheckpointIO", "Resume"]
