"""PEFT's AutoPeftModels: a base and its adapter from the adapter's folder alone."""

import os
from pathlib import Path
from typing import Any, ClassVar

from peftc.checkpoint import locate
from peftc.errors import CheckpointError
from peftc.peft.configs import PeftConfig
from peftc.peft.models import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
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
# What is for the adapter alone; no base takes it.
_ADAPTER_S = ("verify", "strict", "allow_pickle", "autocast_adapter_dtype")

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

    task: ClassVar[str | None] = None

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
        """The base that the adapter's config names, with the adapter on it. `kwargs` are the base's `from_pretrained`'s,
        and `verify`, `strict`, `allow_pickle` and `autocast_adapter_dtype` the adapter's.

        A vocabulary that the folder's tokenizer has grown is given to the base first. Raises CheckpointError, also if the
        adapter is for another task; SpecError.
        """
        download = {key: kwargs[key] for key in _DOWNLOAD if key in kwargs}
        if revision is not None:
            download["revision"] = revision
        folder = locate(pretrained_model_name_or_path, kwargs.pop("subfolder", None), **download)
        own = PeftConfig.from_pretrained(folder)
        if None not in (cls.task, own.task_type) and cls.task != own.task_type:
            raise CheckpointError(
                f"{folder}: an adapter for {own.task_type}, and {cls.__name__} is for {cls.task}; AutoPeftModel takes the"
                " class that the config says"
            )
        path = own.base_model_name_or_path
        if path is None:
            raise CheckpointError(
                f"{folder}: its config names no base model (base_model_name_or_path); load that, and then the adapter with"
                " PeftModel.from_pretrained"
            )
        options = {key: kwargs.pop(key) for key in _ADAPTER_S if key in kwargs}
        base = cls._base_class(own).from_pretrained(path, revision=own.revision, **kwargs)
        if (Path(folder) / TOKENIZER_CONFIG_NAME).exists():
            from transformers import AutoTokenizer

            size = len(AutoTokenizer.from_pretrained(folder))
            if size > base.get_input_embeddings().weight.shape[0]:
                base.resize_token_embeddings(size)
        made = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(cls.task, PeftModel)
        return made.from_pretrained(base, folder, adapter_name, is_trainable, config, **options)

    @classmethod
    def _base_class(cls, config: Any) -> Any:
        import transformers

        if cls.task is not None:
            return getattr(transformers, _BY_TASK[cls.task])
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

    task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For sequence-to-sequence language models."""

    task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For sequence classification."""

    task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For token classification."""

    task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For extractive question answering."""

    task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For embeddings."""

    task = "FEATURE_EXTRACTION"
