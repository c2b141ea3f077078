"""Merging: nothing half done, nothing broken accepted, the result a plain model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import peftc
from peftc.merge.fold import is_finite
from tests.support.adapters import perturb
from tests.support.models import Everything, Net, tiny, token_ids
from tests.support.snapshots import assert_unchanged, snapshot

ALL = ["embed", "linear", "transposed", "conv1d", "conv2d", "conv3d"]


def compiled_everything(**fields: Any) -> peftc.CompiledModel:
    return perturb(peftc.compile(Everything().eval(), peftc.LoraConfig(target_modules=ALL, r=2, **fields)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_adapters_are_refused_and_nothing_is_half_merged(value: float) -> None:
    compiled = compiled_everything()
    with torch.no_grad():
        compiled.base.conv3d.lora_A.default.weight[0] = value
    before = snapshot(compiled)
    with pytest.raises(peftc.MergeError, match=r"conv3d\.weight: folding adapter 'default' gives NaN or Inf"):
        compiled.merge_adapter()
    assert_unchanged(compiled, before)
    assert compiled.merged_adapters == []


def test_an_overflow_of_the_dtype_is_refused() -> None:
    compiled = perturb(peftc.compile(Everything().half(), peftc.LoraConfig(target_modules=["linear"], r=2)))
    with torch.no_grad():
        compiled.base.linear.lora_B.default.weight.fill_(1e5)
    with pytest.raises(peftc.MergeError, match=r"over the range of torch\.float16"):
        compiled.merge_adapter()


def test_a_merged_model_runs_no_adapter_op_and_unload_keeps_no_trace() -> None:
    compiled = compiled_everything(lora_bias=False, modules_to_save=["head"])
    y = compiled(token_ids())
    compiled.merge_adapter()
    assert compiled.site_code() == {}
    assert compiled.merged_adapters == ["default"]
    merged = compiled.merge_and_unload()
    torch.testing.assert_close(merged(token_ids()), y, rtol=1e-4, atol=1e-5)
    assert type(merged) is Everything
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in Everything().named_modules()]
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("call", ["merge_adapter", "set_adapter", "disable_adapter", "add_adapter", "delete_adapter"])
def test_calls_that_would_be_wrong_while_merged_are_refused(call: str) -> None:
    compiled = compiled_everything()
    compiled.merge_adapter()
    before = snapshot(compiled)
    arguments: dict[str, tuple[Any, ...]] = {
        "set_adapter": ("default",),
        "delete_adapter": ("default",),
        "add_adapter": ("b", peftc.LoraConfig(target_modules=["linear"])),
    }
    with pytest.raises(peftc.MergeError, match=r"unmerge_adapter\(\) first"):  # noqa: PT012
        result = getattr(compiled, call)(*arguments.get(call, ()))
        result.__enter__()
    assert_unchanged(compiled, before)


def test_merging_what_is_not_there() -> None:
    compiled = compiled_everything()
    with pytest.raises(peftc.MergeError, match="no adapter is merged"):
        compiled.unmerge_adapter()
    with pytest.raises(peftc.AdapterError, match="no adapter 'other'"):
        compiled.merge_adapter(["other"])
    compiled.set_adapter([])
    with pytest.raises(peftc.AdapterError, match="is not active"):
        compiled.merge_adapter(["default"])


def test_grouped_convolutions_can_not_be_merged() -> None:
    compiled = peftc.compile(Net(), peftc.LoraConfig(target_modules=["grouped"], r=4))
    with pytest.raises(peftc.MergeError, match="a convolution in 2 groups can't express"):
        compiled.merge_adapter()


def test_lora_bias_needs_a_bias_to_fold_into() -> None:
    compiled = peftc.compile(Everything(), peftc.LoraConfig(target_modules=["conv2d"], lora_bias=True))
    with pytest.raises(peftc.MergeError, match="needs a bias to fold into"):
        compiled.merge_adapter()


def test_part_of_the_active_adapters() -> None:
    specs = {
        "a": peftc.LoraConfig(target_modules=["linear"], r=2),
        "b": peftc.LoraConfig(target_modules=["linear"], r=2),
        "scale": peftc.IA3Config(target_modules=["linear"], feedforward_modules=[]),
    }
    compiled = perturb(peftc.compile(Everything().eval(), specs))
    compiled.set_adapter(["a", "b"])
    y = compiled(token_ids())
    compiled.merge_adapter(["b"])
    torch.testing.assert_close(compiled(token_ids()), y)
    compiled.unmerge_adapter()
    compiled.set_adapter(["a", "b", "scale"])
    y = compiled(token_ids())
    with pytest.raises(peftc.MergeError, match="do not commute"):
        compiled.merge_adapter(["scale"])
    compiled.merge_adapter(["a", "b"])
    torch.testing.assert_close(compiled(token_ids()), y)


def test_modules_saved_whole_are_merged_with_their_buffers() -> None:
    model = Net()
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["fc"], modules_to_save=["norm", "out"]))
    compiled.train()
    compiled(torch.randn(8, 3, 8, 8)).sum().backward()
    compiled.eval()
    x = torch.randn(2, 3, 8, 8)
    y, before = compiled(x), snapshot(compiled)
    compiled.merge_adapter()
    torch.testing.assert_close(compiled(x), y)
    assert not torch.equal(compiled.base.norm.running_mean, model.norm.running_mean)
    compiled.unmerge_adapter()
    assert_unchanged(compiled, before)


def test_a_merged_checkpoint_loads_without_peftc(tmp_path: Path) -> None:
    compiled = perturb(peftc.compile(tiny("llama"), peftc.LoraConfig(target_modules="all-linear", r=2)))
    ids = token_ids(2, 5, 64)
    merged = compiled.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again(ids).logits, merged(ids).logits)


def test_merging_while_the_original_lives_shares_its_tensors() -> None:
    model = Everything()
    compiled = peftc.compile(model, peftc.LoraConfig(target_modules=["linear"]))
    compiled.merge_adapter()
    assert compiled.base.linear.weight.data_ptr() != model.linear.weight.data_ptr()
    compiled.unmerge_adapter()
    assert compiled.base.linear.weight.data_ptr() == model.linear.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_what_is_finite(dtype: torch.dtype) -> None:
    """Also where the sum is not, as that of large values, or of both infinities."""
    largest = torch.full((4,), torch.finfo(dtype).max).to(dtype)
    assert is_finite(largest)
    assert is_finite((-largest.float()).to(dtype))
    assert is_finite(torch.empty(0).to(dtype))
    for wrong in ([math.nan, 0], [math.inf, 0], [math.inf, -math.inf]) if dtype.itemsize > 1 else ([math.nan, 0],):
        assert not is_finite(torch.tensor(wrong).to(dtype))
