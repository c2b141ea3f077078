"""All methods on one small task with one budget: SmolLM2-135M-Instruct and the demo's messages.

    python benchmarks/methods.py                    # all, one after another, then docs/comparison.md and the plot
    python benchmarks/methods.py --only LoRA,DoRA   # those, into what was measured before
    python benchmarks/methods.py --missing          # those that were not

What every method gets is the same: the same batches in the same order, the same number of steps, the same sites where it
adapts linears, one seed. The figures go to benchmarks/methods.json, the page and the plot are made of that.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import typer
from torch import Tensor, nn

import peftc
from peftc.demo import shop, smollm2

ROOT = Path(__file__).parent.parent
FIGURES, PAGE, PLOT = (
    ROOT / "benchmarks" / "methods.json",
    ROOT / "docs" / "comparison.md",
    ROOT / "docs" / "comparison.png",
)
SITES = ("q_proj", "v_proj")
STEPS, ROWS, RATE = 8, 4, 2e-3
smollm2.BATCH_SIZE = ROWS
PROMPT = {"num_virtual_tokens": 10, "task_type": "CAUSAL_LM"}


class OneTask(nn.Module):
    """A model whose rows are all of task 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        tasks = torch.zeros(len(input_ids), dtype=torch.long)
        return self.model(input_ids=input_ids, task_ids=tasks, **given)


class AllLogits(nn.Module):
    """A model whose loss is of the labels of its virtual tokens, too, and takes the logits of all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, logits_to_keep: int = 0, **given: Any) -> Any:
        if labels is None:
            return self.model(input_ids=input_ids, logits_to_keep=logits_to_keep, **given)
        before = input_ids.shape[1] - labels.shape[1]
        return self.model(input_ids=input_ids, labels=nn.functional.pad(labels, (before, 0), value=-100), **given)


@dataclass(frozen=True)
class Entry:
    """A spec, or what makes it with the tokenizer; its learning rate as a multiple of LoRA's; what calls go `around` by."""

    spec: peftc.AdapterSpec | Callable[[Any], peftc.AdapterSpec]
    times: float = 1.0
    around: Callable[[nn.Module], nn.Module] = lambda model: model


def on_sites(cls: Any, times: float = 1.0, **fields: Any) -> Entry:
    """A method of linears, at the sites that all of them have here."""
    return Entry(cls(target_modules=list(SITES), **fields), times)


def two_examples(tokenizer: Any) -> peftc.CPTConfig:
    """The first two of the training examples as CPT's tokens: what is asked is input (2), the answers are labels (4)."""
    ids, kinds = list[int](), list[int]()
    for number, example in enumerate(shop.read_examples("train")[:2]):
        own, labels = smollm2.encode(example, tokenizer, shop.SYSTEM)
        ids += own
        kinds += [4 * number + (2 if label < 0 else 4) for label in labels]
    return peftc.CPTConfig(cpt_token_ids=tuple(ids), cpt_tokens_type_mask=tuple(kinds), task_type="CAUSAL_LM")


METHODS: Mapping[str, Entry] = {
    "LoRA": on_sites(peftc.LoraConfig, r=8, lora_alpha=16),
    "DoRA": on_sites(peftc.LoraConfig, r=8, lora_alpha=16, use_dora=True),
    "AdaLoRA": on_sites(peftc.AdaLoraConfig, init_r=12, target_r=8, lora_alpha=24, total_step=STEPS),
    "(IA)³": Entry(
        peftc.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), 10
    ),
    "LoHa": on_sites(peftc.LoHaConfig, r=8, alpha=16),
    "LoKr": on_sites(peftc.LoKrConfig, r=8, alpha=16),
    "OFT": on_sites(peftc.OFTConfig),
    "BOFT": on_sites(peftc.BOFTConfig),
    "HRA": on_sites(peftc.HRAConfig, r=8),
    "MiSS": on_sites(peftc.MissConfig, r=8),
    "RoAd": on_sites(peftc.RoadConfig, 10),
    "GraLoRA": on_sites(peftc.GraloraConfig, r=8, alpha=16),
    "C3A": on_sites(peftc.C3AConfig, 30, block_size=64),
    "HiRA": on_sites(peftc.HiraConfig, r=8),
    "DeLoRA": on_sites(peftc.DeloraConfig, r=8),
    "VeRA": on_sites(peftc.VeraConfig, 10, r=256),
    "PVeRA": on_sites(peftc.PveraConfig, 10, r=256),
    "RandLoRA": on_sites(peftc.RandLoraConfig, r=32, randlora_alpha=640),
    "VB-LoRA": on_sites(peftc.VBLoRAConfig, 5, num_vectors=90, vector_length=64),
    "FourierFT": on_sites(peftc.FourierFTConfig, 10, n_frequency=1000, scaling=150.0),
    "WaveFT": on_sites(peftc.WaveFTConfig, n_frequency=2592),
    "SHiRA": on_sites(peftc.ShiraConfig, r=8, random_seed=0),
    "Super-Tuning": on_sites(peftc.SupertuningConfig),
    "TinyLoRA": on_sites(peftc.TinyLoraConfig, 10),
    "Uni-LoRA": on_sites(peftc.UniLoraConfig, 5, theta_d_length=4096),
    "PSOFT": on_sites(peftc.PsoftConfig, r=32),
    "OSF": on_sites(peftc.OSFConfig, 0.1),
    "PEANuT": on_sites(peftc.PeanutConfig, r=8),
    "DEFT": on_sites(peftc.DeftConfig, r=8),
    "GLoRA": on_sites(peftc.GloraConfig, r=8),
    "BEFT": Entry(peftc.BeftConfig(target_modules=["v_proj"]), 10),
    "LN-tuning": Entry(
        peftc.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]), 10
    ),
    "LLaMA-Adapter": Entry(peftc.AdaptionPromptConfig(adapter_len=10, adapter_layers=30, task_type="CAUSAL_LM"), 5),
    "FRoD": on_sites(peftc.FrodConfig),
    "AdaMSS": on_sites(peftc.AdamssConfig),
    "Poly": Entry(peftc.PolyConfig(target_modules=list(SITES), r=8, n_tasks=1, n_skills=2), around=OneTask),
    "prompt tuning": Entry(peftc.PromptTuningConfig(**PROMPT), 15),
    "prefix tuning": Entry(peftc.PrefixTuningConfig(**PROMPT), 15),
    "p-tuning": Entry(peftc.PromptEncoderConfig(encoder_hidden_size=128, **PROMPT), 1),
    "cartridge": Entry(peftc.CartridgeConfig(**PROMPT), 15),
    "multitask prompt tuning": Entry(peftc.MultitaskPromptTuningConfig(num_tasks=1, **PROMPT), 15, OneTask),
    "CPT": Entry(two_examples, 15, AllLogits),
}


