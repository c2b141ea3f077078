"""Newer methods on two processes: prompts with FSDP2, and methods with tensor parallelism, against one process."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, full, llama, parallel, run

pytestmark = pytest.mark.slow

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
CAUSAL = {"task_type": "CAUSAL_LM"}
PROMPTS: dict[str, peftc.AdapterSpec] = {
    "multitask": peftc.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, num_ranks=2, **CAUSAL),
    "CPT": peftc.CPTConfig(cpt_token_ids=[1, 2, 3], cpt_tokens_type_mask=[1, 2, 4], **CAUSAL),
    "cartridge": peftc.CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=1, **CAUSAL),
    "LLaMA-Adapter": peftc.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **CAUSAL),
    "Super-Tuning": peftc.SupertuningConfig(sparsity=0.9, r=2, **TARGETS),
    # Whose files hold other tensors than the model: saving gathers more than once.
    "VB-LoRA": peftc.VBLoRAConfig(r=2, num_vectors=20, vector_length=8, save_only_topk_weights=True, **TARGETS),
}
PARALLEL: dict[str, peftc.AdapterSpec] = {
    "FRoD": peftc.FrodConfig(**TARGETS),
    "AdaMSS": peftc.AdamssConfig(subspace_rank=2, **TARGETS),
    "Super-Tuning": PROMPTS["Super-Tuning"],
    "WaveFT": peftc.WaveFTConfig(n_frequency=99, **TARGETS),
    "GLoRA": peftc.GloraConfig(r=2, **TARGETS),
    "multitask": PROMPTS["multitask"],
    "CPT": PROMPTS["CPT"],
}
TASKS = torch.tensor([0, 2, 1, 1])


def given(name: str, step: int, rank: int | None = None) -> dict[str, Any]:
    tasks = {"task_ids": TASKS if rank is None else TASKS.chunk(2)[rank]} if name == "multitask" else {}
    return {**batch(step, rank), **tasks}


def losses(name: str, model: Any, rank: int | None = None) -> list[float]:
    """Those of three steps; `rank`: this process has a part of each batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    found: list[float] = []
    for step in range(3):
        loss = model(**given(name, step, rank)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach().clone()
        if rank is not None:
            distributed.all_reduce(value)
        found.append(float(value) / (1 if rank is None else 2))
    return found


def same_adapters(alone: peftc.CompiledModel, compiled: peftc.CompiledModel) -> None:
    for key, value in alone.adapter_state_dict().items():
        close(full(compiled.adapter_state_dict()[key]), value.detach(), near=1e-4)


def started(spec: peftc.AdapterSpec) -> tuple[peftc.CompiledModel, dict[str, Any]]:
    torch.manual_seed(0)
    alone = perturb(peftc.compile(llama(attention_bias=True), spec))
    return alone, {key: value.detach().clone() for key, value in alone.adapter_state_dict().items()}


def _prompts(rank: int, folder: Path, order: str) -> None:
    for name, spec in PROMPTS.items():
        alone, state = started(spec)
        model = llama(attention_bias=True)
        compiled = peftc.compile(model, copy.deepcopy(spec), inplace=True) if order == "after" else None
        for module in (*model.model.layers, model):
            fully_shard(module)
        compiled = peftc.compile(model, copy.deepcopy(spec), inplace=True) if compiled is None else compiled
        for one in (alone, compiled):  # What follows from its tensors follows from the new ones.
            peftc.set_peft_model_state_dict(one, state)
        wanted = losses(name, alone)
        close(losses(name, compiled, rank), wanted, near=1e-4)
        assert wanted[0] != wanted[-1], name
        same_adapters(alone, compiled)
        compiled.save_pretrained(folder / name, is_main_process=rank == 0)
        if rank == 0:
            assert (folder / name / "README.md").exists()
            close(peftc.load(llama(attention_bias=True), folder / name)(**given(name, 5)).loss, losses_at(alone, name))


def losses_at(alone: peftc.CompiledModel, name: str) -> torch.Tensor:
    with torch.no_grad():
        return alone(**given(name, 5)).loss


@pytest.mark.parametrize("order", ["before", "after"])
def test_prompts_learn_on_a_sharded_model_as_on_one_process(order: str, tmp_path: Path) -> None:
    run(_prompts, order, folder=tmp_path)


def _parallel(rank: int, folder: Path) -> None:
    for name, spec in PARALLEL.items():
        alone, state = started(spec)
        compiled = peftc.compile(parallel(llama(attention_bias=True)), copy.deepcopy(spec), inplace=True)
        for one in (alone, compiled):
            peftc.set_peft_model_state_dict(one, state)
        wanted = losses(name, alone)
        close(losses(name, compiled), wanted, near=1e-4)
        assert wanted[0] != wanted[-1], name
        same_adapters(alone, compiled)
        compiled.save_pretrained(folder / name, is_main_process=rank == 0)
        if name in ("multitask", "CPT"):
            continue
        with torch.no_grad():
            before = alone(**given(name, 5)).logits
            compiled.merge_adapter()
            close(compiled(**given(name, 5)).logits, before, near=1e-4)
            compiled.unmerge_adapter()


def test_methods_learn_and_merge_on_a_tensor_parallel_model_as_on_one_process(tmp_path: Path) -> None:
    run(_parallel, folder=tmp_path)


def _refused(rank: int, folder: Path) -> None:
    poly = peftc.PolyConfig(r=4, n_tasks=3, n_skills=2, n_splits=2, **TARGETS, **CAUSAL)
    for spec, reason in (
        (PROMPTS["LLaMA-Adapter"], "computes with all heads"),
        (poly, "poly takes task_ids of the call"),
    ):
        model = parallel(llama())
        with pytest.raises(peftc.AdapterError, match=f"can't be on a tensor parallel model: .*{reason}"):
            peftc.compile(model, copy.deepcopy(spec), inplace=True)
        with torch.no_grad():
            close(model(**batch(0)).logits, llama()(**batch(0)).logits)


def test_what_a_tensor_parallel_model_can_not_lay_out_is_refused(tmp_path: Path) -> None:
    run(_refused, folder=tmp_path)
