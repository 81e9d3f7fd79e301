"""The adapters of a model of Hugging Face PEFT as a part of the state, without the model that they adapt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from ckptengine.errors import LoadMismatchError, StateError

__all__ = ["Adapters"]


class Adapters:
    """Save the adapters of a `PeftModel` without its base model: `{"adapters": Adapters(model), ...}`.

    `model` is the `PeftModel` itself, not its DDP wrapper. Each adapter is saved under its own name
    (`adapters.default`), and its tensors have the names of PEFT's `adapter_model.safetensors`. The base model is not
    saved: the script makes it again.

    Raises `TypeError` for another model, and `StateError` if something else in the model takes a gradient, which would
    be lost: other parameters, or those of a prompt encoder, of which PEFT keeps only the result. Then put the whole
    model into the state.
    """

    def __init__(self, model: PeftModel) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(f"Adapters: {type(model).__name__} is no PeftModel; pass what get_peft_model returned")
        self._model = model
        kept = {tensor.data_ptr() for state in self.state_dict().values() for tensor in state.values()}
        trained = [name for name, one in model.named_parameters() if one.requires_grad and one.data_ptr() not in kept]
        if trained:
            names = f"{', '.join(trained[:3])}{', …' if len(trained) > 3 else ''}"
            raise StateError(
                f"Adapters: {names}: trained, and no part of what PEFT keeps of its adapters; put the whole model into "
                "the state (with the Trainer: whole_model=True)"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors of each adapter, by PEFT's names; they are the model's own."""
        return {name: get_peft_model_state_dict(self._model, adapter_name=name) for name in self._model.peft_config}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy tensors into the adapters. Raises `LoadMismatchError` if the model lacks an adapter or a tensor."""
        if state.keys() != self._model.peft_config.keys():
            raise LoadMismatchError(
                f"Adapters: the checkpoint has {', '.join(state) or 'none'}, the model "
                f"{', '.join(self._model.peft_config) or 'none'}: add the same adapters (add_adapter, load_adapter)"
            )
        here = self.state_dict()
        for name, tensors in state.items():
            if wrong := sorted(tensors.keys() ^ here[name].keys()):
                raise LoadMismatchError(
                    f"Adapters: adapter {name!r}: {wrong[0]} is only in the "
                    f"{'checkpoint' if wrong[0] in tensors else 'model'}: make it with the configuration that was saved"
                )
            set_peft_model_state_dict(self._model, dict(tensors), adapter_name=name)
