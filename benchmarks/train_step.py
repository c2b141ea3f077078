"""One training step (forward and backward) of a small Llama with LoRA on all linear layers: bare, peft and peftc.

    python benchmarks/train_step.py

Bare is the frozen base model with gradients to its input embeddings only, which every adapter has to pay. The physical
limit beside it is the ratio of floating-point operations that torch counts. Times are CPU seconds of one thread.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import copy

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from benchmarks.timing import median_ms, paired, ratio


def small_llama() -> LlamaForCausalLM:
    """Eight layers of SmolLM2-135M's width, random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
    )
    return LlamaForCausalLM(config)


def step(model: Any, embeddings: Tensor) -> Callable[[], None]:
    """Forward and backward on fixed input embeddings (batch, tokens, width), gradients to them included."""

    def run() -> None:
        loss = model(inputs_embeds=embeddings, use_cache=False).logits.float().square().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        embeddings.grad = None

    return run


def flops(run: Callable[[], None]) -> int:
    """Floating-point operations of one step."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main(rounds: int = 15) -> None:
    """Run and print one table per dtype."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for dtype, tokens in ((torch.float32, 32), (torch.float32, 256), (torch.bfloat16, 64)):
        base = small_llama().to(dtype).requires_grad_(False)
        embeddings = torch.randn(2, tokens, 576, dtype=dtype, requires_grad=True)
        compiled = peftc.compile(base, peftc.LoraConfig(r=16, target_modules="all-linear"))
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=16, target_modules="all-linear"))
        runs = {name: step(m, embeddings) for name, m in (("bare", base), ("peft", theirs), ("peftc", compiled))}
        counts = {name: flops(run) for name, run in runs.items()}
        seconds = paired(runs, rounds)
        table = Table(title=f"{dtype}, 2 × {tokens} tokens, LoRA r=16 on 56 linears, {rounds} rounds, 1 thread")
        for column in ("", "median CPU time", "to bare [quartiles]", "to peft [quartiles]", "FLOPs to bare"):
            table.add_column(column, justify="left" if not column else "right")
        for name in runs:
            limit = f"{counts[name] / counts['bare']:.3f}"
            paired_ratios = (ratio(seconds, name, "bare"), ratio(seconds, name, "peft"))
            table.add_row(name, median_ms(seconds[name]), *paired_ratios, limit)
        Console(width=110).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
