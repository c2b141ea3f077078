"""One training step (forward and backward) of a small Llama with LoRA on all linear layers: bare, peft and peftc.

    python benchmarks/train_step.py

Bare is the frozen base model with gradients to its input embeddings only, which every adapter has to pay. The physical
limit beside it is what the adapters' own products take, six for each site, measured in the same rounds on tensors of their
own; a ratio of floating-point operations is out of reach, as skinny products are slow. Beside it what they would take if
q, k and v, and gate and up, shared one product of their common input. Times are CPU seconds of one thread.
"""

import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
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


def small_llama(width: int = 576, layers: int = 8, vocabulary: int = 4096) -> LlamaForCausalLM:
    """Layers of SmolLM2-135M's shape, or of the same proportions at another width (a multiple of 64), random."""
    torch.manual_seed(0)
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads // 2,
        vocab_size=vocabulary,
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


def products(
    model: torch.nn.Module, rows: int, r: int, dtype: torch.dtype, backward: bool = True
) -> Callable[[], None]:
    """The products of every adapted linear: x·Aᵀ and h·Bᵀ, then (`backward`) dh, dB, dA and dx; nothing else."""
    sites: list[tuple[Tensor, ...]] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            shapes = ((rows, module.in_features), (r, module.in_features), (module.out_features, r))
            sites.append(tuple(torch.randn(shape, dtype=dtype) for shape in (*shapes, (rows, module.out_features))))

    def run() -> None:
        inner: list[Tensor] = []
        for x, a, b, y in sites:
            inner.append(torch.nn.functional.linear(x, a))
            y.addmm_(inner[-1], b.t(), alpha=1e-6)
        for (x, a, b, y), h in zip(reversed(sites), reversed(inner), strict=True) if backward else ():
            of_h = y @ b
            _ = y.t() @ h, of_h.t() @ x
            x.addmm_(of_h, a, alpha=1e-6)

    return run


# The linears of a layer by their common input: its width, and theirs.
_SIBLINGS = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))


def shared_products(layers: int, rows: int, r: int, dtype: torch.dtype) -> Callable[[], None]:
    """The same products, where siblings have their A stacked: one x·Aᵀ, one dA and one dx for each input."""
    sites: list[tuple[Any, ...]] = []
    for width, outs in _SIBLINGS * layers:
        own = [(torch.randn(out, r, dtype=dtype), torch.randn(rows, out, dtype=dtype)) for out in outs]
        downs = [torch.randn(r, width, dtype=dtype) for _ in outs]
        sites.append((torch.randn(rows, width, dtype=dtype), downs, own))

    def run() -> None:
        inner: list[tuple[Tensor, Tensor]] = []
        for x, downs, own in sites:
            down = torch.cat(downs) if len(downs) > 1 else downs[0]
            inner.append((torch.nn.functional.linear(x, down), down))
            for (b, y), h in zip(own, inner[-1][0].split(r, 1), strict=True):
                y.addmm_(h, b.t(), alpha=1e-6)
        for (x, _, own), (h, down) in zip(reversed(sites), reversed(inner), strict=True):
            of_h = torch.empty_like(h)
            for (b, y), part, of_part in zip(own, h.split(r, 1), of_h.split(r, 1), strict=True):
                torch.mm(y, b, out=of_part)
                _ = y.t() @ part
            _ = of_h.t() @ x
            x.addmm_(of_h, down, alpha=1e-6)

    return run


def in_place_flop(y: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    """Of `addmm_`, which torch's table lacks."""
    return 2 * a[0] * a[1] * b[1]


def flops(run: Callable[[], None]) -> int:
    """Floating-point operations of one step."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flop}) as counter:
        run()
    return counter.get_total_flops()


def overhead(seconds: Mapping[str, list[float]], name: str) -> str:
    """What `name` takes more than bare, as a multiple of the products alone: the median, with the quartiles."""
    rounds = zip(seconds[name], seconds["bare"], seconds["products"], strict=True)
    low, middle, high = statistics.quantiles(((own - bare) / floor for own, bare, floor in rounds), n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main(rounds: int = 15) -> None:
    """Run and print one table per dtype."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for dtype, tokens in ((torch.float32, 32), (torch.float32, 256), (torch.bfloat16, 64), (torch.bfloat16, 256)):
        base = small_llama().to(dtype).requires_grad_(False)
        embeddings = torch.randn(2, tokens, 576, dtype=dtype, requires_grad=True)
        compiled = peftc.compile(base, peftc.LoraConfig(r=16, target_modules="all-linear"))
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=16, target_modules="all-linear"))
        runs = {name: step(m, embeddings) for name, m in (("bare", base), ("peft", theirs), ("peftc", compiled))}
        counts = {name: flops(run) for name, run in runs.items()}
        runs["products"] = products(base, 2 * tokens, 16, dtype)
        runs["products, shared"] = shared_products(base.config.num_hidden_layers, 2 * tokens, 16, dtype)
        seconds = paired(runs, rounds)
        table = Table(title=f"{dtype}, 2 × {tokens} tokens, LoRA r=16 on 56 linears, {rounds} rounds, 1 thread")
        columns = (
            "median CPU time",
            "to bare [quartiles]",
            "to peft [quartiles]",
            "FLOPs to bare",
            "overhead in products",
        )
        for column in ("", *columns):
            table.add_column(column, justify="left" if not column else "right")
        for name in runs:
            limit = f"{counts[name] / counts['bare']:.3f}" if name in counts else ""
            paired_ratios = (ratio(seconds, name, "bare"), ratio(seconds, name, "peft"))
            over = overhead(seconds, name) if name in ("peft", "peftc") else ""
            table.add_row(name, median_ms(seconds[name]), *paired_ratios, limit, over)
        Console(width=130).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
