"""Do losses go the same way if bfloat16 models multiply by adapters in bfloat16? Master weights are float32 in all.

    python benchmarks/half_curves.py

A small Llama in bfloat16 learns sequences that a fixed table of successors makes, with LoRA on all linears: by peft, which
casts activations up to float32; by peftc, which casts the adapter down; and by peft once more with other batches, which is
how far apart two runs are anyway. The same start and AdamW.
"""

import copy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peftc

STEPS, AT, WORDS = 300, (1, 10, 50, 100, 200, 300), 64


def batches(seed: int) -> list[Tensor]:
    """Token ids (8, 32): each word is followed by its successor, or in one case of ten by any."""
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(WORDS, generator=generator)
    generator.manual_seed(seed)
    found: list[Tensor] = []
    for _ in range(STEPS):
        rows = [torch.randint(WORDS, (8,), generator=generator)]
        for _ in range(31):
            other = torch.randint(WORDS, (8,), generator=generator)
            rows.append(torch.where(torch.rand(8, generator=generator) < 0.1, other, successor[rows[-1]]))
        found.append(torch.stack(rows, 1))
    return found


def losses(model: Any, data: list[Tensor]) -> list[float]:
    """The loss of every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype is torch.float32 for p in trained)
    optimiser = torch.optim.AdamW(trained, lr=3e-3)
    curve: list[float] = []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        curve.append(loss.item())
    return curve


def smooth(curve: list[float], step: int) -> float:
    """The mean of ten steps up to `step`."""
    own = curve[max(0, step - 10) : step]
    return sum(own) / len(own)


def main() -> None:
    """Train and print a table."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes)).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        peftc.compile(base, peftc.LoraConfig(r=16, target_modules="all-linear")).save_pretrained(folder)

        def theirs() -> Any:
            return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)

        curves = {
            "peft": losses(theirs(), batches(1)),
            "peftc": losses(peftc.load(base, folder, is_trainable=True), batches(1)),
            "peft, other batches": losses(theirs(), batches(2)),
        }
    table = Table(title="Losses of a bfloat16 base, means of ten steps")
    for column in ("step", *map(str, AT)):
        table.add_column(column, justify="right")
    for name, curve in curves.items():
        table.add_row(name, *(f"{smooth(curve, step):.4f}" for step in AT))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
