"""FSDP2 on two processes: what one process computes, before compiling or after."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, full, llama, run, train

pytestmark = pytest.mark.slow

SPECS = {
    "a": peftc.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM"),
    "b": peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


HEAD = "base_model.model.lm_head.lora_A.weight"


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
    if order == "after" and not root:
        with pytest.raises(peftc.PeftcError, match="modules that fully_shard was not given"):
            train(compiled, compiled.parameters(), [0], rank)
        assert torch.equal(full(compiled.adapter_state_dict("a")[HEAD]), states["a"][HEAD])
        compiled.zero_grad()
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


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_of_modules_that_are_not_sharded_learn_too(order: str, tmp_path: Path) -> None:
    """Only the layers are sharded, and an adapter is on the head. One that came before needs to be looked at again."""
    run(_trains, order, False, folder=tmp_path)


def _mixed_precision(rank: int, folder: Path, order: str) -> None:
    specs = {"a": SPECS["a"]}
    alone = perturb(peftc.compile(llama(), specs))
    states = {"a": state_of(alone, "a")}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    compiled = sharded(order, specs, states, mp_policy=policy)
    losses = train(compiled, compiled.parameters(), range(4), rank)
    close(losses, train(alone, alone.parameters(), range(4)), near=3e-2)
    with torch.no_grad():
        assert compiled(**batch(0)).logits.dtype == torch.bfloat16
    # What is saved after a call is what is trained, and not its rounding.
    found = peftc.get_peft_model_state_dict(compiled, adapter_name="a")
    assert all(value.dtype == torch.float32 for value in found.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in found.values())


@pytest.mark.parametrize("order", ["before", "after"])
def test_mixed_precision(order: str, tmp_path: Path) -> None:
    run(_mixed_precision, order, folder=tmp_path)


def _merges(rank: int, folder: Path, order: str) -> None:
    torch.manual_seed(0)
    alone = perturb(peftc.compile(llama(), SPECS))
    states = {name: state_of(alone, name) for name in SPECS}
    compiled = sharded(order, SPECS, states)
    data = batch(0)

    def check(near: float = 1e-5) -> None:
        with torch.no_grad():
            close(compiled(**data).logits, alone(**data).logits, near)

    for names in ("a", "b", ["a", "b"]):
        compiled.set_adapter(names)
        alone.set_adapter(names)
        check()
    with compiled.disable_adapter(), alone.disable_adapter():
        check()
    before = {name: full(tensor).clone() for name, tensor in compiled.base.named_parameters()}
    for undo in (True, False):
        compiled.merge_adapter()
        alone.merge_adapter()
        check()
        for name, tensor in alone.base.named_parameters():
            assert torch.equal(full(compiled.base.get_parameter(name)), tensor), name
        if undo:
            compiled.unmerge_adapter()
            alone.unmerge_adapter()
            for name, tensor in compiled.base.named_parameters():
                assert torch.equal(full(tensor), before[name]), name
            check()
    plain, wanted = compiled.merge_and_unload(), alone.merge_and_unload()
    assert isinstance(plain, FSDPModule)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    with torch.no_grad():
        close(plain(**data).logits, wanted(**data).logits)


@pytest.mark.parametrize("order", ["before", "after"])
def test_shards_are_merged_as_wholes_are_and_unmerged_bit_for_bit(order: str, tmp_path: Path) -> None:
    run(_merges, order, folder=tmp_path)


def _refuses(rank: int, folder: Path, order: str) -> None:
    """What one process refuses, both do, and go on together."""
    states = {name: state_of(perturb(peftc.compile(llama(), SPECS)), name) for name in SPECS}
    compiled = sharded(order, SPECS, states)
    with torch.no_grad():
        expected = compiled(**batch(0)).logits
    broken = {name: state_of(compiled, name) for name in SPECS}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    live = compiled.adapter_state_dict("a")[key]
    with torch.no_grad():
        # The last row, which is in the shard of the last process.
        live.copy_(torch.where(torch.arange(32)[:, None] == 31, torch.inf, full(live)) if order == "before" else live)
        if order == "after" and rank == 1:
            live.to_local()[-1] = torch.inf
    with pytest.raises(peftc.MergeError, match="NaN or Inf" if rank == 1 else "another process"):
        compiled.merge_adapter()
    assert not compiled.merged_adapters
    peftc.set_peft_model_state_dict(compiled, broken["a"], "a")
    compiled.merge_adapter()
    compiled.unmerge_adapter()
    with pytest.raises(peftc.MergeError, match="undo='keep'"):
        compiled.merge_adapter(undo="residual")
    with torch.no_grad():
        close(compiled(**batch(0)).logits, expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_what_one_process_can_not_merge_none_does(order: str, tmp_path: Path) -> None:
    run(_refuses, order, folder=tmp_path)


def _tied(rank: int, folder: Path, order: str) -> None:
    model = llama(tie_word_embeddings=True)
    if order == "before":
        shard(model)
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(r=4, target_modules=["lm_head"]), inplace=True))
    if order == "after":
        shard(compiled.base)
    with torch.no_grad():
        expected = compiled(**batch(0)).logits
    with pytest.raises(peftc.MergeError, match="Pass untie=True"):
        compiled.merge_adapter()
    with pytest.raises(peftc.MergeError, match="fully_shard has made one tensor of both"):
        compiled.merge_adapter(untie=True)
    with torch.no_grad():
        close(compiled(**batch(0)).logits, expected)
    assert compiled.config.tie_word_embeddings


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_tie_that_is_sharded_is_not_cut(order: str, tmp_path: Path) -> None:
    run(_tied, order, folder=tmp_path)


def _mixed_batches(rank: int, folder: Path, order: str) -> None:
    alone = perturb(peftc.compile(llama(), SPECS))
    states = {name: state_of(alone, name) for name in SPECS}
    compiled = sharded(order, SPECS, states)
    names = ["a", "__base__", "b", "b"]
    mine = names[2 * rank : 2 * rank + 2]
    with torch.no_grad():
        expected = alone(**batch(0), adapter_names=names)
        close(compiled(**batch(0, rank), adapter_names=mine).logits, expected.logits.chunk(2)[rank])
    for model in (alone, compiled):
        model.set_requires_grad(["a", "b"])
    if order == "after":
        with pytest.raises(
            peftc.PeftcError, match="under fully_shard all processes have to give gradients to the same"
        ):
            compiled(**batch(0, rank), adapter_names=mine)
        names = ["a", "b", "b", "a"]
        mine = names[2 * rank : 2 * rank + 2]
    alone(**batch(0), adapter_names=names).loss.backward()
    compiled(**batch(0, rank), adapter_names=mine).loss.backward()
    for name in SPECS:
        for key, tensor in alone.adapter_state_dict(name).items():
            close(full(compiled.adapter_state_dict(name)[key].grad), tensor.grad)


@pytest.mark.parametrize("order", ["before", "after"])
def test_mixed_batches(order: str, tmp_path: Path) -> None:
    run(_mixed_batches, order, folder=tmp_path)


def _tokens(rank: int, folder: Path, order: str, tied: bool) -> None:
    """Rows of tokens, in an embedding and a head that FSDP2 has sharded."""
    specs = {"a": peftc.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 60, 7])}

    def model() -> Any:
        return llama(tie_word_embeddings=tied)

    alone = peftc.compile(model(), specs)
    base = model()
    if order == "before":
        shard(base)
    compiled = peftc.compile(base, specs, inplace=True)
    for key, value in state_of(compiled, "a").items():
        assert "lora" in key or torch.equal(value, alone.adapter_state_dict("a")[key])
    states = state_of(perturb(alone), "a")
    peftc.set_peft_model_state_dict(compiled, states, "a")
    if order == "after":
        shard(compiled.base)
    wanted = train(alone, alone.parameters(), range(3))
    close(train(compiled, compiled.parameters(), range(3), rank), wanted)
    for key, value in state_of(alone, "a").items():
        close(state_of(compiled, "a")[key], value)
    with torch.no_grad():
        expected = compiled(**batch(0)).logits
        compiled.merge_adapter()
        close(compiled(**batch(0)).logits, expected)
        compiled.unmerge_adapter()
        assert torch.equal(compiled(**batch(0)).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("order", ["before", "after"])
def test_rows_of_tokens(order: str, tied: bool, tmp_path: Path) -> None:
    run(_tokens, order, tied, folder=tmp_path)
