"""What a training step keeps for its backward pass beyond what the bare model keeps, with and without dropout.

    python benchmarks/memory.py

Counted by saved-tensor hooks: bytes of distinct storages that are no parameters. The limit is one `x` for each group of
sites that read the same one, where the bare model does not keep it, and a rank-sized product for each site. The second
table has the same step where a compiler partitions it, and recomputes what a budget says.
"""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
import torch._functorch.config as partitioner
from rich.console import Console
from rich.table import Table
from torch import Tensor

import peftc
from benchmarks.timing import paired, ratio
from benchmarks.train_step import small_llama, step

LAYERS, TOKENS, R, WIDTH, INNER = 12, 256, 16, 576, 1536


def kept(model: Any, embeddings: Tensor) -> int:
    """Bytes that a forward pass keeps, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # Held, so that no other takes its place.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(inputs_embeds=embeddings, use_cache=False).logits.float().mean()
    total = sum(storage.nbytes() for storage in storages.values())
    del loss
    return total


def limit(itemsize: int) -> int:
    """Of LoRA on the seven linears of a layer: what two norms and the MLP's product give, and seven ranks; the bare model
    keeps what attention gives.
    """
    return LAYERS * TOKENS * itemsize * (2 * WIDTH + INNER + 7 * R)


def main() -> None:
    """Print a table."""
    warnings.simplefilter("ignore")
    table = Table(title=f"MiB kept beyond bare: {LAYERS} layers, {TOKENS} tokens, LoRA r={R} on {7 * LAYERS} linears")
    for column in ("dtype", "dropout", "peft", "peftc", "limit", "peftc to limit"):
        table.add_column(column, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        embeddings = torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
        for dropout in (0.0, 0.1):
            base = small_llama(WIDTH, LAYERS, 512).to(dtype).requires_grad_(False)
            bare = kept(base, embeddings)
            theirs: Any = peft.LoraConfig(r=R, target_modules="all-linear", lora_dropout=dropout)
            ours = peftc.LoraConfig(r=R, target_modules="all-linear", lora_dropout=dropout)
            of_peft = kept(peft.get_peft_model(copy.deepcopy(base), theirs), embeddings) - bare
            of_peftc = kept(peftc.compile(base, ours), embeddings) - bare
            floor = limit(dtype.itemsize)
            cells = [f"{value / 2**20:.1f}" for value in (of_peft, of_peftc, floor)]
            table.add_row(str(dtype).removeprefix("torch."), str(dropout), *cells, f"{of_peftc / floor:.2f}")
    Console(width=100).print(table)
    Console(width=100).print(recomputed())


def recomputed(layers: int = 4, rounds: int = 5) -> Table:
    """What a step keeps in all, and its time, if torch.compile's partitioner decides by a budget; bare and peftc alike."""
    table = Table(title=f"MiB kept in all: {layers} layers, LoRA on {7 * layers} linears, dropout 0.1, float32")
    for column in ("budget", "bare", "peftc", "step of peftc to eager [quartiles]"):
        table.add_column(column, justify="right")
    base = small_llama(WIDTH, layers, 512).requires_grad_(False)
    compiled = peftc.compile(base, peftc.LoraConfig(r=R, target_modules="all-linear", lora_dropout=0.1))
    embeddings = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    table.add_row("eager", *(f"{kept(model, embeddings) / 2**20:.1f}" for model in (base, compiled)), "1")
    for budget in (1.0, 0.5, 0.1):
        torch._dynamo.reset()
        with partitioner.patch(activation_memory_budget=budget):
            own = [torch.compile(model, backend="aot_eager_decomp_partition") for model in (base, compiled)]
            cells = [f"{kept(model, embeddings) / 2**20:.1f}" for model in own]
            seconds = paired({"eager": step(compiled, embeddings), "own": step(own[1], embeddings)}, rounds)
        table.add_row(str(budget), *cells, ratio(seconds, "own", "eager"))
    return table


if __name__ == "__main__":
    main()
