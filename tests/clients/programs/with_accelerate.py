"""accelerate's own training loop with models of peft."""

import os
import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel, is_peft_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tests.clients.programs.common import TARGETS, base, main, plain, randomise, total

ROWS = [torch.arange(8) * (number + 1) % 90 + 3 for number in range(16)]


def adapted() -> Any:
    return randomise(get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS)))


def looped(**options: Any) -> tuple[Any, Any, Any, list[float]]:
    """An accelerator, the prepared model and optimiser, and the losses of a few steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, **options)
    model = adapted()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared = accelerator.prepare(model, optimiser, DataLoader(ROWS, batch_size=4))
    model, optimiser, loader = prepared
    seen: list[float] = []
    for _ in range(2):
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
            seen.append(float(loss))
    return accelerator, model, optimiser, seen


def training() -> Any:
    accelerator, model, _, seen = looped()
    state = accelerator.get_state_dict(model)
    inner = accelerator.unwrap_model(model)
    with tempfile.TemporaryDirectory() as folder:
        inner.save_pretrained(folder, state_dict=state, is_main_process=accelerator.is_main_process)
        keys = sorted(load_file(f"{folder}/adapter_model.safetensors"))
        loaded = PeftModel.from_pretrained(base(), folder)
    return [seen, is_peft_model(model), sorted(map(plain, state)), keys, total(inner), total(loaded)]


def accumulation() -> Any:
    return looped(gradient_accumulation_steps=2)[3]


def mixed_precision() -> Any:
    accelerator, model, _, seen = looped(mixed_precision="bf16")
    kept = {str(parameter.dtype) for parameter in model.parameters()}
    inner = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    return [[round(loss, 2) for loss in seen], sorted(kept), type(inner).__name__, accelerator.mixed_precision]


def states() -> Any:
    """A saved state goes on with the same losses."""
    accelerator, model, optimiser, _ = looped()
    ids = ROWS[0][None]

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss)

    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        files = sorted(os.listdir(folder))
        one = [step() for _ in range(3)]
        accelerator.load_state(folder)
        other = [step() for _ in range(3)]
    return [files, one, one == other]


TOPICS = {function.__name__: function for function in (training, accumulation, mixed_precision, states)}

if __name__ == "__main__":
    main(TOPICS)
