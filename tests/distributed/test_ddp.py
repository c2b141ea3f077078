"""DDP on two processes: what one process computes."""

from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, llama, mean, run, train

pytestmark = pytest.mark.slow

SPECS = {
    "a": peftc.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
    "b": peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def compiled_llama(seed: int = 0) -> peftc.CompiledModel:
    torch.manual_seed(seed)
    return perturb(peftc.compile(llama(), SPECS))


def _trains(rank: int, folder: Path) -> None:
    alone, compiled = compiled_llama(), compiled_llama(seed=rank)
    wrapper = DistributedDataParallel(compiled)  # Gives all what the first process has.
    for name, steps in (("a", range(3)), ("b", range(3, 6))):
        compiled.set_adapter(name)
        alone.set_adapter(name)
        if name == "b":
            with pytest.raises(peftc.PeftcError, match="Make the wrapper anew"):
                train(wrapper, compiled.parameters(), [steps[0]], rank)
            compiled.zero_grad()
            wrapper = DistributedDataParallel(compiled)
        wrapper(**batch(9, rank)).loss.backward()
        alone(**batch(9)).loss.backward()
        for key, tensor in alone.adapter_state_dict(name).items():
            close(compiled.adapter_state_dict(name)[key].grad, tensor.grad)
        wrapper.zero_grad()
        alone.zero_grad()
        close(train(wrapper, compiled.parameters(), steps, rank), train(alone, alone.parameters(), steps))
    with torch.no_grad(), wrapper.module.disable_adapter(), alone.disable_adapter():
        close(mean(wrapper(**batch(0, rank)).loss), alone(**batch(0)).loss)
    compiled.save_pretrained(folder / "saved", is_main_process=rank == 0)
    torch.distributed.barrier()
    for name in SPECS:
        loaded = peftc.load(llama(), folder / "saved", name, subfolder=name)
        for key, tensor in alone.adapter_state_dict(name).items():
            close(loaded.adapter_state_dict(name)[key], tensor)


def test_losses_gradients_and_files_are_those_of_one_process(tmp_path: Path) -> None:
    run(_trains, folder=tmp_path)


def _switches(rank: int, folder: Path) -> None:
    """All train when the wrapper is made, and rows of one batch have adapters of their own."""
    alone, compiled = compiled_llama(), compiled_llama()
    for model in (alone, compiled):
        model.set_requires_grad(["a", "b"])
    wrapper = DistributedDataParallel(compiled, find_unused_parameters=True)
    for step, name in enumerate(["a", "b", "a"]):
        for model in (alone, compiled):
            model.set_adapter(name)
        close(train(wrapper, compiled.parameters(), [step], rank), train(alone, alone.parameters(), [step]))
    for model in (alone, compiled):
        model.set_requires_grad(["a", "b"])
    names = ["a", "__base__", "b", "b"]
    wrapper(**batch(7, rank), adapter_names=names[2 * rank : 2 * rank + 2]).loss.backward()
    alone(**batch(7), adapter_names=names).loss.backward()
    for name in SPECS:
        for key, tensor in alone.adapter_state_dict(name).items():
            close(compiled.adapter_state_dict(name)[key].grad, tensor.grad)


def test_a_wrapper_that_knows_all_adapters_follows_switches_and_mixed_batches(tmp_path: Path) -> None:
    run(_switches, folder=tmp_path)
