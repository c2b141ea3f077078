"""Prompt methods on a small Llama: a training step, and 32 tokens generated; bare, peft and peftc.

    python benchmarks/prompts.py

Twenty virtual tokens. Bare is the frozen base model, in training with gradients to its input embeddings. The physical
limit beside it is the ratio of floating-point operations that torch counts: virtual tokens are tokens. Times are CPU
seconds of one thread.
"""

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import peftc
from benchmarks.timing import median_ms, paired, ratio
from benchmarks.train_step import flops, small_llama, step

FIELDS: dict[str, Any] = {"num_virtual_tokens": 20, "task_type": "CAUSAL_LM"}
METHODS = {
    "prefix tuning": (peftc.PrefixTuningConfig(**FIELDS), peft.PrefixTuningConfig(**FIELDS)),
    "prompt tuning": (peftc.PromptTuningConfig(**FIELDS), peft.PromptTuningConfig(**FIELDS)),
    "p-tuning": (
        peftc.PromptEncoderConfig(encoder_hidden_size=128, **FIELDS),
        peft.PromptEncoderConfig(encoder_hidden_size=128, **FIELDS),
    ),
}


def generate(model: Any, ids: Tensor) -> Callable[[], None]:
    """Greedy generation of 32 tokens after `ids` (batch, tokens)."""

    def run() -> None:
        model.generate(input_ids=ids, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)

    return run


def main(rounds: int = 15) -> None:
    """Run and print one table per task."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    base = small_llama().requires_grad_(False)
    embeddings = torch.randn(2, 64, 576, requires_grad=True)
    ids = torch.randint(3, 4096, (1, 64), generator=torch.Generator().manual_seed(0))
    for title, make in (
        ("a training step, 2 × 64 tokens", lambda model: step(model.train(), embeddings)),
        ("32 tokens generated after 64", lambda model: generate(model.eval(), ids)),
    ):
        table = Table(title=f"{title}, 20 virtual tokens, float32, {rounds} rounds, 1 thread")
        for column in ("", "", "median CPU time", "to bare [quartiles]", "to peft [quartiles]", "FLOPs to bare"):
            table.add_column(column, justify="left" if not column else "right")
        for method, (ours, theirs) in METHODS.items():
            models = {
                "bare": base,
                "peft": peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(theirs)),
                "peftc": peftc.compile(base, ours),
            }
            runs = {name: make(model) for name, model in models.items()}
            counts = {name: flops(run) for name, run in runs.items()}
            seconds = paired(runs, rounds)
            for name in runs:
                paired_ratios = (ratio(seconds, name, "bare"), ratio(seconds, name, "peft"))
                limit = f"{counts[name] / counts['bare']:.3f}"
                table.add_row(method, name, median_ms(seconds[name]), *paired_ratios, limit)
        Console(width=120).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
