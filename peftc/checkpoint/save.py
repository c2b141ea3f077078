"""Saving an adapter: its spec as PEFT's config, its tensors, a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftc.checkpoint.files import write_adapter
from peftc.checkpoint.prompts import encoder_state, prompt_edit
from peftc.checkpoint.state import saved_state_dict
from peftc.graph.sites import transformers_config
from peftc.rewrite.host import original_class
from peftc.rewrite.program import Program


def save_adapter(folder: Path, program: Program, adapter: str) -> None:
    """Write `adapter` into `folder`. Raises CheckpointError if that can't be done; nothing is half written then."""
    config = _config(program, adapter)
    edit = prompt_edit(program, adapter)
    encoder = encoder_state(program, edit) if edit is not None else {}
    write_adapter(folder, config, saved_state_dict(program, adapter), _card(config), encoder)


def _config(program: Program, adapter: str) -> dict[str, Any]:
    """The spec as saved: for inference, with the base model's name, and its class where no task says it."""
    config = {**program.plan.adapters[adapter].to_dict(), "inference_mode": True}
    base_config = transformers_config(program.base)
    if config["base_model_name_or_path"] is None and base_config is not None:
        config["base_model_name_or_path"] = base_config.name_or_path or None
    if config["task_type"] is None and config["auto_mapping"] is None and base_config is not None:
        cls = original_class(program.base)
        config["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return config


def _card(config: Mapping[str, Any]) -> str:
    base, method = config["base_model_name_or_path"], str(config["peft_type"])
    front = ["---", "library_name: peft", *([f"base_model: {base}"] if base else []), "tags:", "- peftc"]
    text = f"A {method} adapter{f' for `{base}`' if base else ''}. Load it with peftc or PEFT:"
    code = ["```python", "import peftc", "", 'model = peftc.load(base_model, "path/to/this/folder")', "```", ""]
    return "\n".join([*front, f"- {method.lower()}", "---", "", "# Adapter", "", text, "", *code])
