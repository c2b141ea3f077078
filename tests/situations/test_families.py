"""Adapters of a text model on the multimodal model of its family, and back; heads that only a tie shows."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from tests.support.adapters import lora, perturb

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IDS = torch.tensor([[5, 6, 7, 8]])


def text() -> Any:
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT)).eval()


def multimodal() -> Any:
    """With the text model's weights."""
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text().model.state_dict())
    model.tie_weights()
    return model


def test_the_two_are_the_same_on_text() -> None:
    torch.testing.assert_close(multimodal()(IDS).logits, text()(IDS).logits)


@pytest.mark.parametrize("writer", ["peftc", "peft"])
def test_a_text_adapter_on_the_multimodal_model(writer: str, tmp_path: Path) -> None:
    if writer == "peftc":
        trained = perturb(peftc.compile(text(), lora("q_proj", "down_proj")))
    else:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        trained = peft.get_peft_model(text(), config).eval()
    trained.save_pretrained(tmp_path)
    want = trained(IDS).logits
    loaded = peftc.load(multimodal(), tmp_path, verify="files")
    torch.testing.assert_close(loaded(IDS).logits, want)
    assert all(edit.site.startswith("model.language_model.") for edit in loaded.plan.edits)


def test_an_adapter_of_its_text_alone_goes_back(tmp_path: Path) -> None:
    spec = peftc.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    trained = perturb(peftc.compile(multimodal(), spec))
    trained.save_pretrained(tmp_path)
    torch.testing.assert_close(peftc.load(text(), tmp_path, verify="files")(IDS).logits, trained(IDS).logits)


class Tied(nn.Module):
    """Its head is the embedding's matrix, and it has no get_output_embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(self.embed(ids))))


def test_all_linear_leaves_heads_that_are_tied() -> None:
    compiled, ids = peftc.compile(Tied(), peftc.LoraConfig(target_modules="all-linear")), torch.arange(6).view(2, 3)
    assert [edit.site for edit in compiled.plan.edits] == ["fc"]
    assert any(miss.value == "head" and "tied to an embedding" in miss.reason for miss in compiled.plan.misses)
    y = perturb(compiled)(ids)
    torch.testing.assert_close(compiled.merge_and_unload()(ids), y)
