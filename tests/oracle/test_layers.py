"""LoRA and IA3 on every kind of layer equal peft's, outputs and gradients, through files in both directions."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftc
from tests.support.compare import (
    FLOAT64,
    SEVERAL_LAYERS,
    TOLERANCE,
    assert_close,
    assert_same_function,
    first_tensor,
    randomise,
    to_peft,
)
from tests.support.models import Everything, Net, tiny, token_ids

LAYERS = ["embed", "linear", "transposed", "conv1d", "conv2d", "conv3d"]

LORA: dict[str, dict[str, Any]] = {
    **{name: {"target_modules": [name]} for name in LAYERS},
    "all": {"target_modules": LAYERS},
    "rank_pattern": {"target_modules": LAYERS, "rank_pattern": {"conv.d": 2, "linear": 5}},
    "alpha_pattern": {"target_modules": LAYERS, "alpha_pattern": {"^conv2d": 3, "embed": 7.5}},
    "rslora": {"target_modules": LAYERS, "use_rslora": True, "lora_alpha": 3},
    "bias_all": {"target_modules": ["linear", "conv1d"], "bias": "all"},
    "bias_lora_only": {"target_modules": ["linear", "conv1d", "conv2d"], "bias": "lora_only"},
    "lora_bias": {"target_modules": ["linear", "transposed", "conv1d", "conv3d"], "lora_bias": True},
    "modules_to_save": {"target_modules": ["linear"], "modules_to_save": ["head", "norm"]},
    "saved_container": {"target_modules": ["linear"], "modules_to_save": ["embed"]},
    "exclude": {"target_modules": r".*(conv\dd|linear)", "exclude_modules": ["conv2d"]},
    "gaussian": {"target_modules": ["linear", "conv2d"], "init_lora_weights": "gaussian"},
    "dropout_in_eval": {"target_modules": LAYERS, "lora_dropout": 0.5},
}
IA3_LAYERS = ["linear", "transposed", "conv2d", "conv3d"]
IA3: dict[str, dict[str, Any]] = {
    "output": {"target_modules": IA3_LAYERS, "feedforward_modules": []},
    "input": {"target_modules": IA3_LAYERS, "feedforward_modules": IA3_LAYERS},
    "mixed": {
        "target_modules": IA3_LAYERS,
        "feedforward_modules": ["transposed", "conv2d"],
        "modules_to_save": ["head"],
    },
    "regex": {"target_modules": r"(linear|conv3d)", "feedforward_modules": r"lin.*"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("fields", LORA.values(), ids=LORA)
def test_lora_equals_peft(fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = Everything().eval().to(dtype)
    compiled = peftc.compile(model, peftc.LoraConfig(**{"r": 4, "lora_alpha": 6, **fields}))
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path)
    assert_same_function(compiled, theirs, {"ids": token_ids()}, _tolerance(fields, dtype))
    _assert_reads_back(theirs, model, compiled, tmp_path)
    _assert_merges(compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("fields", IA3.values(), ids=IA3)
def test_ia3_equals_peft(fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = Everything().eval().to(dtype)
    compiled = peftc.compile(model, peftc.IA3Config(**fields))
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path)
    assert_same_function(compiled, theirs, {"ids": token_ids()}, _tolerance(fields, dtype))
    _assert_reads_back(theirs, model, compiled, tmp_path)
    _assert_merges(compiled)


def _assert_merges(compiled: peftc.CompiledModel) -> None:
    """Folding gives the function that equals peft's; where that is refused, the plan has said so."""
    ids = token_ids()
    y = compiled(ids)
    if any(edit.unmergeable for edit in compiled.plan.edits):
        with pytest.raises(peftc.MergeError):
            compiled.merge_adapter()
        return
    compiled.merge_adapter()
    assert_close(compiled(ids), y, "merged", 1e-5 if y.dtype == torch.float32 else FLOAT64)
    compiled.unmerge_adapter()
    assert torch.equal(compiled(ids), y)


def _tolerance(fields: dict[str, Any], dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return FLOAT64
    return TOLERANCE if len(fields["target_modules"]) == 1 else SEVERAL_LAYERS


def _assert_reads_back(
    theirs: Any, model: nn.Module, compiled: peftc.CompiledModel, folder: Path, tolerance: float = 0
) -> None:
    """What peft writes, peftc reads, to the same outputs."""
    theirs.save_pretrained(folder / "peft")
    again = peftc.load(model, folder / "peft")
    assert_close(again(token_ids()), compiled(token_ids()), "read back", tolerance)


def test_grouped_convolution_equals_peft(tmp_path: Path) -> None:
    model = Net().eval()
    model.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    compiled = peftc.compile(model, peftc.LoraConfig(r=4, target_modules=["conv", "grouped", "fc"]))
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path)
    assert_same_function(compiled, theirs, {"x": torch.randn(2, 3, 9, 9)})


