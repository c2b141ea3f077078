"""RandLoRA against peft: outputs, gradients, files both ways with and without the bases, merging, the same draws."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import peftc
from tests.support.methods import HALF, LINEARS, ROWS, Linears, compare

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not saved": {"save_projection": False, "projection_prng_key": 7},
    "random": {"init_weights": False},
    "sparse": {"sparse": True, "save_projection": False},
    "very sparse": {"very_sparse": True, "randlora_dropout": 0.1},
    "one basis": {"r": 40, "bias": "randlora_only"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_files(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {"r": 4, "randlora_alpha": 2, "target_modules": LINEARS, **VARIANTS[variant]}
    compare(Linears(), ROWS, peft.RandLoraConfig(**fields), tmp_path, within=4e-6, moved=0.3)
    saved = set(load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    assert ("base_model.randlora_A" in saved) is fields.get("save_projection", True)
    # peft writes them again for every site, and reads files that have them once.
    assert not any(key.endswith(".l.randlora_A") for key in saved)


def test_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.RandLoraConfig(r=4, randlora_alpha=2, target_modules=LINEARS)
    compare(Linears().bfloat16(), ROWS.bfloat16(), config, tmp_path, within=HALF, merged=4e-2, moved=0.3)


@pytest.mark.parametrize("kind", ["uniform", "sparse", "very_sparse"])
def test_bases_are_those_that_peft_draws_with_the_same_seed(kind: str) -> None:
    torch.manual_seed(0)
    net, fields = Linears(), {"r": 5, "projection_prng_key": 3, "target_modules": LINEARS}
    fields |= {} if kind == "uniform" else {kind: True}
    theirs: Any = peft.get_peft_model(copy.deepcopy(net), peft.RandLoraConfig(**fields))
    ours = peftc.compile(net, peftc.RandLoraConfig(**fields))
    own, named = ours.adapter_state_dict(), dict(theirs.named_parameters())
    for name in ("randlora_A", "randlora_B"):
        assert torch.equal(own[f"base_model.{name}"], getattr(theirs.base_model, name)["default"])
    for site in LINEARS:
        for name in ("randlora_lambda", "randlora_gamma"):
            key = f"base_model.model.{site}.{name}"
            assert torch.equal(own[key], named[f"{key}.default"])
    assert torch.equal(ours(ROWS), net(ROWS))


def test_bases_that_a_file_has_count_and_not_the_seed(tmp_path: Path) -> None:
    """peft warns of missing keys, those for every site; it takes the bases all the same."""
    torch.manual_seed(0)
    net = Linears()
    compiled = peftc.compile(net, peftc.RandLoraConfig(r=4, randlora_alpha=2, target_modules=LINEARS))
    with torch.no_grad():
        for tensor in compiled.adapter_state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape)
    compiled.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path)).eval()
    for again in (theirs, peftc.load(net, tmp_path)):
        torch.testing.assert_close(again(ROWS), compiled(ROWS))
    assert not torch.allclose(compiled(ROWS), net(ROWS), atol=1e-2)
