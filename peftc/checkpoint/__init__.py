"""PEFT's files, both ways; checked, and written all or nothing."""

from peftc.checkpoint.base import require_base
from peftc.checkpoint.card import update_card
from peftc.checkpoint.embeddings import SaveEmbeddings
from peftc.checkpoint.files import AdapterFiles
from peftc.checkpoint.hub import Download, locate, model_config, push
from peftc.checkpoint.keys import LoadResult
from peftc.checkpoint.load import read_adapter
from peftc.checkpoint.save import SaveOptions, config_of, gather, save_adapters
from peftc.checkpoint.spelling import respelled_spec
from peftc.checkpoint.state import adapter_state_dict, load_state, saved_state_dict
from peftc.choices import Verify

__all__ = [
    "AdapterFiles",
    "Download",
    "LoadResult",
    "SaveEmbeddings",
    "SaveOptions",
    "Verify",
    "adapter_state_dict",
    "config_of",
    "gather",
    "load_state",
    "locate",
    "model_config",
    "push",
    "read_adapter",
    "require_base",
    "respelled_spec",
    "save_adapters",
    "saved_state_dict",
    "update_card",
]
