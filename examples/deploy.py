"""Ship the demo's adapter: merged into SmolLM2-135M-Instruct, as a checkpoint, a torch.export program and an ONNX model.

    python examples/finetune_smollm2.py      # makes the adapter
    python examples/deploy.py                # or: --to onnx; --to aoti, where there is a C++ compiler

Each is compared with the live model while it is written, checked again from its folder, and asked one message in a process
of its own that has no peftc: the programs by the `generate.py` beside them, which needs no transformers either.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from report import check, console
from rich.table import Table

import peftc
from peftc.demo import smollm2

TOKENS = 40
# What asks a checkpoint: transformers, whose own `generate` serves it.
ASK = """
import sys
sys.modules["peftc"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, tokens = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
given = tokenizer(text, return_tensors="pt")
made = model.generate(**given, max_new_tokens=int(tokens), do_sample=False)[0, given.input_ids.shape[1]:]
print(tokenizer.decode(made, skip_special_tokens=True))
"""


def main(
    model: Annotated[str | None, typer.Option(help="A chat model; by default the demo's.")] = None,
    adapter: Annotated[Path, typer.Option(help="Its adapter.")] = Path("out/smollm2/adapter"),
    out: Annotated[Path, typer.Option(help="Where the artefacts go.")] = Path("out/deployed"),
    to: Annotated[list[str] | None, typer.Option(help="hf, pt2, onnx or aoti; by default the first three.")] = None,
) -> None:
    """Export, check again, and ask."""
    tokenizer = smollm2.load_tokenizer(model)
    compiled = peftc.load(smollm2.load_base(model), adapter).eval()
    text = smollm2.prompt(tokenizer, "Kindly get me a wheelbarrow for tomorrow.")
    table = Table("to", "size", "export", "difference", "greedy tokens", "asked", "answer", box=None)
    answers: dict[str, str] = {}
    for target in to or ["hf", "pt2", "onnx"]:
        start = time.perf_counter()
        how = {} if target == "hf" else {"generation": True, "tokenizer": tokenizer}
        made = compiled.export(out / target, target, **how)
        seconds = time.perf_counter() - start
        if target == "hf":
            tokenizer.save_pretrained(out / target)
        peftc.verify(out / target)
        start = time.perf_counter()
        answers[target] = ask(out / target, target, text)
        asked = time.perf_counter() - start
        served = out / target if target == "hf" else out / target / "generation"
        size = sum(file.stat().st_size for file in served.iterdir()) / 2**20
        same = f"{made.tokens_equal} of {made.tokens}"
        columns = (f"{size:.0f} MiB", f"{seconds:.0f} s", f"{made.difference:.1e}", same, f"{asked:.1f} s")
        table.add_row(target, *columns, answers[target].strip().partition("\n")[0])
        check(made.tokens_equal == made.tokens, f"{target}: the greedy tokens are the live model's")
    console.print(table)
    check(len(set(answers.values())) == 1, "all runtimes give the same answer")


def ask(folder: Path, target: str, text: str) -> str:
    """What a process without peftc answers."""
    if target == "hf":
        command = ["-c", ASK, str(folder), text, str(TOKENS)]
    else:
        command = [str(folder / "generation" / "generate.py"), text, "--raw", "--tokens", str(TOKENS)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


if __name__ == "__main__":
    typer.run(main)
