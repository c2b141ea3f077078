"""Tensor parallelism on two processes: what one process computes, with adapters laid out as their weights are."""

from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import Replicate, Shard
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, full, llama, parallel, run, train

pytestmark = pytest.mark.slow

SPECS = {
    "a": peftc.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "b": peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "embedded": peftc.LoraConfig(r=4, target_modules=["embed_tokens"]),
    "saved": peftc.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, modules_to_save=["lm_head"]),
    "prompt": peftc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "pissa": peftc.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights="pissa", bias="lora_only"),
}


def agree(alone: peftc.CompiledModel, compiled: peftc.CompiledModel, name: str | list[str]) -> None:
    """Outputs, gradients and what trains are the same."""
    for one in (alone, compiled):
        one.set_adapter(name)
        one(**batch(0)).loss.backward()
    for own in compiled.active_adapters:
        for key, tensor in alone.adapter_state_dict(own).items():
            other = compiled.adapter_state_dict(own)[key]
            assert (other.grad is None) is (tensor.grad is None), (own, key)
            if tensor.grad is not None:
                close(full(other.grad), tensor.grad)
    for one in (alone, compiled):
        one.zero_grad()
    with torch.no_grad():
        close(compiled(**batch(0)).logits, alone(**batch(0)).logits)


def same_files(expected: Path, found: Path) -> None:
    for path in (path.relative_to(expected) for path in expected.rglob("*") if path.is_file()):
        assert (found / path).read_bytes() == (expected / path).read_bytes(), path


def _computes(rank: int, folder: Path, inplace: bool) -> None:
    alone = perturb(peftc.compile(llama(attention_bias=True), SPECS))
    torch.manual_seed(50 + rank)
    model = parallel(llama(attention_bias=True))
    with torch.no_grad():
        untouched = model(**batch(0)).logits
    compiled = peftc.compile(model, SPECS, inplace=inplace)
    for name in SPECS:
        state = {key: value.detach() for key, value in alone.adapter_state_dict(name).items()}
        peftc.set_peft_model_state_dict(compiled, state, name)
    live = compiled.adapter_state_dict("a")
    layer = "base_model.model.model.layers.0"
    placed = {
        "q_proj.lora_A": Replicate(),
        "q_proj.lora_B": Shard(0),
        "o_proj.lora_A": Shard(1),
        "o_proj.lora_B": Replicate(),
    }
    for key, placement in placed.items():
        assert live[f"{layer}.self_attn.{key}.weight"].placements == (placement,)
    for name in [*SPECS, ["a", "b"]]:
        agree(alone, compiled, name)
    compiled.save_pretrained(folder / "saved", is_main_process=rank == 0)
    if rank == 0:
        alone.save_pretrained(folder / "alone")
        same_files(folder / "alone", folder / "saved")
    with pytest.raises(peftc.PeftcError, match="tensor parallel, and rows of tensors"):
        compiled(**batch(0), adapter_names=["a", "b", "a", "__base__"])
    compiled.set_adapter("a")
    alone.set_adapter("a")
    close(train(compiled, compiled.parameters(), range(3)), train(alone, alone.parameters(), range(3)))
    alone.set_adapter("pissa")
    compiled.set_adapter("pissa")
    before = {name: tensor.detach().clone() for name, tensor in compiled.base.named_parameters()}
    for undo in (True, False):
        compiled.merge_adapter()
        with torch.no_grad():
            close(compiled(**batch(0)).logits, alone(**batch(0)).logits)
        if undo:
            compiled.unmerge_adapter()
            for name, tensor in compiled.base.named_parameters():
                assert torch.equal(full(tensor), full(before[name])), name
    if not inplace:
        with torch.no_grad():
            assert torch.equal(model(**batch(0)).logits, untouched)
    merged, wanted = compiled.merge_and_unload(), alone.merge_and_unload()
    for name, tensor in wanted.named_parameters():
        close(full(merged.get_parameter(name)), tensor)
    with torch.no_grad():
        close(merged(**batch(0)).logits, wanted(**batch(0)).logits)


