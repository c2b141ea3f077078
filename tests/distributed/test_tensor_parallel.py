"""Tensor parallelism on two processes: what one process computes, with adapters laid out as their weights are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, full, llama, run, train

pytestmark = pytest.mark.slow

SPECS = {
    "a": peftc.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "b": peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "pissa": peftc.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights="pissa", bias="lora_only"),
}


def parallel(model: Any) -> Any:
    """As torch's tutorial has it, the head with its outputs gathered."""
    mesh = distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    plan: dict[str, Any] = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    for number in range(len(model.model.layers)):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"model.layers.{number}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.{number}.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


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
    placed = {key: tuple(live[f"{layer}.{key}.weight"].placements) for key in (
        "self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B", "mlp.down_proj.lora_A", "mlp.down_proj.lora_B"
    )}
    assert list(placed.values()) == [(Replicate(),), (Shard(0),), (Shard(1),), (Replicate(),)]
    for name in [*SPECS, ["a", "b"]]:
        for one in (alone, compiled):
            one.set_adapter(name)
        alone(**batch(0)).loss.backward()
        compiled(**batch(0)).loss.backward()
        for own in compiled.active_adapters:
            for key, tensor in alone.adapter_state_dict(own).items():
                other = compiled.adapter_state_dict(own)[key]
                assert other.requires_grad is tensor.requires_grad, key
                assert (other.grad is None) is (tensor.grad is None), (own, key)
                if tensor.grad is not None:
                    close(full(other.grad), tensor.grad)
        for one in (alone, compiled):
            one.zero_grad()
        with torch.no_grad():
            close(compiled(**batch(0)).logits, alone(**batch(0)).logits)
    compiled.set_adapter("a")
    alone.set_adapter("a")
    close(train(compiled, compiled.parameters(), range(3)), train(alone, alone.parameters(), range(3)))
    compiled.save_pretrained(folder / "saved", is_main_process=rank == 0)
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
    distributed.barrier()
    loaded = peftc.load(llama(attention_bias=True), folder / "saved", "a", subfolder="a")
    with torch.no_grad():
        assert not torch.equal(loaded(**batch(0)).logits, untouched)


@pytest.mark.parametrize("inplace", [True, False])
def test_outputs_gradients_and_training_are_those_of_one_process(inplace: bool, tmp_path: Path) -> None:
    run(_computes, inplace, folder=tmp_path)
