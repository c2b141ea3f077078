"""Mixed batches against peft, which has them for inference with LoRA."""

from pathlib import Path

import pytest
import torch

import peftc
from tests.support.compare import assert_close, first_tensor, randomise, to_peft
from tests.support.models import inputs_for, tiny
from tests.support.prompts import generated

NAMES = ["first", "__base__", "second", "first", "third"]
TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "c_fc"],
    "t5": ["q", "wo"],
    "bert": ["query", "dense"],
    "vit": ["q_proj", "v_proj"],
}


def pair(model_type: str, folder: Path) -> tuple[peftc.CompiledModel, object]:
    """Three adapters, here and in peft."""
    model, targets = tiny(model_type), TARGETS[model_type]
    specs = {
        "first": peftc.LoraConfig(r=4, target_modules=targets),
        "second": peftc.LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=targets[:1]),
        "third": peftc.LoraConfig(r=3, lora_alpha=-2, target_modules=targets[1:]),
    }
    compiled = peftc.compile(model, specs)
    randomise(compiled)
    return compiled, to_peft(compiled, model, folder)


@pytest.mark.parametrize("model_type", TARGETS)
def test_outputs_equal_peft(model_type: str, tmp_path: Path) -> None:
    compiled, theirs = pair(model_type, tmp_path)
    generator = torch.Generator().manual_seed(7)
    inputs = {
        key: torch.randn(5, *value.shape[1:], generator=generator)
        if value.is_floating_point()
        else torch.randint(3, 60, (5, *value.shape[1:]), generator=generator)
        for key, value in inputs_for(model_type).items()
        if key != "attention_mask"
    }
    with torch.no_grad():
        ours = first_tensor(compiled(**inputs, adapter_names=NAMES))
        expected = first_tensor(theirs(**inputs, adapter_names=NAMES))  # pyright: ignore
    assert_close(ours, expected, tolerance=2e-6)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_generated_tokens_equal_peft(model_type: str, beams: int, tmp_path: Path) -> None:
    compiled, theirs = pair(model_type, tmp_path)
    ids = torch.randint(3, 60, (5, 6), generator=torch.Generator().manual_seed(3))
    options = {"adapter_names": NAMES, "num_beams": beams}
    assert torch.equal(generated(compiled, ids, **options), generated(theirs, ids, **options))
