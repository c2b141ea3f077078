"""Peak memory of a training step through rules that have no form but the weight's, at width 4096.

    python benchmarks/weight_rules.py

One linear of 4096 × 4096 in float32 (64 MiB), 64 rows, forward and backward; each method in a process of its own.
The peak is over what the process holds before the step (Linux); `bare` is the frozen linear with a gradient to its
input. The limit for a method that computes its weight anew is two copies of it: the weight that stands in, and its
gradient, which the adapter's follow from. What a method keeps beside them is its own.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

WIDTH, ROWS = 4096, 64
METHODS = ("bare", "LoRA (output)", "LoHa", "OFT", "VeRA", "token rows", "LoRA on a parameter", "LN-tuning")


def measure(method: str) -> None:
    """Run one step and print by how many bytes the peak grew."""
    import torch
    from torch import Tensor, nn

    import peftc
    from tests.methods import loha, oft, token_rows

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 64)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.T

    torch.set_num_threads(1)
    base: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    spec: peftc.AdapterSpec = peftc.LoraConfig(r=16, target_modules=["0"])
    rules = {
        "LoHa": (loha.Loha(), loha.LohaConfig(r=16, target_modules=["0"])),
        "OFT": (oft.Oft(), oft.OftConfig(block_size=32, target_modules=["0"])),
        "token rows": (token_rows.TokenRows(), token_rows.TokenRowsConfig(target_modules=["0"])),
    }
    if method in rules:
        rule, spec = rules[method]
        peftc.register(rule)
    if method == "VeRA":
        spec = peftc.VeraConfig(r=256, target_modules=["0"])
    if method == "LN-tuning":
        base, spec = nn.Sequential(nn.LayerNorm(WIDTH)), peftc.LNTuningConfig(target_modules=["0"])
    if method == "LoRA on a parameter":
        base, spec = nn.Sequential(Product()), peftc.LoraConfig(r=16, target_parameters=["0.w"])
    model = base.requires_grad_(False) if method == "bare" else peftc.compile(base, spec)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    x.sum().backward()  # torch's own first-use buffers.
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew from what is held now.
    before = held("VmRSS")
    model(x).square().sum().backward()
    print(held("VmHWM") - before)


def held(field: str) -> int:
    """Bytes that the process holds now (VmRSS), or held at its peak (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run and print a table."""
    from rich.console import Console
    from rich.table import Table

    weight = WIDTH * WIDTH * 4
    table = Table("method", "peak of a step", "in weights of 64 MiB", title=f"width {WIDTH}, {ROWS} rows, float32")
    for method in METHODS:
        out = subprocess.run([sys.executable, __file__, method], capture_output=True, text=True, check=True).stdout
        table.add_row(method, f"{int(out) / 2**20:,.0f} MiB", f"{int(out) / weight:.2f}")
    Console().print(table)


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