def test_scaled_embedding_equals_peft(tmp_path: Path) -> None:
    """Gemma 3 scales its embedding after the lookup; the adapter must be scaled with it."""
    model = tiny("gemma3_text")
    compiled = peftc.compile(model, peftc.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path)
    ids = token_ids(2, 7, 64)
    assert_close(compiled(ids).logits, theirs(ids).logits, "logits")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_inits_equal_peft(init: str, tmp_path: Path) -> None:
    """peft trains on a residual weight, peftc subtracts the start: the same function of the factors."""
    model = Everything().eval()
    spec = peftc.LoraConfig(r=4, lora_alpha=6, target_modules=["linear", "transposed"], init_lora_weights=init)
    if init == "olora":
        # peft's olora factors a transposed weight as it lies, in shapes that do not fit its own layer.
        spec = peftc.LoraConfig(r=4, lora_alpha=6, target_modules=["linear"], init_lora_weights=init)
    compiled = peftc.compile(model, spec)
    before = first_tensor(model(token_ids()))
    assert torch.equal(compiled(token_ids()), before)
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path)
    assert_close(compiled(token_ids()), theirs(token_ids()), init, 1e-5)
    _assert_reads_back(theirs, model, compiled, tmp_path, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_bases_equal_peft(dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    model = tiny("llama").to(dtype)
    compiled = peftc.compile(model, peftc.LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=autocast)
    assert compiled.base.model.layers[0].mlp.up_proj.lora_A.default.weight.dtype == (
        torch.float32 if autocast else dtype
    )
    randomise(compiled)
    compiled.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, autocast_adapter_dtype=autocast).eval()
    ids = token_ids(2, 7, 64)
    ours, other = compiled(ids).logits, theirs(ids).logits
    assert ours.dtype == other.dtype == dtype
    if dtype is not torch.bfloat16 or not autocast:
        # The scale is applied to the product here and to B's output there, so a rounding may fall the other way.
        assert_close(ours.float(), other.float(), "logits", 4 * torch.finfo(dtype).eps)
        return
    # bfloat16 activations are multiplied by adapters in bfloat16 here, and cast up there: each has roundings of its own.
    exact = copy.deepcopy(compiled).double()(ids).logits
    assert_close(ours.double(), exact, "logits", 8 * torch.finfo(dtype).eps)
    assert_close(other.double(), exact, "peft's logits", 8 * torch.finfo(dtype).eps)


def test_several_adapters_equal_peft(tmp_path: Path) -> None:
    model = Everything().eval()
    specs = {
        "default": peftc.LoraConfig(r=4, target_modules=["linear", "conv2d"], modules_to_save=["head"]),
        "second": peftc.LoraConfig(
            r=2, lora_alpha=5, target_modules=["linear", "transposed"], modules_to_save=["head"]
        ),
    }
    compiled = peftc.compile(model, specs)
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path)
    ids = token_ids()
    for name in specs:
        compiled.set_adapter(name)
        theirs.set_adapter(name)
        assert_same_function(compiled, theirs, {"ids": ids}, tolerance=2e-6)
        compiled.zero_grad()
        theirs.zero_grad()
    with compiled.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(compiled(ids), model(ids))
        assert torch.equal(theirs(ids), model(ids))


def test_several_adapters_at_once_equal_peft(tmp_path: Path) -> None:
    model = Everything().eval()
    specs = {
        "default": peftc.LoraConfig(r=4, target_modules=["linear", "conv2d"]),
        "second": peftc.LoraConfig(r=2, lora_alpha=5, target_modules=["linear", "transposed"], use_rslora=True),
    }
    compiled = peftc.compile(model, specs)
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path)
    compiled.set_adapter(["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    assert_same_function(compiled, theirs, {"ids": token_ids()})


def test_sequence_classification_head_is_trained_and_saved(tmp_path: Path) -> None:
    model = tiny("bert", "AutoModelForSequenceClassification")
    compiled = peftc.compile(model, peftc.LoraConfig(r=4, task_type="SEQ_CLS"))
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path)
    assert type(theirs).__name__ == "PeftModelForSequenceClassification"
    assert_same_function(compiled, theirs, {"input_ids": token_ids(2, 7, 64)})


def test_dropout_draws_the_same_mask_as_peft(tmp_path: Path) -> None:
    model = Everything()
    compiled = peftc.compile(model, peftc.LoraConfig(r=4, target_modules=["linear", "transposed"], lora_dropout=0.4))
    randomise(compiled)
    theirs = to_peft(compiled, model, tmp_path).train()
    compiled.train()
    torch.manual_seed(1)
    ours = compiled(token_ids())
    torch.manual_seed(1)
    assert_close(ours, theirs(token_ids()), "output in training")
    assert not torch.equal(ours, compiled(token_ids()))
