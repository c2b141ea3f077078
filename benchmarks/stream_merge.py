"""Merging an adapter into a checkpoint on disk under a memory limit, against `cp` of the same files.

    python benchmarks/stream_merge.py [--gib 8] [--limit-gib 2] [--rounds 5] [--folder /a/disk]

Every run is a process of its own in a memory cgroup of that limit (version 1 or 2; needs root). The page cache is dropped
before each. The time of a merge is that of the call (without imports) until everything is on the disk (fsync); `cp` leaves
that to the kernel, so `cp` and `sync` stands beside it. peft loads, merges and saves.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.timing import ratio

SHARD = 1 << 30
TARGETS = {"q_proj, v_proj": ("q", "v"), "all linear": ("q", "k", "v", "o", "gate", "up", "down")}
COLD = """
import os, sys, time, torch
from transformers import LlamaForCausalLM
if os.geteuid() == 0:
    open("/proc/sys/vm/drop_caches", "w").write("3")
"""
MERGE = """
import peftc
start = time.perf_counter()
peftc.merge_checkpoint(*sys.argv[1:4], undo=len(sys.argv) > 4, progress=False)
print(time.perf_counter() - start)
"""
PEFT = """
from peft import PeftModel
start = time.perf_counter()
model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2], low_cpu_mem_usage=True).merge_and_unload().save_pretrained(sys.argv[3])
print(time.perf_counter() - start)
"""


def make_base(folder: Path, gib: float) -> None:
    """A Llama of about `gib` GiB in bfloat16, its layers as large as those of an 8B model, in shards of 1 GiB."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, vocab_size=32000)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    per_layer = 2 * (4096 * (4096 + 1024) * 2 + 3 * 4096 * 14336)
    config.num_hidden_layers = max(1, round((gib * 2**30 - 4 * 32000 * 4096) / per_layer))
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    noise = torch.randn(2**26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in model.state_dict().items():
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        at = len(name) * 1009
        shards[-1][name] = noise.repeat(-(-(tensor.numel() + at) // noise.numel()))[at : at + tensor.numel()].view(
            tensor.shape
        )
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(folder: Path, base: Path, targets: tuple[str, ...], r: int = 16) -> None:
    """LoRA on `targets` of every layer, as PEFT saves it."""
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    shapes |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}
    generator, tensors = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for layer in range(layers):
        for name in targets:
            module = "self_attn" if name in "qkvo" else "mlp"
            key = f"base_model.model.model.layers.{layer}.{module}.{name}_proj"
            inner, outer = shapes[name]
            tensors[f"{key}.lora_A.weight"] = torch.randn(r, inner, generator=generator) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(outer, r, generator=generator) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 32}
    config["target_modules"] = [f"{name}_proj" for name in targets]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def cgroup(limit: int) -> Path | None:
    """A new memory cgroup with this limit in bytes, or None where that is not possible."""
    root = Path("/sys/fs/cgroup")
    for parent, setting in ((root / "memory", "memory.limit_in_bytes"), (root, "memory.max")):
        try:
            group = parent / "peftc-benchmark"
            group.mkdir(exist_ok=True)
            (group / setting).write_text(str(limit))
            return group
        except OSError:
            continue
    return None


def run(command: list[str], group: Path | None, folder: Path) -> dict[str, Any]:
    """Run a process (in the cgroup) that writes `folder`, with cold caches: its seconds, peak RSS, exit status."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    start = time.perf_counter()
    process = subprocess.Popen(command, preexec_fn=enter, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    seconds = float(out) if status == 0 and out.strip() else wall
    return {
        "seconds": seconds,
        "wall": wall,
        "rss": usage.ru_maxrss * 1024,
        "status": os.waitstatus_to_exitcode(status),
    }


def contenders(base: Path, adapters: dict[str, Path], out: Path) -> dict[str, list[str]]:
    merge = [sys.executable, "-c", f"import peftc{COLD}{MERGE}", str(base)]
    commands = {f"merge, {name}": [*merge, str(folder), str(out)] for name, folder in adapters.items()}
    commands["merge, all linear, undo"] = [*merge, str(adapters["all linear"]), str(out), "undo"]
    return {
        "cp": ["cp", "-r", str(base), str(out)],
        "cp + sync": ["sh", "-c", f"cp -r {base} {out} && sync -f {out}"],
        **commands,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--limit-gib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("stream_merge.tmp"))
    arguments = parser.parse_args()
    root = arguments.folder.absolute()
    group = cgroup(int(arguments.limit_gib * 2**30))
    limit = f"{arguments.limit_gib:g} GiB" if group is not None else "none (cgroups need root)"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; memory limit {limit}")
    try:
        sizes = [size for size in (1.0, 2.0, 4.0) if size < arguments.gib] + [arguments.gib]
        for size in sizes:
            shutil.rmtree(root, ignore_errors=True)
            base = root / "base"
            make_base(base, size)
            adapters = {name: root / f"adapter{i}" for i, name in enumerate(TARGETS)}
            for name, folder in adapters.items():
                make_adapter(folder, base, TARGETS[name])
            total = sum(file.stat().st_size for file in base.iterdir()) / 2**30
            commands = contenders(base, adapters, root / "out")
            if size < sizes[-1]:
                found = run(commands["merge, all linear"], group, root / "out")
                print(
                    f"{total:.2f} GiB: merge, all linear: {found['seconds']:.1f} s, peak RSS {found['rss'] / 2**20:.0f} MiB"
                )
                continue
            report(total, commands, group, root, arguments.rounds)
            peft = [
                sys.executable,
                "-c",
                f"import peft{COLD}{PEFT}",
                str(base),
                str(adapters["all linear"]),
                str(root / "out"),
            ]
            for label, own in (("no limit", None), (f"limit {limit}", group)):
                found = run(peft, own, root / "out")
                told = f"{found['seconds']:.1f} s" if found["status"] == 0 else f"killed ({found['status']})"
                print(f"  peft, all linear, {label}: {told}, peak RSS {found['rss'] / 2**20:.0f} MiB")
    finally:
        shutil.rmtree(root, ignore_errors=True)
        if group is not None:
            group.rmdir()


def report(total: float, commands: dict[str, list[str]], group: Path | None, root: Path, rounds: int) -> None:
    """Interleaved rounds of all `commands`, and their ratios to `cp`."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    rss: dict[str, float] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            found = run(command, group, root / "out")
            if found["status"] != 0:
                raise SystemExit(f"{name}: exit status {found['status']}")
            seconds[name].append(found["seconds"])
            rss[name] = max(rss.get(name, 0), found["rss"])
    print(f"{total:.2f} GiB, {rounds} rounds:")
    for name in commands:
        middle = statistics.median(seconds[name])
        print(
            f"  {name}: {middle:.1f} s ({total / middle:.2f} GiB/s), {ratio(seconds, name, 'cp')} of cp,"
            f" {ratio(seconds, name, 'cp + sync')} of cp + sync; peak RSS {rss[name] / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
