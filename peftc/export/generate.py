"""Text from an exported model, with torch or onnxruntime, numpy and tokenizers: no code of the model, nothing of what
exported it.

    python generate.py "Once upon a time" --tokens 40
    python generate.py "Once upon a time" --temperature 0.8 --top-k 50 --top-p 0.9 --seed 1 --adapter name

Or `model = load(folder)`, and `for token in generate(model, encode(model, "Once")): …`.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Inputs = Mapping[str, Any]
# Inputs, caches (None at first) and an adapter's name to logits of the next token and the caches after it.
Run = Callable[[Inputs, Any, str | None], tuple[Any, Any]]


@dataclass(frozen=True)
class Model:
    """A loaded program: how to `run` it, what `generation.json` has `said` of it, and its tokenizer, if one lies beside."""

    run: Run
    said: Mapping[str, Any]
    tokenizer: Any


def load(folder: Path | str = Path(__file__).parent) -> Model:
    """Load the program in a folder; adapters beside it are loaded when they are first asked for."""
    folder = Path(folder)
    said: dict[str, Any] = json.loads((folder / "generation.json").read_text())
    file = folder / "tokenizer.json"
    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(file)) if file.exists() else None
    return Model((_onnx if said["to"] == "onnx" else _torch)(folder, said), said, tokenizer)


def generate(
    model: Model,
    ids: Sequence[int],
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    adapter: str | None = None,
) -> Iterator[int]:
    """The tokens that follow `ids`, one by one, until one of `stop` (by default the model's own), or `tokens` of them.

    `temperature` 0: the likeliest token. Else it is drawn, of the `top_k` likeliest (0: all), of the fewest likeliest that
    have `top_p` of the probability. `adapter`: one of those that lie beside the program; None: the base.
    Raises ValueError for what can't be.
    """
    said = model.said
    _require(said, ids, temperature, top_k, top_p, adapter)
    random, ends = np.random.default_rng(seed), frozenset(said["stop"] if stop is None else stop)
    known = [said["start"]] if said["start"] is not None else list(ids)
    # What the trace took for granted of lengths: what is too short has padding in front, which the mask hides.
    padding = max(0, said["shortest"] - len(known)) if said["start"] is None else 0
    known = [0] * padding + known
    fed, caches = 0, None
    for _ in range(tokens):
        if said["longest"] is not None and len(known) - padding > said["longest"]:
            return
        logits, caches = model.run(_inputs(said, ids, known, padding, fed), caches, adapter)
        token = choose(logits, temperature, top_k, top_p, random)
        if token in ends:
            return
        yield token
        fed = len(known) if said["caches"] else 0
        known.append(token)


def _require(
    said: Mapping[str, Any], ids: Sequence[int], temperature: float, top_k: int, top_p: float, adapter: str | None
) -> None:
    if not ids:
        raise ValueError("no token to start with")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: at least 0, at least 0, in (0, 1]")
    if adapter is not None and adapter not in said["adapters"]:
        raise ValueError(f"adapter={adapter!r}: there is {', '.join(said['adapters']) or 'none'} beside this program")


def _inputs(
    said: Mapping[str, Any], ids: Sequence[int], known: Sequence[int], padding: int, fed: int
) -> dict[str, Any]:
    """What the program is called with after `known` tokens, of which its caches have `fed`."""
    mask = [0] * padding + [1] * (len(known) - padding)
    positions = [max(at - padding, 0) for at in range(len(known))]
    if said["start"] is None:
        made = {"input_ids": known[fed:], "attention_mask": mask, "position_ids": positions[fed:]}
    else:
        made = {"input_ids": ids, "attention_mask": [1] * len(ids), "decoder_input_ids": known}
    return {name: np.asarray([made[name]], dtype=np.int64) for name in said["inputs"]}


def choose(logits: Any, temperature: float, top_k: int, top_p: float, random: np.random.Generator) -> int:
    """One token."""
    if temperature == 0:
        return int(logits.argmax())
    kept = probabilities(logits, temperature, top_k, top_p)
    return int(random.choice(len(kept), p=kept))


def probabilities(logits: Any, temperature: float, top_k: int, top_p: float) -> Any:
    """How likely each token is to be drawn."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    likely = np.exp(scaled[order] - scaled[order[0]])
    likely /= likely.sum()
    # The token that passes `top_p` is the last that stays.
    count = int(np.searchsorted(np.cumsum(likely), top_p)) + 1
    made = np.zeros(len(scaled))
    made[order[:count]] = likely[:count] / likely[:count].sum()
    return made


def _torch(folder: Path, said: Mapping[str, Any]) -> Run:
    torch: Any = import_module("torch")
    path = folder / said["file"]
    if said["to"] == "aoti":
        program: Any = import_module("torch._inductor").aoti_load_package(str(path))
    else:
        program = torch.export.load(path).module()

    def empty(sizes: Sequence[int], dtype: str) -> Any:
        return torch.zeros(sizes, dtype=getattr(torch, dtype))

    @functools.cache
    def factors(adapter: str | None) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if adapter is not None:
            own = import_module("safetensors.torch").load_file(folder / "adapters" / f"{adapter}.safetensors")
        return {name: own.get(name, empty(*what)) for name, what in said["factors"].items()}

    def run(inputs: Inputs, caches: Any, adapter: str | None) -> tuple[Any, Any]:
        if caches is None:
            caches = {name: empty(*what) for name, what in said["caches"].items()}
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        with torch.no_grad():
            made = program(**given, **caches, **factors(adapter))
        return made["logits"][0].numpy(), {name: made[f"next_{name}"] for name in caches}

    return run


def _onnx(folder: Path, said: Mapping[str, Any]) -> Run:
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # It warns of every input that has a default, which factors have on purpose.
    session = runtime.InferenceSession(str(folder / said["file"]), options, providers=["CPUExecutionProvider"])
    value, names = runtime.OrtValue.ortvalue_from_numpy, [output.name for output in session.get_outputs()]

    @functools.cache
    def active(adapter: str | None) -> tuple[Any, Any]:
        chosen = runtime.RunOptions()
        if adapter is None:
            return chosen, None
        own = runtime.LoraAdapter()
        own.Load(str(folder / "adapters" / f"{adapter}.onnx_adapter"))
        chosen.add_active_adapter(own)
        return chosen, own  # The options do not keep the adapter alive.

    def run(inputs: Inputs, caches: Any, adapter: str | None) -> tuple[Any, Any]:
        if caches is None:
            caches = {name: value(np.zeros(sizes, dtype=dtype)) for name, (sizes, dtype) in said["caches"].items()}
        given = {**{name: value(array) for name, array in inputs.items()}, **caches}
        made = session.run_with_ort_values(names, given, active(adapter)[0])
        found = dict(zip(names, made, strict=True))
        return found["logits"].numpy()[0], {name: found[f"next_{name}"] for name in caches}

    return run


def encode(model: Model, prompt: str, raw: bool = False) -> list[int]:
    """The tokens of a prompt; in the model's form for chats, if it has one, unless it is to be taken as it is."""
    if model.tokenizer is None:
        raise ValueError("no tokenizer.json lies beside the program: give tokens, or export with tokenizer=")
    chat = None if raw else model.said["chat"]
    text = prompt if chat is None else chat[0] + prompt + chat[1]
    return model.tokenizer.encode(text, add_special_tokens=chat is None).ids


def texts(model: Model, tokens: Iterator[int]) -> Iterator[str]:
    """Tokens as text, each piece as soon as its characters are whole."""
    found, said = list[int](), ""
    for token in tokens:
        found.append(token)
        text = model.tokenizer.decode(found)
        if not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    yield model.tokenizer.decode(found)[len(said) :]


def main() -> None:
    """Print what follows a prompt."""
    parser = argparse.ArgumentParser(description="Text from the exported model in this folder.")
    parser.add_argument("prompt", help="text; or tokens, 1,2,3, with --ids")
    parser.add_argument("--ids", action="store_true", help="the prompt is tokens, and so is what is printed")
    parser.add_argument("--raw", action="store_true", help="text as it is, not in the model's form for chats")
    parser.add_argument("--adapter", help="one of those beside the program; without it, the base")
    for name, kind, default in (("tokens", int, 64), ("temperature", float, 0.0), ("seed", int, 0)):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{default} by default")
    parser.add_argument("--top-k", type=int, default=0, help="of how many likeliest tokens one is drawn; 0: of all")
    parser.add_argument("--top-p", type=float, default=1.0, help="how much of the probability they have together")
    given = vars(parser.parse_args())
    prompt, as_ids, raw = given.pop("prompt"), given.pop("ids"), given.pop("raw")
    try:
        model = load()
        ids = [int(part) for part in prompt.replace(",", " ").split()] if as_ids else encode(model, prompt, raw)
        made = generate(model, ids, **given)
        for piece in (f"{token} " for token in made) if as_ids else texts(model, made):
            print(piece, end="", flush=True)
    except ValueError as error:
        parser.error(str(error))
    print()


if __name__ == "__main__":
    main()
