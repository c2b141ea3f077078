"""VB-LoRA against peft: outputs, gradients, files both ways with logits and with mixtures, merging."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import peftc
import peftc.peft
from tests.support.methods import HALF, LINEARS, ROWS, Linears, assert_near, compare, in_peft
from tests.support.models import tiny, token_ids

FIELDS: dict[str, Any] = {
    "num_vectors": 7,
    "vector_length": 2,
    "init_vector_bank_bound": 0.5,
    "target_modules": LINEARS,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one": {"topk": 1, "r": 2},
    "all": {"topk": 7, "vblora_dropout": 0.1, "bias": "vblora_only"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_files(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.VBLoRAConfig(**FIELDS, **VARIANTS[variant])
    _, ours = compare(Linears(), ROWS, config, tmp_path, within=4e-6, moved=0.5)
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert saved["base_model.vblora_vector_bank"].shape == (7, 2)
    assert [name for name, _ in ours.named_parameters() if "vector_bank" in name] == ["base.vblora_vector_bank.default"]


def test_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compare(
        Linears().bfloat16(),
        ROWS.bfloat16(),
        peft.VBLoRAConfig(**FIELDS),
        tmp_path,
        within=HALF,
        merged=4e-2,
        moved=0.5,
    )


@pytest.mark.parametrize("topk", [1, 2, 5])
def test_files_with_mixtures_go_both_ways(topk: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Linears()
    model = in_peft(net, peft.VBLoRAConfig(**FIELDS, topk=topk, save_only_topk_weights=True), 0.5)
    model.save_pretrained(tmp_path / "theirs")
    y = model(ROWS)
    ours = peftc.load(net, tmp_path / "theirs")
    assert_near(ours(ROWS), y, 2e-6, "peft's file")
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours")]
    assert [{key: (t.shape, t.dtype) for key, t in file.items()} for file in files] == [
        {key: (t.shape, t.dtype) for key, t in files[0].items()}
    ] * 2
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "ours")).eval()
    assert_near(again(ROWS), y, 2e-6, "our file")
    with pytest.raises(peftc.SpecError, match="has no logits, so training can't go on from it"):
        peftc.load(net, tmp_path / "theirs", is_trainable=True)


@pytest.mark.parametrize("mixtures", [False, True])
def test_savable_parameters_are_counted_alike(mixtures: bool, capsys: Any) -> None:
    said: list[Any] = []
    for lib in (peft, peftc.peft):
        model: Any = lib.get_peft_model(Linears(), lib.VBLoRAConfig(**FIELDS, save_only_topk_weights=mixtures))
        said.append(model.base_model.get_nb_savable_parameters())
        model.base_model.print_savable_parameters()
        said.append(capsys.readouterr().out)
    assert said[2:] == said[:2]


def test_mixtures_merge_on_disk(tmp_path: Path) -> None:
    model, ids = tiny("llama"), token_ids(2, 5, 64)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    spec = peftc.VBLoRAConfig(num_vectors=9, vector_length=8, save_only_topk_weights=True, init_vector_bank_bound=0.5)
    compiled = peftc.compile(model, spec)
    compiled.save_pretrained(tmp_path / "adapter")
    peftc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, compiled(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids).logits, compiled(ids).logits, atol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(peftc.SpecError, match="topk=8 is more than there are vectors, num_vectors=7"):
        peftc.VBLoRAConfig(num_vectors=7, topk=8)
    with pytest.raises(peftc.NoMatchError, match="its 6 outputs can't be cut into vectors of vector_length=4"):
        peftc.compile(Linears(), peftc.VBLoRAConfig(vector_length=4, target_modules=["l"]))
