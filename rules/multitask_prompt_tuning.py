"""Multitask prompt tuning: one prompt for all tasks, scaled by a product of low rank that every task has of its own."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.prompts.rule import PromptRule
from peftc.prompts.specs import Count, upper
from peftc.rule import Argument, Constant

from .prompt_tuning import PromptTuning, PromptTuningConfig

_SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
_INITS = Literal["RANDOM", "SAMPLE_VOCAB", "TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"]


class MultitaskPromptTuningConfig(PromptTuningConfig):
    """One prompt for many tasks, with a part for each. Wang et al. 2023, arXiv:2303.02861.

    A call takes `task_ids`, the number of each row's task, below `num_tasks`. `num_ranks`: the rank of a task's own part.
    `prompt_tuning_init`: as of PromptTuningConfig; or, from the file `prompt_tuning_init_state_dict_path` of an adapter of
    this method: ONLY_SOURCE_SHARED, its prompt; EXACT_SOURCE_TASK, also the part of its task `prompt_tuning_init_task`;
    AVERAGE_SOURCE_TASKS, the means of all its tasks. The last two are for one task (`num_tasks=1`).

    Example: MultitaskPromptTuningConfig(num_virtual_tokens=20, num_tasks=3, task_type="CAUSAL_LM")
    """

    # Narrower and wider than prompt tuning's fields of these names.
    peft_type: Literal["MULTITASK_PROMPT_TUNING"] = "MULTITASK_PROMPT_TUNING"  # type: ignore[assignment]
    prompt_tuning_init: Annotated[_INITS, BeforeValidator(upper)] = "RANDOM"  # type: ignore[assignment]
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: Annotated[int, Field(ge=0)] = 0
    num_ranks: Count = 1
    num_tasks: Count = 1

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        how, several = self.prompt_tuning_init, self.num_tasks > 1
        if how in _SOURCES and self.prompt_tuning_init_state_dict_path is None:
            raise ValueError(
                f"prompt_tuning_init_state_dict_path is missing: prompt_tuning_init={how!r} needs such a file"
            )
        if how in _SOURCES and how != "ONLY_SOURCE_SHARED" and several:
            raise ValueError(
                f"num_tasks={self.num_tasks}: prompt_tuning_init={how!r} starts one task; leave it out, or give"
                " 'ONLY_SOURCE_SHARED'"
            )
        return self


class MultitaskPromptEmbedding(nn.Module):
    """Row numbers (1, rows) and `task_ids` (batch,) → embeddings (batch, rows, token_dim).

    `embedding` holds the prompt P, `prefix_task_cols` u (tasks, rows, ranks) and `prefix_task_rows` v (tasks, ranks, dim).
    """

    def __init__(self, spec: MultitaskPromptTuningConfig) -> None:
        super().__init__()
        tasks, ranks = spec.num_tasks, spec.num_ranks
        self.embedding = nn.Embedding(spec.rows, spec.fact("token_dim"))
        self.prefix_task_cols = nn.Parameter(0.02 * torch.randn(tasks, spec.rows, ranks))
        self.prefix_task_rows = nn.Parameter(0.02 * torch.randn(tasks, ranks, spec.fact("token_dim")))

    def forward(self, indices: Tensor, task_ids: Tensor) -> Tensor:
        return self.embedding(indices) * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])


class MultitaskPromptTuning(PromptRule[MultitaskPromptTuningConfig]):
    """[P ⊙ u(task)·v(task); E(x)] with trained P, u and v.  Wang et al. 2023, arXiv:2303.02861, section 3.1."""

    name, spec, at = "multitask_prompt_tuning", MultitaskPromptTuningConfig, "embeds"
    arguments: ClassVar[Mapping[str, Argument]] = {"task_ids": Argument("num_tasks")}

    def constants(self, spec: MultitaskPromptTuningConfig, site: Any) -> dict[str, Constant]:
        return {"num_tasks": spec.num_tasks}

    def encoder(self, spec: MultitaskPromptTuningConfig) -> MultitaskPromptEmbedding:
        return MultitaskPromptEmbedding(spec)

    def start(
        self,
        encoder: nn.Module,
        spec: MultitaskPromptTuningConfig,
        embed: Callable[[Tensor], Tensor],
        vocab_size: int,
    ) -> None:
        if spec.prompt_tuning_init not in _SOURCES:
            PromptTuning().start(encoder, spec, embed, vocab_size)
            return
        for name, value in _source(spec).items():
            target = encoder.get_parameter(name)
            if value.shape != target.shape:
                raise AdapterError(
                    f"MultitaskPromptTuningConfig.prompt_tuning_init_state_dict_path: {name} is {tuple(value.shape)} there,"
                    f" and {tuple(target.shape)} here; num_virtual_tokens, num_ranks and the model have to be the same"
                )
            target.copy_(value)


def _source(spec: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
    """What the encoder begins with. Raises AdapterError if the file can't be read, or lacks it."""
    where, path = "MultitaskPromptTuningConfig.prompt_tuning_init", str(spec.prompt_tuning_init_state_dict_path)
    keys = {"embedding.weight": "prompt_embeddings"}
    if spec.prompt_tuning_init != "ONLY_SOURCE_SHARED":
        keys |= {name: name for name in ("prefix_task_cols", "prefix_task_rows")}
    try:
        safe = Path(path).suffix == ".safetensors"
        file: dict[str, Tensor] = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
        found = {name: file[key] for name, key in keys.items()}
    except KeyError as error:
        raise AdapterError(f"{where}_state_dict_path: {path} lacks {error}; it is no adapter of this method") from None
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise AdapterError(
            f"{where}_state_dict_path: {path} can't be read: {str(error).partition(chr(10))[0]}"
        ) from None
    own, task = [name for name in keys if name.startswith("prefix")], spec.prompt_tuning_init_task
    if spec.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
        return found | {name: found[name].mean(0, keepdim=True) for name in own}
    if own and task >= len(found[own[0]]):
        raise AdapterError(f"{where}_task={task}: the file has the tasks 0 to {len(found[own[0]]) - 1}")
    return found | {name: found[name][task : task + 1] for name in own}
