"""PEFT's AutoPeftModels: a base and its adapter from the adapter's folder alone."""

import os
from pathlib import Path
from typing import Any, ClassVar

from peftc.checkpoint import locate
from peftc.errors import CheckpointError
from peftc.peft.configs import PeftConfig
from peftc.peft.models import PeftModel
from peftc.peft.types import TOKENIZER_CONFIG_NAME

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]

_DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only", "force_download")


_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class AutoPeftModel:
    """A base model with an adapter, of the class that the adapter's config names.

    Example: model = AutoPeftModelForCausalLM.from_pretrained("adapter")
    """

    auto_class: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base that the adapter's config names, with the adapter on it. `kwargs` are the base's `from_pretrained`'s.

        A vocabulary that the folder's tokenizer has grown is given to the base first. Raises CheckpointError, SpecError.
        """
        download = {key: kwargs[key] for key in _DOWNLOAD if key in kwargs}
        if revision is not None:
            download["revision"] = revision
        folder = locate(pretrained_model_name_or_path, kwargs.pop("subfolder", None), **download)
        own = PeftConfig.from_pretrained(folder)
        path = own.base_model_name_or_path
        if path is None:
            raise CheckpointError(
                f"{folder}: its config names no base model (base_model_name_or_path); load that, and then the adapter with"
                " PeftModel.from_pretrained"
            )
        base = cls._base_class(own).from_pretrained(path, revision=own.revision, **kwargs)
        if (Path(folder) / TOKENIZER_CONFIG_NAME).exists():
            from transformers import AutoTokenizer

            size = len(AutoTokenizer.from_pretrained(folder))
            if size > base.get_input_embeddings().weight.shape[0]:
                base.resize_token_embeddings(size)
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable, config)

    @classmethod
    def _base_class(cls, config: Any) -> Any:
        import transformers

        if cls.auto_class is not None:
            return getattr(transformers, cls.auto_class)
        mapped = config.auto_mapping or {}
        own = getattr(transformers, str(mapped.get("base_model_class")), None)
        if mapped.get("parent_library", "").startswith("transformers") and own is not None:
            return own
        found = _BY_TASK.get(config.task_type)
        if found is None:
            raise CheckpointError(
                "the adapter's config says neither a task nor the class of its base; use an AutoPeftModelFor…"
            )
        return getattr(transformers, found)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For causal language models."""

    auto_class = _BY_TASK["CAUSAL_LM"]


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For sequence-to-sequence language models."""

    auto_class = _BY_TASK["SEQ_2_SEQ_LM"]


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For sequence classification."""

    auto_class = _BY_TASK["SEQ_CLS"]


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For token classification."""

    auto_class = _BY_TASK["TOKEN_CLS"]


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For extractive question answering."""

    auto_class = _BY_TASK["QUESTION_ANS"]


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For embeddings."""

    auto_class = _BY_TASK["FEATURE_EXTRACTION"]
