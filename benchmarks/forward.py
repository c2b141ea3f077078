"""A forward without gradients, and one decoded token, of a small Llama with LoRA on all linears: bare, peft and peftc.

    python benchmarks/forward.py

The limit of a forward is what the adapters' own products take, two for each site, measured in the same rounds on tensors of
their own; of one token, whose products wait for memory and for Python, the base with these products by hand. A token is
decoded after a prompt of 32, with a cache. Times are CPU seconds of one thread.
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
from transformers import DynamicCache

import peftc
from benchmarks.timing import median_ms, paired, ratio
from benchmarks.train_step import overhead, products, small_llama


def forward(model: Any, embeddings: Tensor) -> Callable[[], object]:
    """One forward on input embeddings (batch, tokens, width)."""

    def run() -> object:
        with torch.no_grad():
            return model(inputs_embeds=embeddings, use_cache=False).logits

    return run


def by_hand(base: Any, r: int) -> Any:
    """The base with the products of one adapter on all linears of its layers, of tensors that are at hand."""
    model = copy.deepcopy(base)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            down, up = torch.randn(r, module.in_features), torch.randn(module.out_features, r) * 1e-6
            down, up = down.to(module.weight.dtype), up.to(module.weight.dtype)

            def hook(_: Any, args: Any, y: Tensor, down: Tensor = down, up: Tensor = up) -> None:
                inner = torch.nn.functional.linear(args[0].view(-1, down.shape[1]), down)
                y.view(-1, up.shape[0]).addmm_(inner, up.t())

            module.register_forward_hook(hook)
    return model


def decode(model: Any, embeddings: Tensor, often: int = 8) -> Callable[[], object]:
    """`often` times the token after a prompt of 32."""
    prompt = torch.randn(1, 32, embeddings.shape[-1], dtype=embeddings.dtype)
    with torch.no_grad():
        cache: DynamicCache = model(inputs_embeds=prompt, use_cache=True).past_key_values

    def run() -> object:
        with torch.no_grad():
            for _ in range(often):
                logits = model(inputs_embeds=embeddings, past_key_values=cache).logits
                cache.crop(-1)
        return logits

    return run


def main(rounds: int = 15) -> None:
    """Run and print a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table(title=f"no gradients, 8 layers of width 576, LoRA r=16 on 56 linears, {rounds} rounds, 1 thread")
    columns = ("median CPU time", "to bare [quartiles]", "to peft [quartiles]", "overhead in products")
    for column in ("", " ", *columns):
        table.add_column(column, justify="right" if column.strip() else "left", no_wrap=True)
    for dtype in (torch.float32, torch.bfloat16):
        base = small_llama().to(dtype).eval().requires_grad_(False)
        compiled = peftc.compile(base, peftc.LoraConfig(r=16, target_modules="all-linear")).eval()
        config = peft.LoraConfig(r=16, target_modules="all-linear")
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        models = (("bare", base), ("peft", theirs), ("peftc", compiled))
        for what, rows, often in (("2 × 256 tokens", 512, 1), ("one token", 1, 8)):
            embeddings = torch.randn(min(2, rows), max(rows // 2, 1), 576, dtype=dtype)
            make = forward if often == 1 else decode
            runs = {name: make(model, embeddings) for name, model in models}
            if often == 1:
                runs["products"] = products(base, rows, 16, dtype, backward=False)
            else:
                runs["by hand"] = decode(by_hand(base, 16), embeddings)
            seconds = paired(runs, rounds)
            for name in runs:
                over = overhead(seconds, name) if often == 1 and name in ("peft", "peftc") else ""
                ratios = (ratio(seconds, name, "bare"), ratio(seconds, name, "peft"))
                each = median_ms([s / often for s in seconds[name]])
                table.add_row(f"{dtype}, {what}"[6:] if name == "bare" else "", name, each, *ratios, over)
    Console(width=150).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
