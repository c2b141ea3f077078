"""PEFT's model classes: a thin module around a model whose adapters are compiled into it."""

import copy
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

from torch import nn

from peftc.checkpoint import Download, LoadResult
from peftc.compiled import CompiledModel
from peftc.errors import AdapterError
from peftc.graph.finding import module_at
from peftc.graph.sites import parameter_name
from peftc.peft.configs import PeftConfig, all_fields, as_config, spec_of
from peftc.peft.reported import TASKS, Reported
from peftc.peft.rooted import Rooted, attach_first, call, in_base, name_base, unloaded
from peftc.peft.roots import Root, adopt, attach, root_of, take, tell
from peftc.peft.state_names import rename
from peftc.peft.tuner import BaseTuner, MixedModel, tuner_class
from peftc.peft.types import TaskType
from peftc.prompts.files import prompt_part

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "get_peft_model",
]

_PROMPT = "prompt_encoder"
# What `from_pretrained` and `load_adapter` pass on; what else scripts give is about the base, or about where adapters go.
_OPTIONS = {*Download.__annotations__, "proxies", "subfolder", "verify", "strict", "allow_pickle", "key_mapping"}


class PeftModel(Reported):
    """`model` with the adapter of a config, attached in place. `unload()` gives the model back intact.

    Parameters are named as in PEFT (`base_model.model.….lora_A.default.weight`), without its `.base_layer`. Attributes
    that are not found here are those of the base. `compiled` is the CompiledModel behind: its plan, its code, its merges.
    Raises SpecError, NoMatchError, ConflictError; the model is as it was then.

    Example: model = PeftModel(model, LoraConfig(target_modules=["q_proj"])); print(model.compiled.plan)
    """

    _inner = "base_model"

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        peft_config = as_config(peft_config)
        self._stand_on(attach_first(model, peft_config, adapter_name, autocast_adapter_dtype), peft_config)

    @classmethod
    def around(cls, root: Root, config: Any) -> Self:
        """One around a model that has its adapters already."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._stand_on(root, config)
        return new

    def _stand_on(self, root: Root, config: Any) -> None:
        if _prompt_learning(config):
            # Before the base, which holds them too: so this is the name that torch finds them by.
            self.add_module(_PROMPT, module_at(root.program.base, _prompts_in(root)))
            self.base_model: Any = root.program.base
            self.register_state_dict_post_hook(_named_once)
        else:
            self.base_model = self._tuner_class(config).around(root)
        self.register_load_state_dict_pre_hook(_as_named_here)

    @staticmethod
    def _tuner_class(config: Any) -> type[BaseTuner]:
        return tuner_class(config)

    def _base(self) -> nn.Module:
        return self.get_base_model()

    @property
    def _before(self) -> str:  # type: ignore[override]
        return "base_model.model." if isinstance(self.base_model, BaseTuner) else "base_model."

    @property
    def compiled(self) -> CompiledModel:
        """The compiled model behind: its plan, its code, what it refuses and why."""
        return self.root.compiled

    def get_base_model(self) -> Any:
        """The base with its adapters: the very model that was given."""
        base = self.base_model
        return base.model if isinstance(base, BaseTuner) else base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call. `adapter_names`: the adapter of every row of the batch, `__base__` for none."""
        if TASKS in kwargs and not any(TASKS in one.arguments for one in self.root.program.adapters.values()):
            del kwargs[TASKS]
        if kwargs.get("adapter_names") is None and isinstance(self.base_model, BaseTuner):
            kwargs.pop("adapter_names", None)
            return self.base_model(*args, **kwargs)
        return call(self.get_base_model(), args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base; `adapter_names` as in a call, one per prompt."""
        return call(self.get_base_model(), args, kwargs, several=True)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach a new, untrained adapter, inactive. Raises AdapterError if the name is taken, SpecError, NoMatchError."""
        if adapter_name in self.peft_config:
            raise AdapterError(f"adapter {adapter_name!r} exists already; choose another name, or delete_adapter first")
        peft_config = as_config(peft_config)
        name_base(self.get_base_model(), peft_config)
        attach(self.get_base_model(), {adapter_name: peft_config}, autocast=autocast_adapter_dtype)

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """A context in which the model is the base. Raises MergeError while merged."""
        with self.compiled.disable_adapter():
            yield

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`model` with an adapter from a folder or a Hub repository, attached in place, of the class of its task.

        `kwargs`: `autocast_adapter_dtype`, `subfolder`, options of the download, and those of `peftc.load` (`verify`,
        `strict`, `allow_pickle`). Raises CheckpointError, SpecError; the model is as it was then.
        """
        options = _load_options(kwargs)
        config = as_config(config)
        spec = None if config is None else spec_of(config)
        model = model._base() if isinstance(model, Rooted) else model
        root = root_of(model)
        if root is None:
            compiled = CompiledModel.from_pretrained(
                model,
                model_id,
                adapter_name,
                is_trainable,
                spec,
                inplace=True,
                **options,
            )
            root = Root(compiled, {})
            take(root, adapter_name, config)
            adopt(root)
        else:
            root.unmerge()
            root.compiled.load_adapter(model_id, adapter_name, is_trainable, **options)
            root.learn(adapter_name)
            root.activate(adapter_name, inference_mode=not is_trainable)
        own = root.configs[adapter_name]
        own.inference_mode = not is_trainable
        chosen = _class_for(own) if cls is PeftModel else cls
        made = chosen.around(root, own)
        return made if is_trainable else made.eval()

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> LoadResult:
        """Attach an adapter from a folder or a Hub repository, inactive; frozen, and the model in eval(), unless
        `is_trainable`.
        """
        self.root.unmerge()
        result = self.compiled.load_adapter(model_id, adapter_name, is_trainable, **_load_options(kwargs))
        if adapter_name not in self.peft_config:
            self.root.learn(adapter_name)
        self.peft_config[adapter_name].inference_mode = not is_trainable
        if not is_trainable:
            self.eval()
        return result

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: Literal["auto"] | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters (default: all): `default` into the folder, others into subfolders; all of it or nothing."""
        tell(self.root)
        self.compiled.save_pretrained(
            save_directory,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            safe_serialization=safe_serialization,
            # What it started from is known here, and is taken off in that form.
            form="peft" if path_initial_model_for_weight_conversion is None else "serving",
            state_dict=None if kwargs.get("state_dict") is None else in_base(self, kwargs["state_dict"]),
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes, as one commit."""
        tell(self.root)
        return self.compiled.push_to_hub(repo_id, **kwargs)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write README.md for the active adapter, or update its front matter; what its author wrote stays."""
        self.compiled.create_or_update_model_card(output_dir, self.active_adapters[0])

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (default: the active ones) into the weights; `unmerge_adapter` gives the bits back."""
        self._tuner.merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Fold adapters (default: the active ones) and return the plain model."""
        return self._tuner.merge_and_unload(*args, **kwargs)

    def unload(self) -> nn.Module:
        """Take all adapters off and return the model as it was given."""
        return unloaded(self.get_base_model(), lambda root: root.compiled.unload())

    @property
    def _tuner(self) -> BaseTuner:
        if not isinstance(self.base_model, BaseTuner):
            raise AdapterError(f"{', '.join(self.active_adapters)}: virtual tokens can't be merged into weights")
        return self.base_model

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As of the base; the reentrant kind lets gradients through whatever the input is."""
        self.compiled.gradient_checkpointing_enable(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As of the base. Raises AdapterError, with nothing changed, if an adapter changes or saves an embedding."""
        return self.compiled.resize_token_embeddings(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        root = root_of(self.get_base_model())
        if root is not None:
            new = memo[id(root)] = Root.__new__(Root)
            compiled = copy.deepcopy(root.compiled, memo)
            new.__init__(compiled, copy.deepcopy(root.configs, memo))
            adopt(new)
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        root = root_of(self.get_base_model())
        return {**self.__dict__, "peftc_root": None if root is None else (root.compiled, root.configs)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stood_on = state.pop("peftc_root")
        super().__setstate__(state)
        if stood_on is not None:
            adopt(Root(*stood_on))


def _prompt_learning(config: Any) -> bool:
    return bool(getattr(config, "is_prompt_learning", False))


def _load_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    told = sorted(kwargs.keys() & all_fields() - _OPTIONS)
    if told:  # PEFT passes over them, too.
        warnings.warn(f"{', '.join(told)}: no effect here; what the adapter's own config says counts", stacklevel=3)
    given = {key: value for key, value in kwargs.items() if key in _OPTIONS}
    if kwargs.get("ignore_mismatched_sizes"):
        warnings.warn(
            "ignore_mismatched_sizes: as strict=False; a saved head comes as large as in its file", stacklevel=3
        )
        given = {"strict": False, **given}
    # A pickle is read with weights_only=True, as in PEFT.
    return {"allow_pickle": True, "autocast_adapter_dtype": bool(kwargs.get("autocast_adapter_dtype", True)), **given}


def _prompts_in(root: Root) -> str:
    """Where the base holds the prompts, by adapter."""
    part = next(part for own in root.program.adapters.values() if (part := prompt_part(own)) is not None)
    return parameter_name(part.site.holder, str(part.edit.rule.container))


def _named_once(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave out the second names of prompts."""
    root = root_of(module.base_model)
    second = None if root is None else f"{prefix}base_model.{_prompts_in(root)}."
    for key in [key for key in state if second is not None and key.startswith(second)]:
        del state[key]


def _as_named_here(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: Any,
    unexpected: Any,
    errors: Any,
) -> None:
    """Take PEFT's names for parameters of the base too, and give prompts both of theirs."""
    root = root_of(module.get_base_model()) if isinstance(module, PeftModel) else None
    if root is not None:
        rename(module, root.program, state, prefix)
    if isinstance(module, PeftModel) and _PROMPT in module._modules:
        state.pop(f"{prefix}word_embeddings.weight", None)  # A second name of the base's.
        own, second = f"{prefix}{_PROMPT}.", f"{prefix}base_model.{_prompts_in(module.root)}."
        for key in [key for key in state if key.startswith(own)]:
            state[second + key.removeprefix(own)] = state[key]


class PeftModelForCausalLM(PeftModel):
    """A PeftModel for causal language modelling."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A PeftModel for sequence-to-sequence language modelling."""


class PeftModelForSequenceClassification(PeftModel):
    """A PeftModel for sequence classification; `cls_layer_name` is the head that it trains."""


class PeftModelForTokenClassification(PeftModel):
    """A PeftModel for token classification; `cls_layer_name` is the head that it trains."""


class PeftModelForQuestionAnswering(PeftModel):
    """A PeftModel for extractive question answering; `cls_layer_name` is the head that it trains."""


class PeftModelForFeatureExtraction(PeftModel):
    """A PeftModel for embeddings."""


class PeftMixedModel(PeftModel):
    """A PeftModel whose adapters may be of several methods; `set_adapter` takes several, and files are written too."""

    @staticmethod
    def _tuner_class(config: Any) -> type[BaseTuner]:
        return MixedModel


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[Any, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def _class_for(config: Any) -> type[PeftModel]:
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(getattr(config, "task_type", None), PeftModel)


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """`model` with the adapter of a config, attached in place, of the class of its task, or one for several methods.

    Raises SpecError, NoMatchError, ConflictError, TypeError; the model is as it was then.

    Example: model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")); model.print_trainable_parameters()
    """
    peft_config = as_config(peft_config)
    if revision is not None and isinstance(peft_config, PeftConfig):
        peft_config.revision = revision
    cls = PeftMixedModel if mixed else _class_for(peft_config)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
