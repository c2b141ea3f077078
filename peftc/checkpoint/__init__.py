"""PEFT's files, both ways."""

from peftc.checkpoint.files import locate
from peftc.checkpoint.load import read_adapter
from peftc.checkpoint.prompts import prompt_edit, prompt_embeddings, prompt_encoder
from peftc.checkpoint.save import save_adapter
from peftc.checkpoint.state import adapter_state_dict, load_state

__all__ = [
    "adapter_state_dict",
    "load_state",
    "locate",
    "prompt_edit",
    "prompt_embeddings",
    "prompt_encoder",
    "read_adapter",
    "save_adapter",
]
