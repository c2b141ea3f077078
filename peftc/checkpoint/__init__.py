"""PEFT's files, both ways."""

from peftc.checkpoint.files import locate, read_spec, read_tensors
from peftc.checkpoint.save import save_adapter
from peftc.checkpoint.state import adapter_state_dict, load_state

__all__ = ["adapter_state_dict", "load_state", "locate", "read_spec", "read_tensors", "save_adapter"]
