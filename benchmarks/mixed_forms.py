"""Three ways to compute the LoRA terms of a mixed batch: two batched products, `torch.vmap`, each adapter's rows alone.

    python benchmarks/mixed_forms.py

One linear of SmolLM2's width or of width 2048, 64 rows over 16 adapters of rank 16. Prefill has 16 tokens a row, decode
one. peftc takes the first where a rule has `factors`, and the last elsewhere; vmap runs the rule's own `output` over
stacked parameters. Times are CPU seconds of one thread, as ratios to the first.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import paired, ratio

ROWS, ADAPTERS, R = 64, 16, 16


def term(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One adapter's term on its own rows, as LoRA's rule writes it."""
    return F.linear(F.linear(x, a) * 2.0, b)


def forms(width: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """The three forms, on rows that are grouped by adapter already."""
    x = torch.randn(ADAPTERS, ROWS // ADAPTERS * tokens, width)
    a, b = torch.randn(ADAPTERS, R, width), torch.randn(ADAPTERS, width, R)
    mapped = torch.vmap(term)
    return {
        "batched products": lambda: torch.bmm(torch.bmm(x, a.mT) * 2.0, b.mT),
        "vmap of the rule": lambda: mapped(x, a, b),
        "rows alone": lambda: torch.stack([term(x[i], a[i], b[i]) for i in range(ADAPTERS)]),
    }


def main() -> None:
    """Measure and print a table."""
    torch.set_num_threads(1)
    table = Table("width", "phase", "batched products, ms", "vmap of the rule", "rows alone")
    for width in (576, 2048):
        for phase, tokens in (("prefill", 16), ("decode", 1)):
            torch.manual_seed(0)
            runs = forms(width, tokens)
            with torch.no_grad():
                first = next(iter(runs.values()))()
                for run in runs.values():
                    torch.testing.assert_close(run(), first, rtol=1e-4, atol=1e-2)
                loops = 20 if tokens > 1 else 200
                times = paired({name: _repeated(run, loops) for name, run in runs.items()}, rounds=9)
            base, *others = times
            each = statistics.median(times[base]) / loops
            table.add_row(str(width), phase, f"{1000 * each:.3f}", *(ratio(times, other, base) for other in others))
    Console().print(table)


def _repeated(run: Callable[[], Tensor], loops: int) -> Callable[[], object]:
    return lambda: [run() for _ in range(loops)][-1]


if __name__ == "__main__":
    main()
