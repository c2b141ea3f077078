"""Keys that other versions spelled otherwise, and how keys that fit nothing are told."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftc
from tests.support.adapters import perturb, saved
from tests.support.models import inputs_for, llama, model_of, tiny

PREFIX = "base_model.model."


def in_other_names(folder: Path, rename: Callable[[str], str], **fields: Any) -> None:
    """Make an adapter one of another version of transformers, which wrote no manifest."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({rename(key): value for key, value in load_file(file).items()}, file, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


def output(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(kind)).logits


def as_in_transformers_4(key: str) -> str:
    """The names that a ViT had."""
    for new, old in (
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        key = key.replace(new, old)
    return key


VIT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a list": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["query", "value"]}),
    "patterns": (
        {"target_modules": ["q_proj"], "rank_pattern": {"0.attention.q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
        {
            "target_modules": ["query"],
            "rank_pattern": {"0.attention.attention.query": 3},
            "alpha_pattern": {"query": 5},
        },
    ),
    "one layer": (
        {"target_modules": ["q_proj", "fc2"], "layers_to_transform": [1], "modules_to_save": ["classifier"]},
        {
            "target_modules": ["query", "output.dense"],
            "layers_to_transform": [1],
            "layers_pattern": "layer",
            "modules_to_save": ["classifier"],
        },
    ),
    "a regular expression": (
        {"target_modules": r".*\.(q_proj|fc2)"},
        {"target_modules": r".*\.(query|\d\.output\.dense)"},
    ),
    "ia3": (
        {"peft_type": "IA3", "target_modules": ["v_proj", "fc2"], "feedforward_modules": ["fc2"]},
        {
            "peft_type": "IA3",
            "target_modules": ["value", "output.dense"],
            "feedforward_modules": [r"output.dense"],
        },
    ),
}


@pytest.mark.parametrize("case", VIT)
def test_an_adapter_of_an_older_transformers(case: str, tmp_path: Path) -> None:
    now, then = VIT[case]
    model = model_of("vit")
    compiled = perturb(peftc.compile(model, {"peft_type": "LORA", **now})).eval()
    compiled.save_pretrained(tmp_path / "adapter")
    in_other_names(tmp_path / "adapter", as_in_transformers_4, **then)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peftc.load(model, tmp_path / "adapter")
        other = peftc.compile(model, peftc.LoraConfig(target_modules=["fc1"]), "mine")
        result = other.load_adapter(tmp_path / "adapter", "theirs")
    assert not torch.equal(output(compiled, "vit"), output(model, "vit"))
    assert torch.equal(output(loaded, "vit"), output(compiled, "vit"))
    assert result.fits
    assert all("encoder.layer" in old for new, old in result.renamed.items())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(output(peftc.load(model, tmp_path / "again"), "vit"), output(compiled, "vit"))
    model.save_pretrained(tmp_path / "base")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(merged, "vit"), output(compiled, "vit"))


def test_a_head_that_was_renamed(tmp_path: Path) -> None:
    model = model_of("gpt_neox")
    spec = peftc.LoraConfig(target_modules=["query_key_value"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    compiled = perturb(peftc.compile(model, spec)).eval()
    compiled.save_pretrained(tmp_path)
    in_other_names(tmp_path, lambda key: key.replace("lm_head.", "embed_out."), modules_to_save=["embed_out"])
    assert any("embed_out" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(output(peftc.load(model, tmp_path), "gpt_neox"), output(compiled, "gpt_neox"))


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*\.q_proj", "all-linear"], ids=str)
def test_a_backbone_and_the_model_around_it(targets: Any, tmp_path: Path) -> None:
    """transformers itself loads the one's weights into the other."""
    model = llama()
    spec = peftc.LoraConfig(target_modules=targets, r=2)
    alone = perturb(peftc.compile(model.model, spec)).eval()
    alone.save_pretrained(tmp_path / "alone")
    whole = peftc.load(model, tmp_path / "alone")
    ids = inputs_for("llama")["input_ids"]
    with torch.no_grad():
        hidden = alone(ids).last_hidden_state
        assert torch.equal(whole(ids).logits, model.lm_head(hidden))
        whole.save_pretrained(tmp_path / "whole")
        assert torch.equal(peftc.load(model.model, tmp_path / "whole")(ids).last_hidden_state, hidden)


def test_what_fits_nothing_is_told_by_group(tmp_path: Path) -> None:
    saved(tmp_path)

    def misspelt(key: str) -> str:
        return key.replace("v_proj.lora_B", "v_prj.lora_B")

    in_other_names(tmp_path, misspelt)
    with pytest.raises(peftc.CheckpointError) as caught:
        peftc.load(llama(), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: does not fit the adapter, which has 12 tensors.\n"
        "  3 missing:\n"
        "    base_model.model.model.layers.{0–2}.self_attn.v_proj.lora_B.weight (3)\n"
        "  3 unexpected:\n"
        "    base_model.model.model.layers.{0–2}.self_attn.v_prj.lora_B.weight (3)\n"
        "  Nearest to base_model.model.model.layers.0.self_attn.v_prj.lora_B.weight:"
        " base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight\n"
        "  Nearest to base_model.model.model.layers.1.self_attn.v_prj.lora_B.weight:"
        " base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight\n"
        "  Nearest to base_model.model.model.layers.2.self_attn.v_prj.lora_B.weight:"
        " base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight\n"
        "  Is the base model the one the adapter was trained on? strict=False takes what fits."
    )


def test_state_dicts_report_what_was_not_used() -> None:
    compiled = peftc.compile(llama(), peftc.LoraConfig(target_modules=["q_proj"], r=2))
    state = peftc.get_peft_model_state_dict(compiled)
    key = next(iter(state))
    given = {**state, "more": torch.ones(1)}
    given.pop(key)
    with pytest.warns(UserWarning, match="1 missing"):
        result = peftc.set_peft_model_state_dict(compiled, given)
    assert (result.missing_keys, result.unexpected_keys) == ((key,), ("more",))
    given = {**state, key: torch.ones(3, 3)}
    with pytest.raises(peftc.CheckpointError, match="mis-shaped"):
        peftc.set_peft_model_state_dict(compiled, given)
    with pytest.warns(UserWarning, match="mis-shaped"):
        result = peftc.set_peft_model_state_dict(compiled, given, ignore_mismatched_sizes=True)
    assert result.mismatched_keys == ((key, (3, 3), (2, 32)),)
    with pytest.raises(peftc.AdapterError, match="no adapter 'other'"):
        peftc.set_peft_model_state_dict(compiled, state, "other")


CARD = """---
license: mit
tags:
- mine
---

# My adapter

Trained with care.

### Framework versions

- peftc 0.0.1
"""


@pytest.mark.parametrize("existing", [None, CARD], ids=["new", "there"])
def test_the_model_card(existing: str | None, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    compiled = peftc.compile(
        tiny("llama"),
        peftc.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="org/base"),
    )
    if existing is not None:
        (tmp_path / "README.md").write_text(existing)
    compiled.create_or_update_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.pipeline_tag) == (
        "org/base",
        "peft",
        "text-generation",
    )
    assert {"lora", "peftc", "transformers", "base_model:adapter:org/base"} <= set(card.data.tags)
    assert card.text.count("### Framework versions") == 1
    assert "0.0.1" not in card.text
    if existing is not None:
        assert (card.data.license, card.data.tags[0]) == ("mit", "mine")
        assert "Trained with care." in card.text
    before = (tmp_path / "README.md").read_text()
    compiled.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == before
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(peftc.CheckpointError, match="can't be read as text"):
        compiled.create_or_update_model_card(tmp_path)


def test_what_an_author_wrote_below_the_versions_stays(tmp_path: Path) -> None:
    compiled = peftc.compile(tiny("llama"), peftc.LoraConfig(target_modules=["q_proj"]))
    (tmp_path / "README.md").write_text(CARD + "\n## Citation\n\nCite me.\n")
    compiled.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "0.0.1" not in text
    assert text.endswith("## Citation\n\nCite me.\n") or text.rstrip().endswith("Cite me.")
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(peftc.CheckpointError, match="front matter"):
        compiled.create_or_update_model_card(tmp_path)


WHOLE: dict[str, dict[str, Any]] = {
    "lora_only": {"target_modules": ["query_key_value"], "bias": "lora_only"},
    "all biases, by a regular expression": {"target_modules": r".*query_key_value", "bias": "all"},
    "an alpha in full": {
        "target_modules": ["query_key_value"],
        "alpha_pattern": {"gpt_neox.layers.0.attention.query_key_value": 64},
    },
    "a rank in full": {
        "target_modules": ["query_key_value"],
        "rank_pattern": {"^gpt_neox.layers.1.attention.query_key_value": 5},
    },
    "an embedding": {"target_modules": ["embed_in", "query_key_value"]},
    "excluded": {"target_modules": ["query_key_value"], "exclude_modules": r"gpt_neox\.layers\.0\..*"},
    "a layer": {
        "target_modules": ["query_key_value"],
        "layers_to_transform": [1],
        "layers_pattern": r"gpt_neox.layers",
    },
    "a container saved": {"target_modules": ["query_key_value"], "modules_to_save": ["gpt_neox.layers.1.mlp"]},
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_models_adapter_in_its_backbone(case: str, tmp_path: Path) -> None:
    model = model_of("gpt_neox")
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(r=2, **WHOLE[case]), on_unmatched="warn")).eval()
    compiled.save_pretrained(tmp_path)
    alone = peftc.load(model.gpt_neox, tmp_path)
    ids = inputs_for("gpt_neox")["input_ids"]
    with torch.no_grad():
        expected = compiled.base.gpt_neox(ids).last_hidden_state
        assert not torch.equal(expected, model.gpt_neox(ids).last_hidden_state)
        assert torch.equal(alone(ids).last_hidden_state, expected)


def test_an_embedding_saved_with_a_backbone(tmp_path: Path) -> None:
    model = llama()
    compiled = peftc.compile(model.model, peftc.LoraConfig(target_modules=["q_proj"]))
    compiled.save_pretrained(tmp_path, save_embedding_layers=True)
    assert peftc.load(model, tmp_path).active_adapters == ["default"]
