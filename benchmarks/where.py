"""Where the time goes: of what adapters take more than the bare model, and of merging, for measures that miss their bar.

    python benchmarks/where.py            # benchmarks/where.json and docs/where.md (ten minutes)
    python benchmarks/where.py --draw     # the page, of benchmarks/where.json

Steps and decoding are profiled op by op (the time of an op without those that it calls), merging call by call of Python. A
profiler makes small calls longer, so the kinds are shares; what was measured without one stands beside them.
"""

import cProfile
import json
import pstats
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import bars, mixed_batch
from benchmarks.timing import paired

ROOT = Path(__file__).parent.parent
FIGURES, PAGE = ROOT / "benchmarks" / "where.json", ROOT / "docs" / "where.md"
Run = Callable[[], object]
R = 16  # The rank in all of them.

BASE, PRODUCTS, COPIES, SUMS, REST = "the base's products", "products", "casts and copies", "sums, masks", "calls"
PRODUCT = r"aten::(mm|addmm_?|bmm|baddbmm_?|mkldnn_linear|mkldnn_linear_pointwise)$"
# By kind of work what ops are called that do it; the first that matches.
OPS = {
    COPIES: r"aten::(copy_|_to_copy|to|cat|stack|clone|contiguous|index_select|gather|empty\w*|zeros?\w*|fill_|resize_)$",
    SUMS: r"aten::(add_?|mul_?|div_?|sub_?|addcmul_?|index_add_?|bernoulli_|sum|ne|lt|gt|pow|silu\w*)$",
    REST: r"",
}
CHECKS, LOG = "checksums", "undo log"
# The same of calls from Python, where an undo log is written or read, whatever it calls.
CALLS = {
    PRODUCTS: r"addmm_|torch\.mm\b|matmul",
    CHECKS: r"xxh",
    LOG: r"undo_log\.py|zstd|Zstd|nonzero|'sub_'|numpy",
    COPIES: r"'copy_'|'to'|'clone'|empty|_scratch",
    REST: r"",
}


def by_op(run: Run, times: int, is_own: Callable[[str, Any], bool]) -> dict[str, float]:
    """Seconds of one run by kind of work; `is_own` tells an adapter's product, by its op and the shapes it got."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        start = time.process_time()
        for _ in range(times):
            run()
        whole = time.process_time() - start
    found = dict.fromkeys((BASE, PRODUCTS, *OPS), 0.0)
    for event in seen.key_averages(group_by_input_shape=True):
        kind = _kind(event.key, OPS)
        if re.search(PRODUCT, event.key):
            kind = PRODUCTS if is_own(event.key, event.input_shapes) else BASE
        found[kind] += event.self_cpu_time_total / 1e6
    # What ran between ops is Python.
    found[REST] += max(0.0, whole - sum(found.values()))
    return {kind: seconds / times for kind, seconds in found.items()}


def has_rank(_: str, shapes: Any) -> bool:
    """Whether an operand of a product has the rank for a size."""
    return any(R in shape for shape in shapes)


def is_batched(op: str, _: Any) -> bool:
    """Whether it is a product of a stack, which only adapters have where the batch is as large as the rank."""
    return "bmm" in op


def by_call(run: Run) -> dict[str, float]:
    """Seconds by kind of work, as Python's profiler counts them."""
    seen = cProfile.Profile()
    seen.runcall(run)
    rows: Mapping[Any, Any] = pstats.Stats(seen).stats  # type: ignore[attr-defined]
    found = dict.fromkeys(CALLS, 0.0)
    for (file, _, name), row in rows.items():
        found[_kind(f"{file}:{name}", CALLS)] += row[2]
    return found


def _kind(name: str, kinds: Mapping[str, str]) -> str:
    return next(kind for kind, pattern in kinds.items() if re.search(pattern, name))


