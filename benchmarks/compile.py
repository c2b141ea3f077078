"""Compiling a Llama-70B shape on the meta device with seven targets per layer, beside peft in the same run.

    python benchmarks/compile.py

peft has its best setting, `low_cpu_mem_usage=True`, and gets a fresh model in every round because it rewrites the one it
is given (building it is not timed). peftc copies the structure of one and the same model each time; `inplace` shows what
that copy costs. Also: planning alone, and a Llama-405B shape. Times are CPU seconds of the process.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from benchmarks.timing import median_ms, paired, ratio

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, int]] = {
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def meta_llama(shape: str) -> LlamaForCausalLM:
    """A Llama of that shape without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))


def main(rounds: int = 15) -> None:
    """Run and print a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, largest = meta_llama("70B"), meta_llama("405B")
    spec = peftc.LoraConfig(r=16, target_modules=TARGETS)
    fresh = {name: [meta_llama("70B") for _ in range(rounds + 1)] for name in ("peft", "inplace")}

    def with_peft() -> Any:
        config = peft.LoraConfig(r=16, target_modules=TARGETS)
        return peft.get_peft_model(fresh["peft"].pop(), config, low_cpu_mem_usage=True)

    seconds = paired(
        {
            "peft": with_peft,
            "peftc": lambda: peftc.compile(model, spec),
            "peftc inplace": lambda: peftc.compile(fresh["inplace"].pop(), spec, inplace=True),
            "peftc plan": lambda: peftc.plan(model, spec),
            "peftc plan 405B": lambda: peftc.plan(largest, spec),
        },
        rounds,
    )
    table = Table(title=f"Llama-70B shape on meta, 7 targets × 80 layers, {rounds} rounds, 1 thread")
    for column in ("", "median CPU time", "ratio to peft [quartiles]"):
        table.add_column(column, justify="left" if not column else "right")
    for name in seconds:
        table.add_row(name, median_ms(seconds[name]), ratio(seconds, name, "peft"))
    Console(width=100).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
