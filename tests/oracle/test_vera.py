"""VeRA against peft: outputs, gradients, files both ways with and without the projections, merging, the same draws."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import peftc
from tests.support.methods import LINEARS, ROWS, Linears, compare
from tests.support.models import tiny, token_ids

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not saved": {"save_projection": False, "projection_prng_key": 7},
    "random": {"init_weights": False},
    "start": {"d_initial": 0.5, "vera_dropout": 0.1},
    "biases": {"bias": "vera_only"},
}


@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_files(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.VeraConfig(r=4, target_modules=LINEARS, **VARIANTS[variant])
    compare(Linears(), ROWS, config, tmp_path, moved=0.5)
    for folder in ("ours", "theirs"):
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert ("base_model.vera_A" in saved) is (variant != "not saved")


def test_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.VeraConfig(r=4, target_modules=LINEARS)
    compare(Linears().bfloat16(), ROWS.bfloat16(), config, tmp_path, within=1e-5, merged=4e-2, moved=0.5)


def test_projections_are_those_that_peft_draws_with_the_same_seed() -> None:
    """So both start as the same function, and a file without projections means the same in both."""
    torch.manual_seed(0)
    net = Linears()
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(net), peft.VeraConfig(r=3, projection_prng_key=5, target_modules=LINEARS)
    )
    ours = peftc.compile(net, peftc.VeraConfig(r=3, projection_prng_key=5, target_modules=LINEARS))
    own = ours.adapter_state_dict()
    for name in ("vera_A", "vera_B"):
        assert torch.equal(own[f"base_model.{name}"], getattr(theirs.base_model, name)["default"])
    assert torch.equal(ours(ROWS), net(ROWS))


def test_defaults_of_a_model_and_gpt2s_transposed_weights(tmp_path: Path) -> None:
    model, ids = tiny("gpt2"), token_ids(2, 5, 64)
    compiled = peftc.compile(model, peftc.VeraConfig(r=4))
    assert {edit.site.rpartition(".")[2] for edit in compiled.plan.edits} == {"c_attn"}
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter += 0.3
    compiled.save_pretrained(tmp_path)
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    torch.testing.assert_close(compiled(ids).logits, again(ids).logits)


def test_a_file_names_what_is_left_where_peft_has_no_exclude_modules(tmp_path: Path) -> None:
    net = Linears()
    compiled = peftc.compile(net, peftc.VeraConfig(r=4, target_modules=LINEARS, exclude_modules=["c"]))
    compiled.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path))
    assert sorted(theirs.base_model.targeted_module_names) == ["l", "n"]
    assert {edit.site for edit in peftc.load(net, tmp_path).plan.edits} == {"l", "n"}


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(peftc.SpecError, match=r"r: got 0"):
        peftc.VeraConfig(r=0)
    with pytest.raises(peftc.SpecError, match="layers_pattern needs layers_to_transform"):
        peftc.VeraConfig(layers_pattern="h")
    with pytest.raises(peftc.NoMatchError, match=r"is embedding; VERA adapts linear"):
        peftc.compile(tiny("gpt2"), peftc.VeraConfig(target_modules=["wte"]))


def test_projections_that_no_file_has_are_drawn_for_a_merge_on_disk(tmp_path: Path) -> None:
    model, ids = tiny("llama"), token_ids(2, 5, 64)
    model.save_pretrained(tmp_path / "base")
    compiled = peftc.compile(model, peftc.VeraConfig(r=4, save_projection=False))
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter += 0.3
    compiled.save_pretrained(tmp_path / "adapter")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, compiled(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids).logits, compiled(ids).logits, atol=1e-3)


def test_projections_that_a_file_has_count_and_not_the_seed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Linears()
    compiled = peftc.compile(net, peftc.VeraConfig(r=4, target_modules=LINEARS))
    with torch.no_grad():
        for tensor in compiled.adapter_state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape)
    compiled.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path)).eval()
    for again in (theirs, peftc.load(net, tmp_path)):
        torch.testing.assert_close(again(ROWS), compiled(ROWS))
    assert not torch.allclose(compiled(ROWS), net(ROWS), atol=1e-2)
