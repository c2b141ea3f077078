"""FullyShardedDataParallel (FSDP1) on two processes, as transformers' Trainer and accelerate use it: use_orig_params."""

import functools
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, llama, run, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SPECS = {
    "default": peftc.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "b": peftc.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def compiled_llama(dtype: torch.dtype, autocast: bool) -> peftc.CompiledModel:
    torch.manual_seed(0)
    return perturb(peftc.compile(llama().to(dtype), SPECS, autocast_adapter_dtype=autocast))


def wrapped(compiled: peftc.CompiledModel) -> FullyShardedDataParallel:
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(
        compiled, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def _trains(rank: int, folder: Path, dtype: torch.dtype) -> None:
    alone, compiled = compiled_llama(dtype, False), compiled_llama(dtype, False)
    wrapper = wrapped(compiled)
    near = 1e-5 if dtype == torch.float32 else 1e-3
    for name, steps in (("default", range(3)), ("b", range(3, 6)), ("default", range(6, 8))):
        for model in (alone, compiled):
            model.set_adapter(name)
        with torch.no_grad():
            close(wrapper(**batch(0)).logits, alone(**batch(0)).logits, near)
        close(
            train(wrapper, wrapper.parameters(), steps, rank),
            train(alone, alone.parameters(), steps, halves=True),
            near,
        )
    with torch.no_grad(), compiled.disable_adapter(), alone.disable_adapter():
        close(wrapper(**batch(0)).logits, alone(**batch(0)).logits, near)
    for refused, match in (
        (lambda: compiled.save_pretrained(folder / "never"), "Pass state_dict="),
        (compiled.merge_adapter, "merge on one process"),
        (lambda: compiled.add_adapter("c", SPECS["b"]), "before it is wrapped"),
    ):
        with pytest.raises(peftc.PeftcError, match=match):
            refused()
    with FullyShardedDataParallel.state_dict_type(wrapper, StateDictType.FULL_STATE_DICT):
        state = wrapper.state_dict()
    if rank == 0:  # A Trainer saves on one process alone.
        compiled.save_pretrained(folder / "saved", state_dict=state)
        alone.save_pretrained(folder / "alone")
        for name in SPECS:
            sub = None if name == "default" else name
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*the base model.*")
                loaded = peftc.load(llama().to(dtype), folder / "saved", name, subfolder=sub)
            for key, tensor in alone.adapter_state_dict(name).items():
                close(loaded.adapter_state_dict(name)[key].float(), tensor.float(), 10 * near)
    distributed.barrier()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_switches_and_files_are_those_of_one_process(dtype: torch.dtype, tmp_path: Path) -> None:
    run(_trains, dtype, folder=tmp_path)


def _mixes(rank: int, folder: Path) -> None:
    with pytest.raises(ValueError, match="uniform dtype"):
        wrapped(compiled_llama(torch.bfloat16, True))


def test_float32_adapters_on_a_bfloat16_base_are_more_than_torch_flattens(tmp_path: Path) -> None:
    """One of the reasons for FSDP2, which takes them."""
    run(_mixes, folder=tmp_path)


def _rows(rank: int, folder: Path, tied: bool) -> None:
    spec = peftc.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 60])
    torch.manual_seed(0)
    alone = perturb(peftc.compile(llama(tie_word_embeddings=tied), spec))
    compiled = peftc.compile(llama(tie_word_embeddings=tied), spec)
    peftc.set_peft_model_state_dict(compiled, alone.adapter_state_dict())
    wrapper = wrapped(compiled)
    close(train(wrapper, wrapper.parameters(), range(3), rank), train(alone, alone.parameters(), range(3)))
    with FullyShardedDataParallel.state_dict_type(wrapper, StateDictType.FULL_STATE_DICT):
        state = wrapper.state_dict()
    if rank == 0:
        compiled.save_pretrained(folder / "saved", state_dict=state)
        loaded = peftc.load(llama(tie_word_embeddings=tied), folder / "saved")
        for key, tensor in alone.adapter_state_dict().items():
            close(loaded.adapter_state_dict()[key], tensor)
    distributed.barrier()


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens(tied: bool, tmp_path: Path) -> None:
    run(_rows, tied, folder=tmp_path)
