"""MindSpore's own calls and callbacks, over this engine; it works on MindSpore's cells and tensors from its import on."""

try:
    import mindspore as _mindspore
except ModuleNotFoundError as error:
    if error.name != "mindspore":
        raise
    raise ModuleNotFoundError(
        "ckptengine.mindspore needs MindSpore 2.10 or newer: pip install 'ckptengine[mindspore]'", name="mindspore"
    ) from None

from ckptengine.mindspore.first_operator import run_first_operator

run_first_operator()
