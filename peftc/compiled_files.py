"""The files of a compiled model's adapters: what is read and written, and where."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from peftc import lifecycle
from peftc.checkpoint import (
    Download,
    LoadResult,
    SaveEmbeddings,
    SaveOptions,
    Verify,
    adapter_state_dict,
    config_of,
    gather,
    locate,
    push,
    read_adapter,
    save_adapters,
    update_card,
)
from peftc.choices import Form
from peftc.compiled_prompts import CompiledPrompts
from peftc.graph.sites import transformers_config
from peftc.rewrite.build import no_collection
from peftc.rewrite.switch import train


class CompiledFiles(CompiledPrompts):
    """A compiled model that reads and writes adapters."""

    def adapter_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """The live tensors of an adapter under the keys of PEFT's files. Raises AdapterError on an unknown name."""
        lifecycle.require_known(self.program.plan, [adapter_name])
        return adapter_state_dict(self.program, adapter_name)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        strict: bool = True,
        verify: Verify = "all",
        low_cpu_mem_usage: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        autocast_adapter_dtype: bool | None = None,
        **download: Unpack[Download],
    ) -> LoadResult:
        """Attach an adapter from a folder or a Hub repository, inactive; frozen unless `is_trainable`.

        If the model has an adapter of that name and spec, it gets the file's values, and stays as active as it is.
        `allow_pickle`: read `adapter_model.bin` if there is no safetensors file. `strict=False`: take what fits; the result
        says what did not. `verify`: `all` compares files with their manifest, and the base with the one they were trained
        on; `files` leaves out the base, `nothing` both; files without a manifest (PEFT's) load as they are.
        `autocast_adapter_dtype` as in `compile`; by default as it was there. `key_mapping`: regular expressions and what
        stands for what they match, for the names in the file; of each name the first that matches. `download`:
        `revision`, `token`, `cache_dir`, `local_files_only`, … as in huggingface_hub. PEFT's `low_cpu_mem_usage` is so in
        any case.

        Raises CheckpointError, SpecError, AdapterError, ConflictError; nothing is changed then.
        """
        folder = locate(model_id, subfolder, **download)
        with no_collection():
            files = read_adapter(
                folder, is_trainable=is_trainable, allow_pickle=allow_pickle, verify=verify, key_mapping=key_mapping
            )
            result = lifecycle.load(self.program, adapter_name, files, strict, autocast_adapter_dtype)
        if is_trainable:
            train(self.program, [*(name for name in self.program.learning if name != adapter_name), adapter_name])
        return result

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: SaveEmbeddings = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        form: Form = "peft",
        bake: bool = False,
        dtype: torch.dtype | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write adapters (default: all) as PEFT does: `default` into the folder, others into subfolders of their name.

        All of it or, if anything fails or is killed, nothing. `save_embedding_layers`: whole embeddings too; `auto`: those
        that are adapted as embed_tokens or lm_head, that the adapter brought, or whose vocabulary was resized.
        `is_main_process=False` writes nothing. `state_dict`: the whole model's, gathered from shards, to take tensors from.
        `bake`: at the scale that `set_scale` gave; else files are of scale 1, and a warning says so.
        `dtype`: of floating-point numbers in the files, by default as they are here.
        `form="serving"`: LoRA as vLLM and llama.cpp take it: one rank, scaling 1, no patterns; equal outputs.
        `form="per_expert"`: LoRA on fused experts as a linear for each, as transformers 4 has them. Both at the set scale.
        `safe_serialization=False`: a pickle (`adapter_model.bin`) of the tensors alone, without hashes of them.

        Raises CheckpointError (with the bytes needed, if the folder can't be written), AdapterError on an unknown name.
        """
        names = self._chosen(selected_adapters)
        options = SaveOptions(bake, save_embedding_layers, form, state_dict, not safe_serialization, dtype)
        if is_main_process:
            save_adapters(Path(save_directory), self.program, names, options)
        else:
            gather(self.program, names, options)  # What is sharded, all processes have to ask for.

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: SaveEmbeddings = "auto",
        form: Form = "peft",
    ) -> Any:
        """Upload what `save_pretrained` writes, as one commit; returns huggingface_hub's CommitInfo.

        The repository is created if need be; a `revision` that is no branch yet becomes one. Raises CheckpointError.
        """
        names = self._chosen(selected_adapters)
        options = SaveOptions(save_embedding_layers=save_embedding_layers, form=form)
        return push(
            repo_id,
            names,
            lambda folder: save_adapters(folder, self.program, names, options),
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Write README.md for an adapter, or update its front matter and versions; what its author wrote stays.

        Raises CheckpointError if it can't be read or written, AdapterError on an unknown name.
        """
        lifecycle.require_known(self.program.plan, [adapter_name])
        update_card(Path(output_dir), config_of(self.program, adapter_name), transformers_config(self.base) is not None)

    def _chosen(self, selected: Sequence[str] | None) -> list[str]:
        names = list(self.plan.adapters) if selected is None else list(selected)
        lifecycle.require_known(self.program.plan, names)
        return names
