"""MindSpore's own calls and callbacks over this engine.

A script that takes `save_checkpoint`, `load_checkpoint`, `load_param_into_net`, `CheckpointConfig` and
`ModelCheckpoint` from here instead of from `mindspore` changes nothing else.
"""

try:
    import mindspore as _mindspore  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "mindspore":
        raise
    raise ModuleNotFoundError(
        "ckptengine.mindspore needs MindSpore 2.10 or newer: pip install 'mindspore>=2.10'", name="mindspore"
    ) from None

from ckptengine.mindspore.callback import CheckpointConfig, ModelCheckpoint
from ckptengine.mindspore.checkpoint import load_checkpoint, load_param_into_net, save_checkpoint
from ckptengine.mindspore.first_operator import run_first_operator
from ckptengine.mindspore.layout import sharded_parameters
from ckptengine.mindspore.names import names_from_torch
from ckptengine.mindspore.resume import DataPosition, Resume, training_state

__all__ = [
    "CheckpointConfig",
    "DataPosition",
    "ModelCheckpoint",
    "Resume",
    "load_checkpoint",
    "load_param_into_net",
    "names_from_torch",
    "save_checkpoint",
    "sharded_parameters",
    "training_state",
]

run_first_operator()
