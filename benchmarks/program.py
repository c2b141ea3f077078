"""A whole model as one program (`capture="export"`): seconds, node counts, and a training step beside module capture.

    python benchmarks/program.py

Thirty layers of SmolLM2's shape with LoRA on all linears; then eighty layers on the meta device. The limit of the node
count is the bare program; each edit adds the nodes of its rule, and merging takes them all away again.
"""

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from benchmarks.timing import paired, ratio
from tests.support.costs import bytes_read, flops

SPEC = peftc.LoraConfig(r=16, target_modules="all-linear")


def shape(layers: int, **more: Any) -> LlamaConfig:
    """SmolLM2-135M's, with so many layers."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaConfig(
        **{**sizes, "num_hidden_layers": layers, "vocab_size": 49152, "tie_word_embeddings": True, **more}
    )


def step(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return run


def costs(program: Any, inputs: dict[str, Any]) -> str:
    """FLOPs of a call and bytes of tensors, of the program and as the plan says them."""
    tokens, planned = inputs["input_ids"].numel(), program.plan.costs
    adapted = flops(program, inputs)
    own = sum(parameter.nbytes for name, parameter in program.named_parameters() if "lora_" in name)
    with program.merged():
        bare, read = flops(program, inputs), bytes_read(program)
    return (
        f"FLOPs a token: {bare / tokens / 1e6:.1f} million bare, {(adapted - bare) / tokens:,.0f} more adapted (the"
        f" plan: {planned.flops_per_token:,}); bytes read: {read:,} bare, {own:,} of the adapter (the plan:"
        f" {planned.gradient_bytes:,})"
    )


def nodes(program: Any) -> str:
    """How many nodes a program has, with its adapters and without."""
    adapted, edits = len(program.graph_of("").nodes), len(program.plan.edits)
    with program.disable_adapter():
        bare = len(program.graph_of("").nodes)
    return f"{bare:,} nodes bare, {adapted:,} with {edits} edits ({(adapted - bare) / edits:.1f} each)"


def main(rounds: int = 7) -> None:
    """Print what each takes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console, start = Console(), time.process_time()
    model = LlamaForCausalLM(shape(30))
    ids = torch.randint(0, 49152, (2, 32))
    inputs = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    start = time.process_time()
    program = peftc.compile(model, SPEC, capture="export", inputs=inputs)
    seconds = time.process_time() - start
    console.print(f"30 layers: {seconds:.1f} s to capture in train() and eval(); {nodes(program)}")
    console.print(costs(program.eval(), inputs))
    modules = peftc.compile(model, SPEC)
    program.train(), modules.train()
    seconds_of = paired({"program": step(program, ids), "modules": step(modules, ids)}, rounds)
    console.print(f"training step, 2 × 32 tokens, program to modules: {ratio(seconds_of, 'program', 'modules')}")
    with torch.device("meta"):
        deep = LlamaForCausalLM(
            shape(80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8)
        )
        ids = torch.zeros(2, 8, dtype=torch.long)
    start = time.process_time()
    program = peftc.compile(deep, SPEC, capture="export", inputs={"input_ids": ids, "use_cache": False})
    console.print(f"80 layers on meta: {time.process_time() - start:.1f} s to capture; {nodes(program)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