class Saved:
    """Counts the bytes of activations that autograd keeps for the way back, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self.left_out = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, int] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.left_out:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes(self, model: Any, batch: dict[str, Tensor]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
            loss = smollm2.answer_loss(model, batch)
        found = sum(self.storages.values())
        del loss
        return found


@torch.no_grad()
def score(model: Any, tokenizer: Any, examples: Sequence[shop.Example]) -> tuple[float, int]:
    """The mean loss of held-out answers, and how many of them greedy decoding gives word for word: those whose every token
    is the likeliest after what comes before.
    """
    model.eval()
    losses, right = [], 0
    for batch in smollm2.batches(examples, tokenizer, 1, 0, shop.SYSTEM):
        window = int((batch["labels"] != -100).sum(dim=1).max()) + 1
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits = model(**given, logits_to_keep=window).logits[:, :-1]
        labels = batch["labels"][:, -window + 1 :]
        losses.append(
            nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1) / (labels >= 0).sum(1)
        )
        right += int(((logits.argmax(-1) == labels) | (labels < 0)).all(dim=1).sum())
    return float(torch.cat(losses).mean()), right


def train(model: Any, batches: Sequence[dict[str, Tensor]], rate: float) -> tuple[float, float]:
    """CPU and wall seconds of a step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model.train()
    cpu, wall = time.process_time(), time.perf_counter()
    for batch in batches:
        smollm2.answer_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - cpu) / len(batches), (time.perf_counter() - wall) / len(batches)


def measure(base: Any, tokenizer: Any, entry: Entry | None) -> dict[str, Any]:
    """The figures of one method, or of the base alone."""
    torch.manual_seed(0)
    training, heldout = (shop.read_examples("train"), shop.read_examples("heldout"))
    batches = list(smollm2.batches(training, tokenizer, 1, 0, shop.SYSTEM))[:STEPS]
    if entry is None:
        loss, right = score(base, tokenizer, heldout)
        return {"parameters": 0, "loss": loss, "right": right}
    compiled = peftc.compile(base, entry.spec(tokenizer) if callable(entry.spec) else entry.spec)
    count = compiled.get_nb_trainable_parameters()[0]
    model = entry.around(compiled)
    saved = Saved(model).bytes(model.train(), batches[0])
    cpu, wall = train(model, batches, RATE * entry.times)
    loss, right = score(model, tokenizer, heldout)
    # The parameter, its gradient and Adam's two moments, in float32.
    return {
        "parameters": count,
        "rate": RATE * entry.times,
        "cpu": cpu,
        "wall": wall,
        "activations": saved,
        "states": 16 * count,
        "loss": loss,
        "right": right,
    }


def page(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, best loss first."""
    base = figures["base"]
    rows = sorted((name for name in figures if name != "base"), key=lambda name: figures[name]["loss"])
    missing = [name for name in METHODS if name not in figures]
    return TEXT.format(
        missing=f"\nNot measured so far (`--only` adds them): {', '.join(missing)}.\n" if missing else "",
        steps=STEPS,
        rows=ROWS,
        sites=" and ".join(SITES),
        rate=RATE,
        plot=PLOT.name,
        base=f"| *the base* | | | | | | {base['loss']:.3f} | {base['right']} |",
        table="\n".join(row(name, figures[name]) for name in rows),
    )


# The losses that the plot marks.
LOSSES = (0.15, 0.2, 0.3, 0.5, 0.7, 1)

TEXT = """# All methods on one small task

`python benchmarks/methods.py` makes this page. SmolLM2-135M-Instruct learns the demo's schema (a shop's message becomes
one JSON object): {steps} steps of {rows} examples, the same batches in the same order for all, AdamW without decay, one
seed, float32, one thread. Methods for linears are on {sites} of all 30 layers. The score is the mean loss
of 24 held-out answers, and how many of them greedy decoding gives word for word.