@pytest.mark.parametrize("inplace", [True, False])
def test_outputs_gradients_and_training_are_those_of_one_process(inplace: bool, tmp_path: Path) -> None:
    run(_computes, inplace, folder=tmp_path)


def _refuses(rank: int, folder: Path) -> None:
    model = parallel(llama())
    with torch.no_grad():
        before = model(**batch(0)).logits
    with pytest.raises(peftc.PeftcError, match="keys and values are those of all heads"):
        peftc.compile(model, peftc.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    compiled = peftc.compile(llama(), SPECS["a"], inplace=True)
    with pytest.raises(peftc.PeftcError, match="Parallelise first"):
        parallel(compiled.base)
    with torch.no_grad():
        assert torch.equal(model(**batch(0)).logits, before)
        close(compiled(**batch(0)).logits, llama()(**batch(0)).logits)


def test_what_can_not_be_laid_out_is_refused(tmp_path: Path) -> None:
    run(_refuses, folder=tmp_path)


TRANSFORMERS = {
    "a": peftc.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "embed_tokens", "lm_head"], task_type="CAUSAL_LM"),
    "b": SPECS["b"],
}


def _from_pretrained(rank: int, folder: Path) -> None:
    """As transformers cuts a model when it loads one, with local tensors between modules and at inference inside."""
    if rank == 0:
        llama().save_pretrained(folder / "base")
    distributed.barrier()
    load = LlamaForCausalLM.from_pretrained
    alone = perturb(peftc.compile(load(folder / "base"), TRANSFORMERS))
    torch.manual_seed(50 + rank)
    model = load(folder / "base", distributed_config=DistributedConfig(tp_plan="auto"))
    with pytest.raises(peftc.PeftcError, match="inplace=True"):
        peftc.compile(model, TRANSFORMERS)
    with pytest.raises(peftc.PeftcError, match="which a copy would share with the original"):
        peftc.compile(model, peftc.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), inplace=True)
    compiled = peftc.compile(model, TRANSFORMERS, inplace=True)
    for name in TRANSFORMERS:
        state = {key: value.detach() for key, value in alone.adapter_state_dict(name).items()}
        peftc.set_peft_model_state_dict(compiled, state, name)
    for name in [*TRANSFORMERS, ["a", "b"]]:
        agree(alone, compiled, name)
    compiled.save_pretrained(folder / "saved", is_main_process=rank == 0)
    if rank == 0:
        alone.save_pretrained(folder / "alone")
        same_files(folder / "alone", folder / "saved")
    ids = batch(0)["input_ids"][:, :4]
    assert torch.equal(compiled.generate(ids, max_new_tokens=4), alone.generate(ids, max_new_tokens=4))
    compiled.set_adapter("a")
    alone.set_adapter("a")
    close(train(compiled, compiled.parameters(), range(3)), train(alone, alone.parameters(), range(3)))
    with torch.no_grad(), compiled.disable_adapter(), alone.disable_adapter():
        close(compiled(**batch(0)).logits, alone(**batch(0)).logits)
    before = {name: full(tensor).clone() for name, tensor in compiled.base.named_parameters()}
    for one in (alone, compiled):
        one.merge_adapter()
    with torch.no_grad():
        close(compiled(**batch(0)).logits, alone(**batch(0)).logits)
    compiled.unmerge_adapter()
    assert all(torch.equal(full(tensor), before[name]) for name, tensor in compiled.base.named_parameters())
    merged, wanted = compiled.merge_and_unload(), alone.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    distributed.barrier()
    loaded = load(folder / "merged")
    for name, tensor in wanted.named_parameters():
        close(loaded.get_parameter(name), tensor)


def test_models_that_transformers_cuts(tmp_path: Path) -> None:
    run(_from_pretrained, folder=tmp_path)
