"""Plans of models that have no weights, and of small ones with all that can be told of a plan."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from tests.support.models import Everything, tiny
from tests.support.prompts import METHODS

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def meta_llama(layers: int, hidden: int, intermediate: int, **fields: Any) -> nn.Module:
    """A Llama of that shape without weights."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=8,
        **fields,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def golden_plans() -> dict[str, peftc.Plan]:
    """Plans of all kinds: what they print is in tests/golden."""
    seventy = meta_llama(80, 8192, 28672, dtype=torch.bfloat16).to(torch.bfloat16)
    return {
        "llama70b": peftc.plan(
            seventy,
            peftc.LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN, rank_pattern={r"\b[0-3]\..*down_proj": 8}),
        ),
        "misses": peftc.plan(
            tiny("bert", "AutoModelForSequenceClassification"),
            {
                "a": peftc.LoraConfig(
                    task_type="SEQ_CLS",
                    bias="all",
                    target_modules=["query", "vlaue", "word_embeddings", "LayerNorm"],
                    exclude_modules=["dens"],
                    layers_to_transform=[0, 1, 9],
                    modules_to_save=["poler"],
                    alpha_pattern={"key": 3},
                ),
                "b": peftc.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
            },
        ),
        "tied": peftc.plan(tiny("gpt2"), peftc.LoraConfig(target_modules=["lm_head", "c_attn"], lora_dropout=0.1)),
        "kinds": peftc.plan(
            Everything(), peftc.LoraConfig(target_modules=r"embed|linear|transposed|conv\dd", init_lora_weights=False)
        ),
        "prompts": peftc.plan(
            tiny("llama", "AutoModelForSequenceClassification"),
            {
                "prefix": METHODS["projected prefix"]("SEQ_CLS"),
                "encoder": METHODS["p-tuning"]("SEQ_CLS"),
                "lora": peftc.LoraConfig(target_modules=["q_proj"]),
            },
        ),
        "prompts_t5": peftc.plan(tiny("t5"), METHODS["prompt"]("SEQ_2_SEQ_LM")),
        "prompts_missed": peftc.plan(tiny("deberta-v2"), METHODS["prefix"]("FEATURE_EXTRACTION")),
    }
