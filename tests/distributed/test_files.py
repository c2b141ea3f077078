"""Files of models that two processes hold together: adapters whole, merged models without any process holding all."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, full, llama, mean, run

pytestmark = pytest.mark.slow

SPECS = {
    "default": peftc.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "biases": peftc.LoraConfig(r=4, target_modules=["v_proj"], bias="all"),
    "pissa": peftc.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights="pissa"),
    "encoded": peftc.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "recurrent": peftc.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM"
    ),
    "prefix": peftc.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": peftc.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


ADAPTED = ("self_attn.q_proj", "mlp.down_proj")


def compiled_llama() -> peftc.CompiledModel:
    torch.manual_seed(0)
    return perturb(peftc.compile(llama(attention_bias=True), copy.deepcopy(SPECS)))


def sharded(order: str, seed: int = 1) -> peftc.CompiledModel:
    """A model with the same adapters, whose numbers are others."""
    torch.manual_seed(seed)
    model = llama(attention_bias=True)
    compiled = peftc.compile(model, copy.deepcopy(SPECS), inplace=True) if order == "after" else None
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return compiled or peftc.compile(model, copy.deepcopy(SPECS), inplace=True)


def tensors(compiled: peftc.CompiledModel, name: str) -> dict[str, Tensor]:
    return {key: full(value) for key, value in compiled.adapter_state_dict(name).items()}


def outputs(compiled: peftc.CompiledModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in compiled.peft_config:
        compiled.set_adapter(name)
        with torch.no_grad():
            found[name] = compiled(**batch(0)).logits
    compiled.set_adapter("default")
    return found


def _saves(rank: int, folder: Path, order: str) -> None:
    alone, compiled = compiled_llama(), sharded(order)
    if rank == 0:
        alone.save_pretrained(folder / "alone")
    distributed.barrier()
    for name in SPECS:
        path = folder / "alone" if name == "default" else folder / "alone" / name
        compiled.load_adapter(path, name, is_trainable=True)
    for name, expected in outputs(alone).items():
        found = outputs(compiled)[name]
        assert torch.allclose(found, expected, atol=1e-5), name
    compiled.save_pretrained(folder / "saved", is_main_process=rank == 0)
    distributed.barrier()
    written = sorted(path.relative_to(folder / "alone") for path in (folder / "alone").rglob("*") if path.is_file())
    for path in written:
        assert (folder / "saved" / path).read_bytes() == (folder / "alone" / path).read_bytes(), path


def _starts(rank: int, folder: Path, order: str) -> None:
    compiled = sharded(order, seed=rank)
    compiled.add_adapter("later", SPECS["pissa"])
    for name in ["later", *(SPECS if order == "before" else ())]:
        for key, value in tensors(compiled, name).items():
            others = [torch.empty_like(value) for _ in range(2)]
            distributed.all_gather(others, value.contiguous())
            assert torch.equal(*others), key


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_that_come_to_a_sharded_model_start_the_same_everywhere(order: str, tmp_path: Path) -> None:
    run(_starts, order, folder=tmp_path)


@pytest.mark.parametrize("order", ["before", "after"])
def test_files_are_byte_for_byte_those_of_one_process(order: str, tmp_path: Path) -> None:
    run(_saves, order, folder=tmp_path)


def optimizer_of(compiled: peftc.CompiledModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=0.01)


def step(compiled: peftc.CompiledModel, optimizer: torch.optim.Optimizer, number: int, rank: int | None) -> float:
    loss = compiled(**batch(number, rank)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item() if rank is None else mean(loss.detach())


def resumed(compiled: peftc.CompiledModel, path: Path) -> torch.optim.Optimizer:
    """The optimizer of `compiled`, both as a checkpoint has them, whoever wrote it."""
    optimizer = optimizer_of(compiled)
    options = StateDictOptions(ignore_frozen_params=True)
    model, steps = get_state_dict(compiled, optimizer, options=options)
    state = {"model": model, "optimizer": steps}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        compiled,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )
    return optimizer


def checkpoint(compiled: peftc.CompiledModel, optimizer: torch.optim.Optimizer, path: Path) -> None:
    model, steps = get_state_dict(compiled, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    assert 0 < len(model) < 40, "adapters only"
    dcp.save({"model": model, "optimizer": steps}, checkpoint_id=path)


def _begins(rank: int, folder: Path, order: str) -> None:
    start = tensors(compiled_llama(), "default")
    compiled = sharded(order)
    peftc.set_peft_model_state_dict(compiled, start)
    optimizer = optimizer_of(compiled)
    losses = [step(compiled, optimizer, number, rank) for number in (0, 1)]
    checkpoint(compiled, optimizer, folder / "by two")
    (folder / f"first{rank}.json").write_text(json.dumps(losses))


def _goes_on(rank: int, folder: Path, order: str, expected: list[float]) -> None:
    compiled = sharded(order)
    optimizer = resumed(compiled, folder / "by one")
    close([step(compiled, optimizer, number, rank) for number in (4, 5)], expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_training_goes_on_from_two_processes_to_one_and_back(order: str, tmp_path: Path) -> None:
    """Two steps by two processes, two by one, two by two; and six by one that never stopped."""
    alone = compiled_llama()
    optimizer = optimizer_of(alone)
    expected = [step(alone, optimizer, number, None) for number in range(6)]
    run(_begins, order, folder=tmp_path)
    close(json.loads((tmp_path / "first0.json").read_text()), expected[:2])
    single = compiled_llama()
    optimizer = resumed(single, tmp_path / "by two")
    close([step(single, optimizer, number, None) for number in (2, 3)], expected[2:4])
    checkpoint(single, optimizer, tmp_path / "by one")
    run(_goes_on, order, expected[4:], folder=tmp_path)


def _broadcasts(rank: int, folder: Path, order: str) -> None:
    """The first process reads what it has; the others get it from there."""
    compiled = sharded(order)
    alone = compiled_llama()
    state = (
        {name: tensor.detach() for name, tensor in alone.named_parameters() if ".lora_" in name} if rank == 0 else {}
    )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(compiled, state, options=options)
    for key, value in tensors(alone, "pissa").items():
        assert torch.equal(tensors(compiled, "pissa")[key], value), key


@pytest.mark.parametrize("order", ["before", "after"])
def test_one_process_reads_and_all_have_it(order: str, tmp_path: Path) -> None:
    run(_broadcasts, order, folder=tmp_path)


def _saves_merged(rank: int, folder: Path, order: str) -> None:
    alone, compiled = compiled_llama(), sharded(order)
    peftc.set_peft_model_state_dict(compiled, tensors(alone, "default"))
    gathered: list[torch.Size] = []
    full_tensor = DTensor.full_tensor

    def noted(tensor: DTensor, **options: Any) -> Tensor:
        gathered.append(tensor.shape)
        return full_tensor(tensor, **options)

    DTensor.full_tensor = noted
    plain = compiled.merge_and_unload()
    state = plain.state_dict()
    writer = HuggingFaceStorageWriter(str(folder / "merged"), save_distributed=True, enable_consolidation=True)
    dcp.save(state, storage_writer=writer)
    DTensor.full_tensor = full_tensor
    whole = sum(tensor.numel() for tensor in state.values())
    held = sum(tensor.to_local().numel() for tensor in state.values())
    assert held <= whole // 2 + 64
    # Adapters, and the trained copy of the head, but none of the weights that are adapted.
    assert not {*gathered} & {plain.get_parameter(f"model.layers.0.{name}.weight").shape for name in ADAPTED}
    if rank == 0:
        plain.config.save_pretrained(folder / "merged")
    distributed.barrier()
    wanted = alone.merge_and_unload()
    loaded = type(wanted).from_pretrained(folder / "merged")
    for name, tensor in wanted.named_parameters():
        assert torch.equal(loaded.get_parameter(name), tensor), name


@pytest.mark.parametrize("order", ["before", "after"])
def test_no_process_holds_all_of_a_merged_model_that_is_saved(order: str, tmp_path: Path) -> None:
    run(_saves_merged, order, folder=tmp_path)
