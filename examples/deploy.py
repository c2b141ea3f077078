"""Ship the demo's adapter: merged into SmolLM2-135M-Instruct, as a checkpoint, a torch.export program and an ONNX model.

    python examples/finetune_smollm2.py      # makes the adapter
    python examples/deploy.py                # or: --to onnx

Each is compared with the live model while it is written, checked again from its folder, and asked one message by a runtime
that knows nothing of peftc. Greedy decoding here is without a cache, so that a program is all it takes.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import finetune_smollm2 as demo
import torch
import typer
from report import check, console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.exporters.base import ExportedModel

import peftc

TOKENS = 12


def main(
    model: Annotated[str | None, typer.Option(help="A chat model; by default the demo's.")] = None,
    adapter: Annotated[Path, typer.Option(help="Its adapter.")] = Path("out/smollm2/adapter"),
    out: Annotated[Path, typer.Option(help="Where the artefacts go.")] = Path("out/deployed"),
    to: Annotated[list[str] | None, typer.Option(help="hf, pt2 or onnx; by default all.")] = None,
) -> None:
    """Export, check again, and ask."""
    tokenizer = demo.load_tokenizer(model)
    compiled = peftc.load(demo.load_base(model), adapter).eval()
    text = demo.prompt(tokenizer, "Kindly get me a wheelbarrow for tomorrow.")
    prompt = tokenizer(text, return_tensors="pt").input_ids
    table = Table("to", "size", "export", "difference", "greedy tokens", f"{TOKENS} tokens", "answer begins", box=None)
    for target in to or ["hf", "pt2", "onnx"]:
        start = time.perf_counter()
        made = compiled.export(out / target, target)
        seconds = time.perf_counter() - start
        tokenizer.save_pretrained(out / target)
        peftc.verify(out / target)
        answer, took = ask(out / target, target, prompt)
        size = sum(file.stat().st_size for file in (out / target).iterdir()) / 2**20
        same = f"{made.tokens_equal} of {made.tokens}"
        words = tokenizer.decode(answer).splitlines()[0]
        table.add_row(
            target, f"{size:.0f} MiB", f"{seconds:.0f} s", f"{made.difference:.1e}", same, f"{took:.1f} s", words
        )
        check(made.tokens_equal == made.tokens, f"{target}: the greedy tokens are the live model's")
    console.print(table)


def ask(folder: Path, target: str, prompt: torch.Tensor) -> tuple[list[int], float]:
    """The tokens that follow `prompt` (1, length), each the likeliest, and the seconds they took."""
    run: Any = AutoModelForCausalLM if target == "hf" else ExportedModel
    model = run.from_pretrained(str(folder))
    ids, start = prompt.expand(2, -1), time.perf_counter()  # A program takes any batch but one.
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, prompt.shape[1] :].tolist(), time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
