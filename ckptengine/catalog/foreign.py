"""Checkpoints of other formats: told by the names of their files, so that a job does not begin anew beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckptengine.catalog.listing import step_directories
from ckptengine.errors import CheckpointError
from ckptengine.storage.base import StorageView, join
from ckptengine.storage.local import LocalStorage

__all__ = ["Foreign", "foreign_checkpoint", "foreign_file"]

_MOST_DIRECTORIES = 32
_PLACES = re.compile(
    r"(checkpoints?|ckpts?|weights|iter|epoch|global_?step|step|lightning_logs|version)?[-_=]?\d*", re.I
)
_SAVED = re.compile(r"(checkpoint|ckpt|epoch|iter|step|last|latest|best|state|optim|resume)", re.I)
_ANEW = "to begin anew, give this run a directory of its own"
_ADVICE = (
    "ckptengine does not read it. To go on with it, load it with the library that wrote it and save the state once "
    f"with ckptengine; {_ANEW}"
)
_ADVICE_READ = (
    "`restore` does not read it. To go on with it, fill the state from it once (`ckptengine.load(path, into=state)`), "
    f"and save to a run elsewhere; {_ANEW}"
)
_READ = frozenset(
    ("a checkpoint of torch.distributed.checkpoint (DCP)", "what torch.save wrote", "weights as safetensors")
)
"""The formats that a load takes, as a whole or its weights (`ckptengine.foreign`)."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """Something that another library wrote: what it is, and the name of a file that shows it.

    `training` tells what a job could have gone on with from what may be weights that it begins with.
    """

    format: str
    name: str
    training: bool

    def tell(self, place: str) -> str:
        """Return what to say of it, for a run at a place."""
        advice = _ADVICE_READ if self.format in _READ else _ADVICE
        return f"{place} holds {self.format} ({self.name}), and no checkpoint of ckptengine: {advice}"


def _ends(*suffixes: str) -> Callable[[str], bool]:
    return lambda name: name.lower().endswith(suffixes)


def _matches(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda name: compiled.fullmatch(name) is not None


# The more telling ones first. Sources: torch/distributed/checkpoint/filesystem.py; orbax/checkpoint, path/step.py and
# metadata; transformers/trainer.py; accelerate/utils/constants.py; megatron/training/checkpointing.py;
# deepspeed/runtime/engine.py; torchsnapshot/snapshot.py; tensorflow/python/checkpoint.
_FORMATS: tuple[tuple[str, Callable[[str], bool], bool], ...] = (
    ("a checkpoint of torch.distributed.checkpoint (DCP)", _ends(".distcp"), True),
    ("a checkpoint of torchsnapshot", _matches(r"\.snapshot_metadata"), True),
    ("a checkpoint of Orbax", _matches(r"_CHECKPOINT_METADATA|ocdbt\.process_\d+|manifest\.ocdbt"), True),
    ("a checkpoint of the Hugging Face Trainer", _matches(r"trainer_state\.json"), True),
    ("a checkpoint of Hugging Face Accelerate", _matches(r"random_states_\d+\.pkl"), True),
    ("a checkpoint of Megatron-LM", _matches(r"latest_checkpointed_iteration\.txt"), True),
    ("a checkpoint of DeepSpeed", _ends("_model_states.pt", "_optim_states.pt", "zero_to_fp32.py"), True),
    ("a checkpoint of TensorFlow", _matches(r".+\.data-\d{5}-of-\d{5}"), True),
    ("a checkpoint of PyTorch Lightning or MindSpore (.ckpt)", _ends(".ckpt"), True),
    (
        "what torch.save wrote",
        lambda name: _ends(".pt", ".pth", ".pth.tar", ".bin")(name) and _SAVED.search(name) is not None,
        True,
    ),
    ("weights as safetensors", _ends(".safetensors", ".safetensors.index.json"), False),
    ("what torch.save wrote", _ends(".pt", ".pth", ".pth.tar", "pytorch_model.bin"), False),
    ("weights of Keras (HDF5)", _ends(".keras", ".h5", ".hdf5"), False),
    ("weights of Flax", _ends(".msgpack"), False),
    ("weights as GGUF", _ends(".gguf"), False),
    ("arrays of numpy", _ends(".npz"), False),
)


_MAGIC = {b"GGUF": "weights as GGUF", b"\x89HDF": "HDF5", b"\x80": "a pickle, as torch.save wrote it"}


def foreign_checkpoint(storage: StorageView) -> Foreign | None:
    """Return what another library has left where a run or a checkpoint was looked for, None where there is nothing.

    Looks at the names right in it, and in directories below that are called as checkpoints are. Raises `StorageError`.
    """
    own = {name for _, name in step_directories(storage)}
    looked, found = 0, []
    pending = [""]
    while pending and looked < _MOST_DIRECTORIES:
        directory = pending.pop(0)
        looked += 1
        names = storage.list(directory)
        one = _told(names, directory)
        if one is not None and one.training:
            return one
        if one is not None:
            found.append(one)
        if directory.count("/") < 2:
            inner = (name for name in reversed(names) if name not in own or directory)
            pending += [join(directory, name) for name in inner if _PLACES.fullmatch(name.split(".")[0].split("=")[0])]
    return found[0] if found else None


def _told(names: Sequence[str], directory: str) -> Foreign | None:
    for kind, tells, training in _FORMATS:
        name = next(filter(tells, names), None)
        if name is not None:
            return Foreign(kind, join(directory, name), training)
    return None


def foreign_file(storage: StorageView) -> Foreign | None:
    """Return what a file is that was given where a directory is wanted, None where it is none, or is not known."""
    if not isinstance(storage, LocalStorage) or not storage.root.is_file():
        return None
    try:
        inside = LocalStorage(storage.root.parent)
        start = inside.read_range(storage.root.name, 0, min(16, inside.size(storage.root.name) or 0))
    except CheckpointError:
        start = b""
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return Foreign(kind, storage.root.name, True)
    if start[8:9] == b"{":
        return Foreign("weights as safetensors", storage.root.name, True)
    return _told([storage.root.name], "") or Foreign("a file", storage.root.name, True)
