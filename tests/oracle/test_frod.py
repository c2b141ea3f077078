"""FRoD against peft: what weights of one kind share, and what follows from it."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftc
from peftc_rules.frod.basis import kind_of, layer_of
from tests.support.against import near
from tests.support.interchange import perturbed, quietly
from tests.support.models import inputs_for, tiny, token_ids

FIELDS: dict[str, Any] = {"sparse_rate": 0.05, "target_modules": ["q_proj", "down_proj"]}
IDS = token_ids(2, 7, 64)


def in_peft(model: nn.Module, **fields: Any) -> Any:
    return quietly(peft.get_peft_model, copy.deepcopy(model), peft.FrodConfig(progressbar=False, **fields))


def test_a_fresh_one_has_peft_s_bases_and_places_and_is_the_identity(tmp_path: Path) -> None:
    model = tiny("llama")
    theirs = in_peft(model, **FIELDS)
    ours = peftc.compile(model, peftc.FrodConfig(**FIELDS))
    assert torch.equal(ours(IDS).logits, model(IDS).logits)
    quietly(theirs.save_pretrained, tmp_path)
    saved, own = load_file(tmp_path / "adapter_model.safetensors"), ours.adapter_state_dict()
    assert saved.keys() == own.keys()
    shared = [key for key in saved if "frod_lambda" not in key]
    assert len(shared) == 6
    for key in shared:
        assert torch.equal(own[key], saved[key]), key
    for key in saved.keys() - set(shared):
        near(own[key], saved[key], 1e-5, key)


@pytest.mark.parametrize("kind", ["t5", "bert", "gpt2"])
def test_models_with_other_names(kind: str, tmp_path: Path) -> None:
    """Encoders and decoders, whose layers have the same numbers and kinds; weights that are stored turned."""
    model, inputs = tiny(kind), inputs_for(kind)
    theirs = perturbed(in_peft(model), 1).eval()
    quietly(theirs.save_pretrained, tmp_path)
    ours = peftc.load(model, tmp_path).eval()
    y = theirs(**inputs)[0]
    assert not torch.allclose(y, model(**inputs)[0], atol=1e-3)
    near(ours(**inputs)[0], y, 1e-5, "outputs")


def test_what_is_not_saved_follows_from_the_basis_of_the_file(tmp_path: Path) -> None:
    """Signs of its columns are those of whoever computed it: another machine may have others."""
    model = tiny("llama")
    spec = peftc.FrodConfig(**FIELDS)
    compiled = perturbed(peftc.compile(model, spec), 1)
    state = {key: tensor.clone() for key, tensor in compiled.adapter_state_dict().items()}
    signs = 1 - 2 * (torch.arange(32) % 3 == 0).float()
    for key, tensor in state.items():
        if "frod_V.self_attn_q_proj" in key:
            tensor.mul_(signs)
        if "q_proj.frod_lambda_s_values" in key:
            rows, columns = state["base_model.frod_s_indices.self_attn_q_proj"]
            tensor.mul_(signs[rows] * signs[columns])
    other = peftc.compile(model, spec)
    peftc.set_peft_model_state_dict(other, state)
    near(other(IDS).logits, compiled(IDS).logits, 1e-5, "outputs")
    other.save_pretrained(tmp_path / "adapter")
    near(peftc.load(model, tmp_path / "adapter")(IDS).logits, compiled(IDS).logits, 1e-5, "outputs")
    model.save_pretrained(tmp_path / "base")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    near(merged(IDS).logits, compiled(IDS).logits, 1e-4, "outputs, merged on disk")


def test_weights_of_one_kind_and_other_sizes_are_refused() -> None:
    model = nn.Sequential(*(nn.ModuleDict({"fc": nn.Linear(size, 6)}) for size in (8, 6)))
    with pytest.raises(peftc.SpecError, match=r"1.fc has 6 inputs and 0.fc, of the same kind 'fc', has 8") as refused:
        peftc.plan(model, peftc.FrodConfig(target_modules=["fc"]))
    assert "exclude_modules" in str(refused.value)
    assert len(peftc.plan(model, peftc.FrodConfig(target_modules=["fc"], exclude_modules=["1.fc"])).edits) == 1


def test_kinds_and_layers_are_peft_s() -> None:
    from peft.tuners.frod.model import _category_from_key, _layer_index_from_key

    names = [
        name for kind in ("t5", "bert", "gpt2", "llama", "vit", "whisper") for name, _ in tiny(kind).named_modules()
    ]
    for number, name in enumerate([*names, "layers.x.3", "layers", "head"]):
        assert kind_of(name) == _category_from_key(name)
        assert layer_of(name, number) == _layer_index_from_key(name, number)


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(peftc.SpecError, match="sparse_rate: got 2"):
        peftc.FrodConfig(sparse_rate=2)
    with pytest.raises(peftc.SpecError, match="runtime_offload_base_weight"):
        peftc.FrodConfig.from_dict({"peft_type": "FROD", "runtime_offload_base_weight": True})
