"""Every measure that has a bar, in one table beside bare, peft and the floor, with two plots.

    python benchmarks/bars.py                   # all, then docs/speed.md and its plots (half an hour on a quiet machine)
    python benchmarks/bars.py step forward      # those whose names begin so, into what was measured before
    python benchmarks/bars.py --draw            # the page and the plots, of benchmarks/bars.json

The contenders take turns in every round; what is compared are medians of ratios within a round. CPU seconds of one thread.
The floor is what the adapters' own products take, beside the bare model; of merging one read and one write of the weights.
"""

import copy
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch

import peftc
from benchmarks import forward, memory, merge, mixed_batch, train_step
from benchmarks.bars_page import draw
from benchmarks.timing import paired

ROOT = Path(__file__).parent.parent
FIGURES, PAGE, PLOTS = ROOT / "benchmarks" / "bars.json", ROOT / "docs" / "speed.md", ROOT / "docs" / "pictures"
GRID = "step, float32, "
Quartiles = tuple[float, float, float]
Run = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """A measure. `value`: what the bar is for, in `unit`; at most `bar` is asked, or more if peft takes more (`peft_too`).

    `bare`: its CPU seconds. `peft`, `peftc`, `floor`: ratios to bare, or in copies of the weights, with quartiles.
    """

    unit: str
    value: float
    bar: float
    bare: float
    peft: Quartiles | None
    peftc: Quartiles
    floor: Quartiles | None
    rounds: int


