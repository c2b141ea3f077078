"""The model card of an adapter: made, or brought up to date without touching what its author wrote."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftc.checkpoint.atomic import replace_files
from peftc.errors import CheckpointError

CARD_NAME = "README.md"
_FRAMEWORKS = "### Framework versions"
_PACKAGES = ("peftc", "torch", "transformers")


def update_card(folder: Path, config: Mapping[str, Any], transformers_model: bool) -> None:
    """Write the card of an adapter with `config` into `folder`, or bring the one there up to date."""
    content = card(config, transformers_model, _existing(folder / CARD_NAME))
    replace_files(folder, {CARD_NAME: content.encode()}, heads=[])


def card(config: Mapping[str, Any], transformers_model: bool, existing: str | None = None) -> str:
    """The text of a card: front matter (library, base model, tags, task) merged into that of `existing`; its text kept."""
    from huggingface_hub import ModelCard

    try:
        new: Any = ModelCard(existing if existing is not None else _text(config), ignore_metadata_errors=True)
    except Exception as error:  # YAML that anyone may have written.
        raise CheckpointError(f"{CARD_NAME}: its front matter can't be read: {error}. Mend or remove it.") from None
    base, method = config["base_model_name_or_path"], str(config["peft_type"]).lower()
    tags = [*(new.data.tags or []), "peftc", method]
    if base and not Path(base).is_absolute():
        new.data.base_model = new.data.base_model or base
        tags.append(f"base_model:adapter:{base}")
    new.data.library_name = new.data.library_name or "peft"
    if transformers_model:
        tags.append("transformers")
    if config["task_type"] == "CAUSAL_LM":
        new.data.pipeline_tag = new.data.pipeline_tag or "text-generation"
    new.data.tags = list(dict.fromkeys(tags))
    section = f"\n\n{_FRAMEWORKS}\n\n" + "".join(f"- {name} {version(name)}\n" for name in _PACKAGES)
    before, found, after = new.text.partition(f"\n{_FRAMEWORKS}\n")
    rest = re.search(r"^#.*", after, re.MULTILINE | re.DOTALL) if found else None
    new.text = before.rstrip() + section + (f"\n{rest.group()}" if rest is not None else "")
    return str(new)


def _existing(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8") if file.exists() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: can't be read as text: {error}") from None


def _text(config: Mapping[str, Any]) -> str:
    base, method = config["base_model_name_or_path"], str(config["peft_type"])
    text = f"A {method} adapter{f' for `{base}`' if base else ''}. Load it with peftc or PEFT:"
    code = ["```python", "import peftc", "", 'model = peftc.load(base_model, "path/to/this/folder")', "```", ""]
    return "\n".join(["---", "{}", "---", "", "# Adapter", "", text, "", *code])
