"""Trained rows of tokens by PEFT's names, each with peft and with peftc.peft alike."""

import importlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftc.peft
from tests.support.scripts import base

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
BOTH = pytest.mark.parametrize("lib", [peft, peftc.peft], ids=["peft", "peftc"])
TIED = pytest.mark.parametrize("tied", [True, False])
DELTA = "trainable_tokens_delta"


def config(lib: Any, how: str, tokens: Any) -> Any:
    if how == "alone":
        return lib.TrainableTokensConfig(token_indices=tokens)
    return lib.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)


def adapted(lib: Any, how: str, tied: bool, tokens: Any = (5, 8)) -> Any:
    model = lib.get_peft_model(base(tie_word_embeddings=tied), config(lib, how, list(tokens))).eval()
    filled(model, 0.01)
    return model


def filled(model: Any, by: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(by)
            elif DELTA in name:
                parameter.add_(10 * by)


@TIED
@pytest.mark.parametrize("how", ["alone", "beside"])
def test_both_compute_train_and_load_the_same(how: str, tied: bool, tmp_path: Path) -> None:
    models = {lib.__name__: adapted(lib, how, tied) for lib in (peft, peftc.peft)}
    theirs, ours = models.values()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    assert theirs.get_nb_trainable_parameters()[0] == ours.get_nb_trainable_parameters()[0]
    learning = [
        sorted(n.replace(".token_adapter", "") for n, p in m.named_parameters() if p.requires_grad)
        for m in models.values()
    ]
    assert learning[0] == learning[1]
    for one in models.values():
        optimiser = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.01)
        one(IDS, labels=IDS).loss.backward()
        optimiser.step()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    for lib, one in zip((peftc.peft, peft), models.values(), strict=True):
        one.save_pretrained(tmp_path / lib.__name__)
        loaded = lib.PeftModel.from_pretrained(base(tie_word_embeddings=tied), str(tmp_path / lib.__name__)).eval()
        torch.testing.assert_close(loaded(IDS).logits, one(IDS).logits)
    y = ours(IDS).logits
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, y)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied


@BOTH
def test_the_layer_of_the_method(lib: Any) -> None:
    layers: Any = importlib.import_module(f"{lib.__name__}.tuners.trainable_tokens")
    model = adapted(lib, "alone", True)
    assert isinstance(model.base_model, lib.TrainableTokensModel)
    layer, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    assert isinstance(layer, layers.TrainableTokensLayer)
    assert isinstance(head, layers.TrainableTokensLayer)
    assert layer.token_indices == {"default": [5, 8]}
    assert layer.tied_adapter is None
    assert head.tied_adapter is layer
    assert head.trainable_tokens_delta["default"] is layer.trainable_tokens_delta["default"]
    rows, merged = layer.trainable_tokens_delta["default"], layer.get_merged_weights(["default"])
    assert torch.equal(merged[[5, 8]], rows)
    torch.testing.assert_close(rows - layer.trainable_tokens_original["default"], torch.full_like(rows, 0.1))
    assert lib.PEFT_TYPE_TO_TUNER_MAPPING["TRAINABLE_TOKENS"] is lib.TrainableTokensModel


@BOTH
def test_the_wrapper_beside_another_method(lib: Any) -> None:
    utils: Any = importlib.import_module(f"{lib.__name__}.utils")
    tuners: Any = importlib.import_module(f"{lib.__name__}.tuners.tuners_utils")
    wrapper = adapted(lib, "beside", True).base_model.model.model.embed_tokens
    assert isinstance(wrapper, utils.TrainableTokensWrapper)
    assert not isinstance(wrapper, tuners.BaseTunerLayer)
    assert wrapper.token_adapter.token_indices == {"default": [5, 8]}
    assert wrapper.token_adapter.trainable_tokens_delta["default"].shape == (2, 32)
    assert torch.equal(
        wrapper.token_adapter.get_merged_weights(["default"])[5],
        wrapper.token_adapter.trainable_tokens_delta["default"][0],
    )


@BOTH
@TIED
def test_adapters_with_other_tokens_take_turns(lib: Any, tied: bool) -> None:
    model = adapted(lib, "beside", tied)
    first = model(IDS).logits
    model.add_adapter("other", config(lib, "beside", [7]))
    assert torch.equal(model(IDS).logits, first)
    model.set_adapter("other")
    other = model(IDS).logits
    assert not torch.allclose(other, first)
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, base(tie_word_embeddings=tied)(IDS).logits)
    model.delete_adapter("other")
    assert torch.equal(model(IDS).logits, first)


@BOTH
def test_tokens_by_the_name_of_a_module(lib: Any) -> None:
    tokens = {"embed_tokens": [5], "lm_head": [6, 7]}
    made = lib.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    model = lib.get_peft_model(base(), made)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if DELTA in name]
    assert shapes == [(1, 32), (2, 32)]
    assert model.peft_config["default"].trainable_token_indices == tokens