def ratios(seconds: Mapping[str, list[float]], of: str, to: str = "bare") -> Quartiles:
    """First quartile, median and third of the ratios within a round."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(seconds[of], seconds[to], strict=True)), n=4)
    return low, middle, high


def in_products(seconds: Mapping[str, list[float]]) -> float:
    """What peftc takes more than bare, as a multiple of the products."""
    rounds = zip(seconds["peftc"], seconds["bare"], seconds["floor"], strict=True)
    return statistics.median((own - bare) / floor for own, bare, floor in rounds)


def models(dtype: torch.dtype, width: int, layers: int, r: int) -> dict[str, Any]:
    """The base, and with LoRA on all its linears by peft and by peftc."""
    base = train_step.small_llama(width, layers, 512).to(dtype).requires_grad_(False)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=r, target_modules="all-linear"))
    return {
        "bare": base,
        "peft": theirs,
        "peftc": peftc.compile(base, peftc.LoraConfig(r=r, target_modules="all-linear")),
    }


def figure(seconds: Mapping[str, list[float]], unit: str, value: float, bar: float, to: str = "bare") -> Figure:
    """A figure of rounds that were measured. Products alone, which take less than bare, are a floor with it."""
    if "floor" in seconds and statistics.median(seconds["floor"]) < statistics.median(seconds[to]):
        both = [own + bare for own, bare in zip(seconds["floor"], seconds[to], strict=True)]
        seconds = {**seconds, "floor": both}
    own = {name: ratios(seconds, name, to) if name in seconds else None for name in ("peft", "peftc", "floor")}
    rounds = len(seconds["peftc"])
    return Figure(unit, value, bar, statistics.median(seconds[to]), **own, rounds=rounds)  # pyright: ignore[reportArgumentType]


def steps(dtype: torch.dtype, tokens: int, r: int, width: int, layers: int) -> dict[str, Run]:
    """What takes a training step of 2 × `tokens`, and their products."""
    made = models(dtype, width, layers, r)
    embeddings = torch.randn(2, tokens, width, dtype=dtype, requires_grad=True)
    runs: dict[str, Run] = {name: train_step.step(model.train(), embeddings) for name, model in made.items()}
    return {**runs, "floor": train_step.products(made["bare"], 2 * tokens, r, dtype)}


def step(dtype: torch.dtype, tokens: int, r: int, width: int, layers: int, rounds: int) -> Figure:
    """A training step of 2 × `tokens`: float32 in products, bfloat16 as a share of peft's overhead.

    The models are made anew five times: where their tensors lie decides some percent, for all rounds alike.
    """
    seconds: dict[str, list[float]] = {}
    for _ in range(5):
        for name, found in paired(steps(dtype, tokens, r, width, layers), rounds).items():
            seconds[name] = seconds.get(name, []) + found
    if dtype is torch.float32:
        return figure(seconds, "× products", in_products(seconds), 1.3)
    rounds_of = zip(*(seconds[name] for name in ("peftc", "peft", "bare")), strict=True)
    share = statistics.median((own - bare) / (theirs - bare) for own, theirs, bare in rounds_of)
    return figure(seconds, "of peft's overhead", share, 0.6)


def without_gradients(tokens: int, rounds: int) -> Figure:
    """A forward of 2 × `tokens` in products."""
    made = models(torch.float32, 576, 8, 16)
    embeddings = torch.randn(2, tokens, 576)
    runs = {name: forward.forward(model.eval(), embeddings) for name, model in made.items()}
    floor = train_step.products(made["bare"], 2 * tokens, 16, torch.float32, backward=False)
    seconds = paired({**runs, "floor": floor}, rounds)
    return figure(seconds, "× products", in_products(seconds), 1.3)


def decoding() -> dict[str, Run]:
    """What decodes eight tokens, one after another."""
    made = models(torch.float32, 576, 8, 16)
    made["floor"] = forward.by_hand(made["bare"], 16)
    embeddings = torch.randn(1, 1, 576)
    return {name: forward.decode(model.eval(), embeddings) for name, model in made.items()}


def to_bare(runs: Callable[[], dict[str, Run]], bar: float, rounds: int) -> Figure:
    """A figure whose bar is for the ratio to bare."""
    seconds = paired(runs(), rounds)
    return figure(seconds, "× bare", ratios(seconds, "peftc")[1], bar)


def mixed(shape: str) -> dict[str, Run]:
    """What decodes 16 rows with an adapter each."""
    base, names = mixed_batch.llama(shape), [f"a{i}" for i in range(16)]
    options: dict[str, Any] = {
        "r": mixed_batch.R,
        "target_modules": mixed_batch.TARGETS,
        "init_lora_weights": False,
    }
    compiled = peftc.compile(base, dict.fromkeys(names, peftc.LoraConfig(**options))).eval()
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options), adapter_name="a0")
    for name in names[1:]:
        theirs.add_adapter(name, peft.LoraConfig(**options))
    ids = torch.randint(3, 1000, (16, 16))
    return {
        "bare": mixed_batch.decode(base, ids),
        "peft": mixed_batch.decode(theirs.eval(), ids, adapter_names=names),
        "peftc": mixed_batch.decode(compiled, ids, adapter_names=names),
        "floor": mixed_batch.decode(mixed_batch.by_hand(base, 16), ids),
    }


def together(tokens: int) -> dict[str, Run]:
    """What takes a training step of 16 adapters in one batch, a row of `tokens` each."""
    base = mixed_batch.llama(next(iter(mixed_batch.SHAPES)))
    spec = peftc.LoraConfig(r=mixed_batch.R, target_modules=mixed_batch.TARGETS, init_lora_weights=False)
    names = [f"a{i}" for i in range(16)]
    compiled = peftc.compile(base, dict.fromkeys(names, spec)).train()
    compiled.set_adapter(names)
    embeddings = torch.randn(16, tokens, 576, requires_grad=True)
    return {
        "bare": mixed_batch.step(base.train(), embeddings),
        "peftc": mixed_batch.step(compiled, embeddings, adapter_names=names),
        "floor": mixed_batch.step(mixed_batch.by_hand(base, 16, trained=True).train(), embeddings),
    }


def merging(kind: str, dtype: torch.dtype) -> dict[str, Run]:
    """What merges and unmerges 16 linears of 2048², and copies their weights."""
    own = {"peft": "peft", "peftc": kind}
    calls = {name: merge.merging(how, merge.adapted(how, merge.linears(dtype))) for name, how in own.items()}
    source, target = merge.linears(dtype), merge.linears(dtype)

    def copying() -> None:
        with torch.no_grad():
            for a, b in zip(source.parameters(), target.parameters(), strict=True):
                b.copy_(a)

    runs: dict[str, Run] = {name: partial(merge.both, *pair) for name, pair in calls.items()}
    return {**runs, "bare": copying}


def in_copies(kind: str, dtype: torch.dtype, bar: float, rounds: int) -> Figure:
    """A figure of merging and unmerging."""
    seconds = paired(merging(kind, dtype), rounds)
    return figure(seconds, "copies", ratios(seconds, "peftc")[1], bar)


def kept(dtype: torch.dtype, dropout: float) -> Figure:
    """Bytes that are kept for the backward pass beyond bare, to the floor. No rounds: they are counted."""
    base = train_step.small_llama(memory.WIDTH, memory.LAYERS, 512).to(dtype).requires_grad_(False)
    embeddings = torch.randn(1, memory.TOKENS, memory.WIDTH, dtype=dtype, requires_grad=True)
    options: dict[str, Any] = {"r": memory.R, "target_modules": "all-linear", "lora_dropout": dropout}
    made = {
        "peft": peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)),
        "peftc": peftc.compile(base, peftc.LoraConfig(**options)),
    }
    bare, floor = memory.kept(base, embeddings), memory.limit(dtype.itemsize)
    own = {name: ((memory.kept(model, embeddings) - bare) / floor,) * 3 for name, model in made.items()}
    return Figure("× floor", own["peftc"][1], 1.1, 0.0, own["peft"], own["peftc"], (1.0, 1.0, 1.0), 1)


def measures() -> dict[str, Callable[[], Figure]]:
    """What has a bar, by name."""
    f32, bf16 = torch.float32, torch.bfloat16
    found: dict[str, Callable[[], Figure]] = {
        f"{GRID}2 × {tokens}, r={r}, width {width}": partial(
            step, f32, tokens, r, width, 2, 13 if tokens < 100 else 4 if tokens < 500 else 2
        )
        for width in (576, 1024)
        for tokens in (32, 256, 1024)
        for r in (8, 16, 64)
    }
    found |= {
        f"step, bfloat16, 2 × {tokens}, r=16, width 576": partial(step, bf16, tokens, 16, 576, 8, 3)
        for tokens in (64, 256)
    }
    found["forward, 2 × 256"] = partial(without_gradients, 256, 15)
    found["decode, one token"] = partial(to_bare, decoding, 1.11, 31)
    narrow, wide = mixed_batch.SHAPES
    found["decode, 16 rows, 16 adapters, width 576"] = partial(to_bare, partial(mixed, narrow), 1.35, 9)
    found["decode, 16 rows, 16 adapters, width 2048"] = partial(to_bare, partial(mixed, wide), 1.10, 9)
    found |= {
        f"16 adapters trained, {tokens} tokens each": partial(
            to_bare, partial(together, tokens), 1.25, 15 if tokens < 64 else 7
        )
        for tokens in (8, 64)
    }
    found |= {
        f"kept for backward, {name}, dropout {dropout}": partial(kept, dtype, dropout)
        for name, dtype in (("float32", f32), ("bfloat16", bf16))
        for dropout in (0.0, 0.1)
    }
    bars = {("keep", f32): 8, ("keep", bf16): 10, ("residual", f32): 25, ("residual", bf16): 25}
    for (kind, dtype), bar in bars.items():
        found[f"merge and unmerge, {kind}, {str(dtype)[6:]}"] = partial(in_copies, kind, dtype, bar, 5)
    return found


def main(wanted: list[str]) -> None:
    """Measure, write what was measured after each, then the page and the plots."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    figures: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name, measure in measures().items():
        if "--draw" not in wanted and (not wanted or any(name.startswith(start) for start in wanted)):
            figures[name] = asdict(measure())
            print(f"{name}: {figures[name]['value']:.3f} {figures[name]['unit']}", flush=True)
            ordered = {key: figures[key] for key in measures() if key in figures}
            FIGURES.write_text(json.dumps(ordered, indent=1, default=list) + "\n")
    draw(json.loads(FIGURES.read_text()), PAGE, PLOTS)


if __name__ == "__main__":
    main(sys.argv[1:])
