"""Methods that adapt weights, with FSDP2 on two processes: what one process computes, and merges."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import peftc
from tests.support.adapters import perturb
from tests.support.processes import batch, close, full, llama, run, train

pytestmark = pytest.mark.slow

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
SPECS: dict[str, peftc.AdapterSpec] = {
    "LoKr": peftc.LoKrConfig(r=2, **TARGETS),
    "OFT": peftc.OFTConfig(oft_block_size=8, coft=True, eps=0.2, **TARGETS),
    "BOFT": peftc.BOFTConfig(boft_n_butterfly_factor=2, **TARGETS),
    "HRA": peftc.HRAConfig(r=4, **TARGETS),
    "MiSS": peftc.MissConfig(r=7, **TARGETS),
    "Bat": peftc.MissConfig(r=8, init_weights="bat", **TARGETS),
    "RoAd": peftc.RoadConfig(group_size=4, **TARGETS),
    "GraLoRA": peftc.GraloraConfig(r=4, hybrid_r=2, **TARGETS),
    "C3A": peftc.C3AConfig(block_size=16, **TARGETS),
    "HiRA": peftc.HiraConfig(r=2, **TARGETS),
    "DeLoRA": peftc.DeloraConfig(r=2, **TARGETS),
    "AdaMSS": peftc.AdamssConfig(subspace_rank=2, **TARGETS),
    "FRoD": peftc.FrodConfig(**TARGETS),
}


def _same(rank: int, folder: Path) -> None:
    for name, spec in SPECS.items():
        torch.manual_seed(0)
        alone = perturb(peftc.compile(llama(), spec))
        state = {key: full(value).clone() for key, value in alone.adapter_state_dict().items()}
        compiled: Any = peftc.compile(llama(), copy.deepcopy(spec), inplace=True)
        for model in (alone, compiled):  # What follows from its tensors follows from the new ones.
            peftc.set_peft_model_state_dict(model, state)
        for layer in compiled.base.model.layers:
            fully_shard(layer)
        fully_shard(compiled.base)
        try:
            wanted = train(alone, alone.parameters(), range(3))
            close(train(compiled, compiled.parameters(), range(3), rank), wanted, near=1e-4)
            assert wanted[0] != wanted[-1]
            for key, value in alone.adapter_state_dict().items():
                close(full(compiled.adapter_state_dict()[key]), value.detach(), near=1e-4)
            with torch.no_grad():
                before = compiled(**batch(0)).logits
                compiled.merge_adapter()
                close(compiled(**batch(0)).logits, before, near=1e-4)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


def test_they_train_and_merge_as_on_one_process(tmp_path: Path) -> None:
    run(_same, folder=tmp_path)
