"""Prompt methods in every variant, and what the tests of them share."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor

import peftc

N = 5

METHODS: dict[str, Callable[[str], peftc.PromptSpec]] = {
    "prefix": lambda task: peftc.PrefixTuningConfig(num_virtual_tokens=N, task_type=task),
    "projected prefix": lambda task: peftc.PrefixTuningConfig(
        num_virtual_tokens=N, task_type=task, prefix_projection=True, encoder_hidden_size=24
    ),
    "prompt": lambda task: peftc.PromptTuningConfig(num_virtual_tokens=N, task_type=task),
    "p-tuning": lambda task: peftc.PromptEncoderConfig(num_virtual_tokens=N, task_type=task, encoder_hidden_size=24),
    "p-tuning lstm": lambda task: peftc.PromptEncoderConfig(
        num_virtual_tokens=N, task_type=task, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
    ),
}
IN_CACHE = ("prefix", "projected prefix")
REPARAMETERISED = ("projected prefix", "p-tuning", "p-tuning lstm")


def ids(batch: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Token ids (batch, length) of a vocabulary of 64, without the special ones."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, length: int = 7) -> Tensor:
    """An attention mask of two rows, the second padded by two tokens."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, slice(0, 2) if side == "left" else slice(length - 2, length)] = 0
    return mask


def in_peft(compiled: peftc.CompiledModel, model: Any) -> Any:
    """The same adapter in peft, trainable, with the same encoder weights; in eval mode."""
    fields = compiled.peft_config["default"].to_dict()
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")](**fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.prompt_encoder["default"].load_state_dict(compiled.prompt_encoder["default"].state_dict())
    return theirs.eval()


def generated(model: Any, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """What `generate` adds to `tokens`, greedily, five tokens whatever they are."""
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens) if mask is None else mask
    out = model.generate(input_ids=tokens, attention_mask=mask, **{**settings, **options})
    return out if model.config.is_encoder_decoder else out[:, tokens.shape[1] :]
