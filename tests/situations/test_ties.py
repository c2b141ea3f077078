"""Ties with more than two ends, and flags that forwards read: after an untied merge the function is the adapter's."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto as auto

import peftc
from tests.support.adapters import perturb
from tests.support.small import small_model

IDS = torch.tensor([[5, 6, 7, 2]])
FAMILIES = {
    kind: name
    for kind, name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items()
    if isinstance(name, str)
}  # fmt: skip


def tied_model(kind: str) -> Any:
    """A small model whose head is tied and which runs on tokens; None if there is none."""
    model = small_model(kind, FAMILIES[kind], tie_word_embeddings=True, decoder_start_token_id=2)
    try:
        head = model.get_output_embeddings()
        model(input_ids=IDS, decoder_input_ids=IDS)
    except Exception:  # Other inputs, or sizes that don't fit each other.
        return None
    return model if head is not None and head.weight is model.get_input_embeddings().weight else None


def differs(model: Any, want: torch.Tensor) -> float:
    return float((model(input_ids=IDS, decoder_input_ids=IDS).logits - want).abs().max() / want.abs().max())


TIED = [kind for kind in FAMILIES if tied_model(kind) is not None]
FAST = ("t5", "bart", "m2m_100")


def test_many_families_are_walked() -> None:
    assert len(TIED) >= 12
    assert {"m2m_100", "umt5", "t5", "bart", "switch_transformers"} <= set(TIED)


@pytest.mark.parametrize("end", ["head", "embedding"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else (pytest.mark.slow,)) for kind in TIED]
)
def test_untied_in_memory_saved_and_on_disk(kind: str, end: str, tmp_path: Path) -> None:
    model = tied_model(kind)
    modules = {id(module): fqn for fqn, module in model.named_modules()}
    head = modules[id(model.get_output_embeddings())]
    called = [fqn for fqn, module in model.named_modules() if isinstance(module, torch.nn.Embedding) and "decoder" in fqn
              and module.weight is model.get_output_embeddings().weight]  # fmt: skip
    target = head if end == "head" else (called or [modules[id(model.get_input_embeddings())]])[-1]
    linear = next(fqn for fqn, module in model.named_modules() if isinstance(module, torch.nn.Linear) and fqn != head)
    model.save_pretrained(tmp_path / "base")
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=[target, linear])))
    want = compiled(input_ids=IDS, decoder_input_ids=IDS).logits
    assert differs(model, want) > 1e-3
    warnings.simplefilter("ignore")
    compiled.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    before = dict(compiled.base.named_parameters(remove_duplicate=False))
    with compiled.merged(untie=True):
        assert differs(compiled, want) < 1e-5
    after = dict(compiled.base.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    assert compiled.base.config.tie_word_embeddings
    compiled.merge_and_unload(untie=True).save_pretrained(tmp_path / "merged")
    again, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert differs(again.eval(), want) < 1e-5
    paths = (tmp_path / "base", tmp_path / "adapter", tmp_path / "disk")
    if kind == "switch_transformers":  # Its router chooses by values.
        with pytest.raises(peftc.MergeError, match=r"how can't be told from a run without values.*merge_and_unload"):
            peftc.merge_checkpoint(*paths, untie=True)
        return
    peftc.merge_checkpoint(*paths, untie=True, undo=True)
    again, info = type(model).from_pretrained(tmp_path / "disk", output_loading_info=True)
    assert not info["missing_keys"]
    assert differs(again.eval(), want) < 1e-5
    peftc.unmerge_checkpoint(tmp_path / "disk", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "base" / "model.safetensors"
    ).read_bytes()


def test_a_factor_that_can_not_be_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tied_model("switch_transformers")
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(target_modules=["lm_head"])))
    monkeypatch.setattr(type(model), "dummy_inputs", property(lambda self: {"input_ids": None}))
    with pytest.raises(peftc.MergeError, match="how can't be told"):
        compiled.merge_adapter(untie=True)
    assert compiled.base.config.tie_word_embeddings
    assert compiled.merged_adapters == []
