"""Models by their folder or config: their structure alone, or with weights. Code from a folder is never run."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from peftc.checkpoint import model_config
from peftc.errors import CheckpointError
from peftc.progress import wanted


def structure(source: str | Path, name: str | None = None) -> nn.Module:
    """The transformers model that a config describes, on the meta device; `source` as in `model_config`.

    `name`: its class, if not the one that the config names. Raises CheckpointError.
    """
    cls, config = _described(model_config(source), name)
    try:
        with torch.device("meta"):
            # As from_pretrained, in the dtype that the config says.
            return cast(nn.Module, cls._from_config(config)).eval()
    except Exception as error:  # Whatever the values of the config make the class raise.
        raise CheckpointError(f"{source}: the config does not make a {cls.__name__}: {error}") from None


def with_weights(folder: Path, name: str | None = None) -> Any:
    """The transformers model in a folder, on the CPU, in eval(). Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder; give one with a model's config.json and weights")
    cls, config = _described(model_config(folder), name)
    try:
        return cls.from_pretrained(folder, config=config, dtype="auto", local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: can't be loaded as a {cls.__name__}: {error}") from None


def tokenizer_in(folder: Path) -> Any | None:
    """The tokenizer in a folder, or None if there is none. Raises CheckpointError."""
    if not (folder / "tokenizer.json").is_file():
        return None
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # Whatever the files' contents make the class raise.
        raise CheckpointError(f"{folder}: its tokenizer can't be loaded: {error}") from None


def _described(file: Path, name: str | None) -> tuple[Any, Any]:
    """The class and the config of the config in a file."""
    import transformers

    if not wanted():
        transformers.utils.logging.disable_progress_bar()
    try:
        config: Any = transformers.AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # Whatever the file's contents make the config's class raise.
        raise CheckpointError(f"{file}: is no config of a model that transformers has: {error}") from None
    given = name or next(iter(config.architectures or ()), "")
    cls = getattr(transformers, given, None)
    # Either a class of models, or one of the classes that choose (AutoModelForCausalLM).
    if cls is not None and given.startswith("AutoModel"):
        cls = _chosen(cls, config)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        told = "names no class that transformers has"
        if name is not None:
            raise CheckpointError(f"--class {name}: {told} for {file} (its architectures: {config.architectures!r})")
        raise CheckpointError(
            f"{file}: {told} (architectures: {config.architectures!r}). Name one with --class, LlamaForCausalLM or"
            " AutoModelForCausalLM say"
        )
    return cls, config


def _chosen(auto: Any, config: Any) -> Any:
    """The class that an AutoModel… chooses for a config, or None if it has none for it."""
    try:
        with torch.device("meta"):
            return type(auto.from_config(config))
    except ValueError:
        return None