![Loss against trained parameters]({plot})

| method | trained | rate | CPU s a step | kept for backward | adapter, gradient, Adam | held-out loss | right of 24 |
|---|---:|---:|---:|---:|---:|---:|---:|
{base}
{table}
{missing}
*Kept for backward*: the activations that autograd holds after one forward of a batch, each storage counted once, without
parameters.

## What this shows, and what it does not

- That every method trains from the same call, what a step of each costs here, and what it holds.
- It does not rank the methods. {steps} steps are far from convergence: what moves fast is ahead, and a method whose paper
  trains for thousands of steps is not shown at its best. One seed, one task, one model of 135M parameters, one budget.
- Rates are not tuned. LoRA has the demo's, {rate:g}; the others have a multiple of it that is usual for them (ten times for
  VeRA, (IA)³, RoAd and FourierFT, say), or the same. Another rate can turn the order around.
- Sizes are the methods' defaults, with rank 8 where a rank is like LoRA's; they do not train equally many parameters.
- Seconds are of a shared machine; those of FRoD, AdaMSS, Poly, cartridge, multitask prompt tuning and CPT were measured
  beside much other load, and compare with the others' least. Methods that make a new weight in every step pay about the
  same for a batch of any size, so they look dearer here than with long sequences.
- CPT has two of the training examples before its eyes in every call, and the logits of all tokens are made for its loss.
"""


def row(name: str, one: Mapping[str, Any]) -> str:
    mib = [f"{one[key] / 2**20:,.1f} MiB" for key in ("activations", "states")]
    cells = [
        name,
        f"{one['parameters']:,}",
        f"{one['rate']:g}",
        f"{one['cpu']:.2f}",
        *mib,
        f"{one['loss']:.3f}",
        str(one["right"]),
    ]
    return f"| {' | '.join(cells)} |"


def plot(figures: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Held-out loss against trained parameters."""
    try:
        import matplotlib
        from adjustText import adjust_text
    except ImportError:
        raise SystemExit('The plot needs matplotlib and adjustText: pip install "peftc[bench]"') from None

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=110)
    points = {name: one for name, one in figures.items() if name != "base"}
    axes.axhline(figures["base"]["loss"], color="0.6", linestyle="--", linewidth=1)
    axes.annotate(
        "the base",
        (0.995, figures["base"]["loss"]),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color="0.4",
    )
    virtual = {name for name in points if isinstance(METHODS[name].spec, peftc.PromptSpec) or name == "CPT"}
    for group, colour, label in (
        (points.keys() - virtual, "tab:blue", "weights"),
        (virtual, "tab:orange", "virtual tokens"),
    ):
        xs, ys = ([points[name][key] for name in group] for key in ("parameters", "loss"))
        axes.scatter(xs, ys, s=22, color=colour, label=label, zorder=3)
    axes.set(
        xscale="log", yscale="log", xlabel="trained parameters", ylabel=f"loss of held-out answers after {STEPS} steps"
    )
    axes.minorticks_off()
    axes.set_yticks(LOSSES, [f"{loss:g}" for loss in LOSSES])
    axes.grid(alpha=0.3)
    axes.margins(x=0.1)
    names = [axes.text(one["parameters"], one["loss"], name, fontsize=7.5) for name, one in points.items()]
    adjust_text(names, ax=axes, arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5})
    axes.legend(loc="center right", frameon=False)
    figure.tight_layout()
    figure.savefig(file)


def known() -> dict[str, dict[str, Any]]:
    """What was measured before."""
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def main(
    only: Annotated[str, typer.Option(help="Names, with commas between them; default: all.")] = "",
    missing: Annotated[bool, typer.Option(help="Those that were not measured so far.")] = False,
    measured: Annotated[
        bool, typer.Option(help="Measure; else the page is made of the figures that are there.")
    ] = True,
) -> None:
    """Measure the methods, and write the page and the plot."""
    names = [name.strip() for name in only.split(",") if name.strip()] or ["base", *METHODS]
    if missing:
        names = [name for name in names if name not in known()]
    if measured:
        base, tokenizer = smollm2.load_base(None), smollm2.load_tokenizer(None)
        for name in names:
            found = measure(base, tokenizer, METHODS.get(name))
            print(name, found, flush=True)
            FIGURES.write_text(json.dumps({**known(), name: found}, indent=1, ensure_ascii=False) + "\n")
    figures = {name: one for name, one in known().items() if name in ("base", *METHODS)}
    PAGE.write_text(page(figures))
    plot(figures, PLOT)


if __name__ == "__main__":
    typer.run(main)
