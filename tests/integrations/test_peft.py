"""Adapters of PEFT: kept alone, with the whole model, and merged; and given to `PeftModel.from_pretrained`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptEncoderConfig, get_peft_model

import ckptengine as ce
from ckptengine.errors import LoadMismatchError, StateError
from ckptengine.integrations.peft import Adapters

WORDS = torch.arange(16).reshape(2, 8)


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    )


def adapted(**settings: Any) -> tuple[Any, Any]:
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings)
    model = get_peft_model(base(), lora)
    return model, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 1e-2)


def train(model: Any, optimizer: Any, steps: int = 2) -> None:
    for _ in range(steps):
        model(input_ids=WORDS, labels=WORDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(one: Any, other: Any) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_adapters_alone_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, optimizer = adapted()
    model.add_adapter("second", LoraConfig(r=1, target_modules=["k_proj"]))
    train(model, optimizer)
    ce.save(tmp_path / "one", {"adapters": Adapters(model), "optimizer": optimizer})
    train(model, optimizer)
    other, other_optimizer = adapted()
    other.add_adapter("second", LoraConfig(r=1, target_modules=["k_proj"]))
    ce.load(tmp_path / "one", into={"adapters": Adapters(other), "optimizer": other_optimizer})
    train(other, other_optimizer)
    assert equal(model, other)
    assert "base_model.model.lm_head.weight" not in ce.load(tmp_path / "one")["adapters"]["default"]


def test_an_export_of_adapters_is_opened_by_peft(tmp_path: Path) -> None:
    model, optimizer = adapted()
    train(model, optimizer)
    ce.save(tmp_path / "one", {"adapters": Adapters(model), "optimizer": optimizer})
    out = tmp_path / "out"
    ce.export(tmp_path / "one", out / "adapter_model.safetensors", only=["adapters"], rename={"adapters.default": ""})
    model.peft_config["default"].save_pretrained(out)
    opened = PeftModel.from_pretrained(base(), out)
    assert torch.equal(opened(input_ids=WORDS).logits, model(input_ids=WORDS).logits)
    model.save_pretrained(tmp_path / "theirs")
    theirs = (tmp_path / "theirs" / "adapter_model.safetensors").read_bytes()
    assert ce.load(out / "adapter_model.safetensors").keys() == ce.load(tmp_path / "theirs").keys()
    assert len(theirs) > 0


def test_the_whole_model_is_kept_and_merged_as_any_other(tmp_path: Path) -> None:
    model, optimizer = adapted()
    train(model, optimizer)
    ce.save(tmp_path / "whole", {"model": model, "optimizer": optimizer})
    other, other_optimizer = adapted()
    ce.load(tmp_path / "whole", into={"model": other, "optimizer": other_optimizer})
    assert equal(model, other)
    merged = other.merge_and_unload()
    ce.save(tmp_path / "merged", {"model": merged})
    ce.export(tmp_path / "merged", tmp_path / "out", rename={"model": ""})
    merged.config.save_pretrained(tmp_path / "out")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(opened(input_ids=WORDS).logits, merged(input_ids=WORDS).logits)


def test_what_is_trained_beside_the_adapters_is_not_lost_in_silence() -> None:
    model, _ = adapted()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(StateError, match=r"lm_head.*trained"):
        Adapters(model)
    prompts = get_peft_model(base(), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(StateError, match=r"prompt_encoder.*trained"):
        Adapters(prompts)
    with pytest.raises(TypeError, match="no PeftModel"):
        Adapters(base())


def test_other_adapters_are_refused_by_name(tmp_path: Path) -> None:
    model, _ = adapted()
    ce.save(tmp_path / "one", {"adapters": Adapters(model)})
    other, _ = adapted(target_modules=["k_proj"])
    with pytest.raises(LoadMismatchError, match="k_proj"):
        ce.load(tmp_path / "one", into={"adapters": Adapters(other)})
    wider, _ = adapted(r=4)
    with pytest.raises(LoadMismatchError):
        ce.load(tmp_path / "one", into={"adapters": Adapters(wider)})
    other.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(LoadMismatchError, match="second"):
        ce.load(tmp_path / "one", into={"adapters": Adapters(other)})
