"""MindSpore under numpy 2: one error that comes once."""

from __future__ import annotations

import logging

import numpy as np
from mindspore import Tensor, ops
from mindspore.communication import GlobalComm

__all__ = ["run_first_operator"]

_log = logging.getLogger("ckptengine")


def run_first_operator() -> None:
    """Run an operator whose arguments MindSpore parses through numpy, so that it does not fail in the training.

    MindSpore 2.10.0 is built against numpy 1.x. Under numpy 2 the first call that parses a list of integers raises
    `SystemError`, because an import inside of it fails; every later call works. Where that call comes after
    `mindspore.communication.init`, the process does not tell the scheduler of its end, and msrun ends with 1: that is
    told. Under numpy 1.x nothing happens.
    """
    if int(np.__version__.partition(".")[0]) < 2:
        return
    try:
        ops.reshape(Tensor([0]), (1,))
    except SystemError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        if GlobalComm.INITED:
            _log.warning(
                "MindSpore's first operator has come after init(): with numpy %s msrun will end with 1 half a minute "
                "after this job, whatever it has done; put `import ckptengine.mindspore` before init()",
                np.__version__,
            )
