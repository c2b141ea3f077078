"""trl's SFTTrainer on compiled models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import peftc
from tests.support.adapters import lora


def tokenizer() -> PreTrainedTokenizerFast:
    """One of a few words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(40))]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TEXTS = Dataset.from_list([{"text": f"w{a} w{a + 1} w{a + 2} w{a + 3}"} for a in range(32)])


def compiled(tied: bool, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied))
    torch.manual_seed(1)
    return peftc.compile(model, lora("q_proj", "v_proj", task_type="CAUSAL_LM", **more))


def trainer(model: Any, folder: Path, **more: Any) -> SFTTrainer:
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "max_length": 16,
    }
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False}
    config = SFTConfig(str(folder), **{**options, **quiet, **more})
    return SFTTrainer(model, config, train_dataset=TEXTS, processing_class=tokenizer())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_sft_saves_adapters_and_resumes_bit_for_bit(tied: bool, more: dict[str, Any], tmp_path: Path) -> None:
    straight = compiled(tied)
    set_seed(0)
    trainer(straight, tmp_path, **more).train()
    names = {file.name for file in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    again = compiled(tied)
    set_seed(0)
    trainer(again, tmp_path, **more).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    mine, theirs = peftc.get_peft_model_state_dict(again), peftc.get_peft_model_state_dict(straight)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    fresh = compiled(tied)
    assert any(not torch.equal(value, theirs[key]) for key, value in peftc.get_peft_model_state_dict(fresh).items())


def test_rows_of_tokens_are_trained_at_both_ends_of_a_tie(tmp_path: Path) -> None:
    """trl reads the head's weight past its call, which peft (0.21) fails at there."""
    tokens = [5, 6, 50]
    model = compiled(True, trainable_token_indices=tokens)
    before = {key: value.clone() for key, value in peftc.get_peft_model_state_dict(model).items()}
    trainer(model, tmp_path).train()
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    changed = (peftc.get_peft_model_state_dict(model)[key] - before[key]).abs().amax(1)
    assert (changed > 1e-3).all()  # Of the last, which no text has, through the head alone.
