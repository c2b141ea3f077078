"""FSDP2 on two processes: what one process computes, before compiling or after."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, full, llama, run, train

pytestmark = pytest.mark.slow

SPECS = {
    "a": peftc.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM"),
    "b": peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def shard(base: Any, root: bool = True, **options: Any) -> None:
    for layer in base.model.layers:
        fully_shard(layer, **options)
    if root:
        fully_shard(base, **options)


def state_of(compiled: peftc.CompiledModel, name: str) -> dict[str, Tensor]:
    return {key: full(value).clone() for key, value in compiled.adapter_state_dict(name).items()}


def sharded(order: str, specs: Any, states: Any, root: bool = True, **options: Any) -> peftc.CompiledModel:
    """A compiled and sharded Llama whose adapters have the values `states`."""
    model = llama()
    if order == "before":
        shard(model, root, **options)
    compiled = peftc.compile(model, copy.deepcopy(specs), inplace=True)
    for name, state in states.items():
        peftc.set_peft_model_state_dict(compiled, state, name)
    if order == "after":
        shard(compiled.base, root, **options)
    return compiled


def _trains(rank: int, folder: Path, order: str, root: bool) -> None:
    alone = perturb(peftc.compile(llama(), SPECS))
    states = {name: state_of(alone, name) for name in SPECS}
    torch.manual_seed(100 + rank)  # Every process draws its own numbers from here on.
    compiled = sharded(order, SPECS, states, root)
    for name, steps in (("a", range(3)), ("b", range(3, 6))):
        compiled.set_adapter(name)
        alone.set_adapter(name)
        wanted = train(alone, alone.parameters(), steps)
        close(train(compiled, compiled.parameters(), steps, rank), wanted)
        assert wanted[0] != wanted[-1]
    for name in SPECS:
        found = state_of(compiled, name)
        for key, value in state_of(alone, name).items():
            close(found[key], value)
            assert not torch.equal(value, states[name][key])


@pytest.mark.parametrize("order", ["before", "after"])
def test_losses_and_adapters_are_those_of_one_process(order: str, tmp_path: Path) -> None:
    run(_trains, order, True, folder=tmp_path)
