"""PEFT's model classes: a thin module around a model whose adapters are compiled into it."""

import copy
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from peftc.checkpoint import LoadResult
from peftc.compiled import CompiledModel
from peftc.compiled_graph import trainable, trainable_line
from peftc.errors import AdapterError, CheckpointError
from peftc.graph.finding import module_at
from peftc.graph.sites import parameter_name, transformers_config
from peftc.peft.configs import PeftConfig, spec_of
from peftc.peft.roots import Root, adopt, attach, release, require_root, root_of, take, tell
from peftc.peft.state_names import rename
from peftc.peft.tuner import BaseTuner, MixedModel, Rooted, call, tuner_class
from peftc.peft.types import TaskType
from peftc.prompts.files import prompt_edit
from peftc.status import LayerStatus, ModelStatus

# What PEFT's models take whatever the method is.
_TASKS = "task_ids"

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
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
]

_PROMPT = "prompt_encoder"
# What `from_pretrained` and `load_adapter` pass on; what else scripts give is about the base, or about where adapters go.
_OPTIONS = [
    "subfolder",
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
    "verify",
    "strict",
    "allow_pickle",
]


class PeftModel(Rooted):
    """`model` with the adapter of a config, attached in place. `unload()` gives the model back intact.

    Parameters are named as in PEFT (`base_model.model.….lora_A.default.weight`), without its `.base_layer`. Attributes
    that are not found here are those of the base. `compiled` is the CompiledModel behind: its plan, its code, its merges.
    Raises SpecError, NoMatchError, ConflictError; the model is as it was then.

    Example: model = PeftModel(model, LoraConfig(target_modules=["q_proj"])); print(model.compiled.plan)
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
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
    def compiled(self) -> CompiledModel:
        """The compiled model behind: its plan, its code, what it refuses and why."""
        return self.root.compiled

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or the list of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def peft_type(self) -> Any:
        """The method of the first adapter."""
        return next(iter(self.peft_config.values())).peft_type

    @property
    def active_peft_config(self) -> Any:
        """The config of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter has an effect now."""
        return self.root.program.enabled and bool(self.root.program.active)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The last parts of the names of modules that adapters save whole."""
        saved = {edit.site.rpartition(".")[2] for edit in self.root.program.plan.edits if edit.whole}
        return saved or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype of the base."""
        return getattr(self.get_base_model(), "dtype", None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "_modules" not in self.__dict__:
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> Any:
        """The base with its adapters: the very model that was given."""
        base = self.base_model
        return base.model if isinstance(base, BaseTuner) else base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call. `adapter_names`: the adapter of every row of the batch, `__base__` for none."""
        if _TASKS in kwargs and not any(_TASKS in one.arguments for one in self.root.program.adapters.values()):
            del kwargs[_TASKS]
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
        _describe(self.get_base_model(), peft_config)
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
        cast_up = bool(kwargs.get("autocast_adapter_dtype", True))
        options = _load_options(kwargs)
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
                autocast_adapter_dtype=cast_up,
                **options,
            )
            root = Root(compiled, {})
            take(root, adapter_name, config)
            adopt(root)
        else:
            root.unmerge()
            root.compiled.load_adapter(model_id, adapter_name, is_trainable, autocast_adapter_dtype=cast_up, **options)
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
        upcast = bool(kwargs.get("autocast_adapter_dtype", True))
        options = _load_options(kwargs)
        result = self.compiled.load_adapter(
            model_id, adapter_name, is_trainable, autocast_adapter_dtype=upcast, **options
        )
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
        if path_initial_model_for_weight_conversion is not None:
            raise CheckpointError(
                "path_initial_model_for_weight_conversion: an adapter that started from the weights is saved with what it"
                " started from, which needs no other file; leave it out"
            )
        tell(self.root)
        self.compiled.save_pretrained(
            save_directory,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            safe_serialization=safe_serialization,
            state_dict=None if kwargs.get("state_dict") is None else in_base(self, kwargs["state_dict"]),
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes, as one commit."""
        tell(self.root)
        return self.compiled.push_to_hub(repo_id, **kwargs)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write README.md for the active adapter, or update its front matter; what its author wrote stays."""
        self.compiled.create_or_update_model_card(output_dir, self.active_adapters[0])

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, adapters included."""
        return trainable(self)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers and their ratio."""
        print(trainable_line(self))  # noqa: T201 (what it is for)

    def get_layer_status(self) -> list[LayerStatus]:
        """What is active, merged and learning at every adapted module, by its name in the tuner model."""
        above = "model." if isinstance(self.base_model, BaseTuner) else ""
        return [replace(one, name=f"{above}{one.name}") for one in self.compiled.get_layer_status()]

    def get_model_status(self) -> ModelStatus:
        """What is active, merged and learning in the whole model."""
        return replace(self.compiled.get_model_status(), adapter_model_type=type(self.base_model).__name__)

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """The numbers of the virtual tokens of prompt adapters, by adapter."""
        rows = {name: getattr(spec, "rows", None) for name, spec in self.root.program.plan.adapters.items()}
        return {name: torch.arange(count) for name, count in rows.items() if count is not None}

    @property
    def word_embeddings(self) -> nn.Module:
        """The input embeddings of the base."""
        return self.get_base_model().get_input_embeddings()

    @property
    def transformer_backbone_name(self) -> str | None:
        """The name of the base's backbone, if it is a child of it."""
        base = self.get_base_model()
        name = getattr(base, "base_model_prefix", "")
        return name if name in base._modules else None

    @property
    def cls_layer_name(self) -> str:
        """The name of the head that the active adapter trains. Raises AttributeError if it trains none."""
        active = self.active_adapters
        heads = [edit.site for edit in self.root.program.plan.edits if edit.whole and edit.adapter in active]
        if not heads:
            raise AttributeError("cls_layer_name: no active adapter trains a head")
        return heads[0].rpartition(".")[2]

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Tensor:
        """The rows of the active prompt adapter for every sequence. Raises AdapterError if there is none."""
        return self.compiled.get_prompt(batch_size, **({} if task_ids is None else {_TASKS: task_ids}))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The rows of a prompt adapter as saved. Raises AdapterError if it is none."""
        return self.compiled.get_prompt_embedding_to_save(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (default: the active ones) into the weights; `unmerge_adapter` gives the bits back."""
        self._tuner.merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Fold adapters (default: the active ones) and return the plain model."""
        return self._tuner.merge_and_unload(*args, **kwargs)

    def unload(self) -> nn.Module:
        """Take all adapters off and return the model as it was given."""
        if isinstance(self.base_model, BaseTuner):
            return self.base_model.unload()
        root = root_of(self.base_model)
        if root is not None:
            root.compiled.unload()
            release(root)
        return self.base_model

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


def attach_first(model: nn.Module, config: Any, name: str, autocast: bool) -> Root:
    """Give a model its first adapter here, or one more, which is active then."""
    if isinstance(model, Rooted):
        warnings.warn(
            "the model has adapters already; they stay, and the new one is added to them. unload() first if only the new"
            " one is meant",
            stacklevel=4,
        )
        model = model.root.program.base
    if not isinstance(config, PeftConfig):
        spec_of(config)  # Raises TypeError for what is no config at all.
    _describe(model, config)
    root = attach(model, {name: config}, autocast=autocast)
    root.activate(name, inference_mode=bool(getattr(config, "inference_mode", False)))
    return root


def _describe(model: nn.Module, config: Any) -> None:
    """Let a config say what its base is, as PEFT does."""
    path = getattr(transformers_config(model), "name_or_path", None)
    if isinstance(config, PeftConfig) and path:
        config.base_model_name_or_path = path


def _prompt_learning(config: Any) -> bool:
    return bool(getattr(config, "is_prompt_learning", False))


def _load_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if kwargs.get("key_mapping"):
        raise CheckpointError(
            "key_mapping: keys of other versions of transformers are found without it; for others rename them in the file"
        )
    # A pickle is read with weights_only=True, as in PEFT.
    return {"allow_pickle": True, **{key: value for key, value in kwargs.items() if key in _OPTIONS}}


def _prompts_in(root: Root) -> str:
    """Where the base holds the prompts, by adapter."""
    program = root.program
    edit = next(edit for name in program.plan.adapters if (edit := prompt_edit(program, name)) is not None)
    return parameter_name(program.plan.sites[edit.site].holder, str(edit.rule.container))


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
    if revision is not None and isinstance(peft_config, PeftConfig):
        peft_config.revision = revision
    cls = PeftMixedModel if mixed else _class_for(peft_config)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def in_base(model: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a PeftModel (of a tuner model, or of a base) by the names of its base."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, PeftModel):
        prefix = "base_model.model." if isinstance(inner.base_model, BaseTuner) else "base_model."
    else:
        prefix = "model." if isinstance(inner, BaseTuner) else ""
    return {key.removeprefix(prefix): value for key, value in state_dict.items()}


def root_in(model: Any) -> Root:
    """The root of a PeftModel, a tuner model, or a model with injected adapters; torch.compile may have wrapped it.

    Raises AdapterError if it has no adapters.
    """
    inner = getattr(model, "_orig_mod", model)
    return inner.root if isinstance(inner, Rooted) else require_root(inner)


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """What is active, merged and learning at every adapted module of a model. Raises AdapterError if it has none."""
    return model.get_layer_status() if isinstance(model, PeftModel) else root_in(model).compiled.get_layer_status()


def get_model_status(model: nn.Module) -> ModelStatus:
    """What is active, merged and learning in a model. Raises AdapterError if it has no adapters."""
    return model.get_model_status() if isinstance(model, PeftModel) else root_in(model).compiled.get_model_status()