def beyond(runs: Callable[[], Mapping[str, Run]], times: int, is_own: Callable[[str, Any], bool]) -> dict[str, Any]:
    """What peftc takes more than bare, by kind, and without a profiler."""
    made = {name: run for name, run in runs().items() if name in ("bare", "peftc")}
    seconds = paired(made, times)
    more = statistics.median(own - bare for own, bare in zip(seconds["peftc"], seconds["bare"], strict=True))
    # In turns, as what else the machine does changes with time.
    rounds = [{name: by_op(run, max(1, times // 5), is_own) for name, run in made.items()} for _ in range(5)]
    kinds = {kind: statistics.median(r["peftc"][kind] - r["bare"][kind] for r in rounds) for kind in (PRODUCTS, *OPS)}
    return {"seconds": more, "kinds": kinds}


def merged(runs: Callable[[], Mapping[str, Run]]) -> dict[str, Any]:
    """What merging and unmerging takes, by kind, and without a profiler."""
    made = runs()
    seconds = paired({"peftc": made["peftc"]}, 5)["peftc"]
    return {"seconds": statistics.median(seconds), "kinds": by_call(made["peftc"])}


def measures() -> dict[str, Callable[[], dict[str, Any]]]:
    """What is profiled, by the names of `benchmarks/bars.py`."""
    f32, bf16 = torch.float32, torch.bfloat16
    narrow, wide = mixed_batch.SHAPES
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"step, {name}, 2 × {tokens}, r=16, width {width}": partial(
            beyond, partial(bars.steps, dtype, tokens, R, width, 2 if dtype is f32 else 8), times, has_rank
        )
        for name, dtype, tokens, width, times in (
            ("float32", f32, 32, 576, 60),
            ("float32", f32, 32, 1024, 30),
            ("float32", f32, 256, 576, 20),
            ("bfloat16", bf16, 64, 576, 20),
        )
    }
    found["decode, one token"] = partial(beyond, bars.decoding, 10, has_rank)
    for name, shape in (("576", narrow), ("2048", wide)):
        found[f"decode, 16 rows, 16 adapters, width {name}"] = partial(
            beyond, partial(bars.mixed, shape), 5, is_batched
        )
    for tokens in (8, 64):
        found[f"16 adapters trained, {tokens} tokens each"] = partial(
            beyond, partial(bars.together, tokens), 7, is_batched
        )
    for kind, dtype, name in (("keep", f32, "float32"), ("residual", f32, "float32"), ("residual", bf16, "bfloat16")):
        found[f"merge and unmerge, {kind}, {name}"] = partial(merged, partial(bars.merging, kind, dtype))
    return found


TEXT = """# Where the time goes

`python benchmarks/where.py` makes this page: for measures of [what adapters cost](speed.md) whose bar is missed, or nearly,
what kind of work the time is. CPU time of one thread; milliseconds without a profiler, then shares with one, which makes
small calls longer than they are. *Calls* are dispatch, views, autograd and Python.

## More than the bare model

| measure | more than bare | adapters' products | casts, copies, memory | sums, factors, masks | calls |
|---|---:|---:|---:|---:|---:|
{beyond}

- A step of 64 tokens is calls as much as products, and one decoded token is mostly calls: six products of a site, or two,
  are as many calls whatever their size, of some microseconds each; the rest is what autograd and Python need for a site.
- In bfloat16 the casts of the adapters' float32 numbers are work that a float32 step has not.
- A batch of 16 adapters reads 16 times the adapters' numbers: where the base is narrow that is as much as its weights.
  In training each adapter's factors are parameters of their own, so they are copied into a stack in every step, and get
  gradients one by one.

## Merging

| measure | there and back | products | checksums | undo log | copies | calls |
|---|---:|---:|---:|---:|---:|---:|
{merged}

- `keep` folds tiles in float64, with a checksum of what they were and of what they are; undoing reads both once
  more. peft adds and subtracts in the weight's own dtype, and leaves other bits.
- `residual` holds no second copy, so it computes what subtracting would give, compares, and packs what differs.
"""


def _share(part: float, whole: float) -> str:
    return f"{max(0.0, part) / whole:.0%}"


def text(figures: Mapping[str, Any]) -> str:
    """The page."""
    tables: dict[str, list[str]] = {"beyond": [], "merged": []}
    orders = {"beyond": (PRODUCTS, COPIES, SUMS, REST), "merged": (PRODUCTS, CHECKS, LOG, COPIES, REST)}
    for name, one in figures.items():
        table = "merged" if CHECKS in one["kinds"] else "beyond"
        whole = sum(max(0.0, seconds) for seconds in one["kinds"].values())
        shares = [_share(one["kinds"][kind], whole) for kind in orders[table]]
        tables[table].append(f"| {name} | {1000 * one['seconds']:.1f} ms | {' | '.join(shares)} |")
    return TEXT.format(**{name: "\n".join(rows) for name, rows in tables.items()})


def main(wanted: Iterable[str]) -> None:
    """Profile, write the figures after each, then the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    figures: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name, measure in measures().items():
        if "--draw" not in wanted and (not wanted or any(name.startswith(start) for start in wanted)):
            figures[name] = measure()
            print(name, {kind: f"{1000 * own:.2f}" for kind, own in figures[name]["kinds"].items()}, flush=True)
            ordered = {key: figures[key] for key in measures() if key in figures}
            FIGURES.write_text(json.dumps(ordered, indent=1) + "\n")
    PAGE.write_text(text(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
