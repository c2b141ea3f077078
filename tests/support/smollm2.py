"""A small model that is asked and trained as SmolLM2 is."""

from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peftc.demo import smollm2


def tiny_model(folder: Path) -> None:
    """A random model with the tokenizer of SmolLM2."""
    where, options = smollm2.locate(None)
    AutoTokenizer.from_pretrained(where, **options).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
