"""LoRA on a model that several GPUs hold together: fully_shard, checkpoints to go on from, and a merged model at the end.

    torchrun --nproc-per-node 8 examples/train_fsdp2.py --model meta-llama/Llama-3.1-70B --data text.txt --out out
    torchrun --nproc-per-node 2 examples/train_fsdp2.py --out out        # a tiny random Llama on two CPU processes

Started again with the same --out, it goes on from the last checkpoint, on any number of processes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import peftc

ADAPTERS = StateDictOptions(ignore_frozen_params=True)  # The base is not in checkpoints.


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a Hub id; default: a tiny random Llama")
    parser.add_argument("--data", type=Path, help="a text file; default: random tokens")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4, help="sequences of each process in a step")
    parser.add_argument("--length", type=int, default=128)
    return parser.parse_args()


def config_of(name: str | None) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**sizes, vocab_size=256) if name is None else AutoConfig.from_pretrained(name)


def sharded_model(name: str | None, device: torch.device) -> Any:
    """A model in bfloat16, sharded. The first process reads it into the CPU's memory, and gives each its part."""
    first, state, buffers = dist.get_rank() == 0, {}, {}
    if first and name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    else:
        torch.manual_seed(0)
        with torch.device("cpu" if first else "meta"):
            model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    if first:
        state, buffers = model.state_dict(), dict(model.named_buffers())
        model.to("meta")
        model.tie_weights()
    # Every layer is gathered for its own call, what is around the layers for the whole one.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device=device)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for key, buffer in model.named_buffers():  # Those of the positions are in no state dict.
        dist.broadcast(buffer.copy_(buffers[key]) if first else buffer, 0)
    return model


def batches(options: argparse.Namespace, device: torch.device, first: int) -> Iterator[torch.Tensor]:
    """The token ids of this process for each step from `first` on."""
    tokens = torch.randint(0, 256, (100_000,), generator=torch.Generator().manual_seed(0)) // 64
    if options.data is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokens = torch.tensor(tokenizer(options.data.read_text())["input_ids"])
    for step in range(first, options.steps):
        place = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        starts = torch.randint(0, len(tokens) - options.length, (options.rows,), generator=place)
        yield torch.stack([tokens[start : start + options.length] for start in starts.tolist()]).to(device)


def save_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Adapters and the optimizer's state: each process writes what it has."""
    adapters, states = get_state_dict(model, optimizer, options=ADAPTERS)
    dcp.save({"model": adapters, "optimizer": states, "step": step}, checkpoint_id=folder / f"step-{step}")


def last_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Read the last whole checkpoint in `folder`, if there is one; the step to go on with."""
    whole = [path.parent for path in folder.glob("step-*/.metadata")]  # Written last.
    if not whole:
        return 0
    adapters, states = get_state_dict(model, optimizer, options=ADAPTERS)
    state = {"model": adapters, "optimizer": states, "step": 0}
    dcp.load(state, checkpoint_id=max(whole, key=lambda path: int(path.name.removeprefix("step-"))))
    found = StateDictOptions(strict=False)  # The base stays as it is.
    set_state_dict(model, optimizer, model_state_dict=adapters, optim_state_dict=states, options=found)
    return state["step"]


def save_merged(folder: Path, model: peftc.CompiledModel) -> None:
    """Merge, each process its own shards, and write a model for `from_pretrained`; no process ever has all of it."""
    plain: Any = model.merge_and_unload()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    dcp.save(plain.state_dict(), storage_writer=writer)
    if dist.get_rank() == 0:
        plain.config.save_pretrained(folder)


def main() -> None:
    options = arguments()
    gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpus else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    torch.set_num_threads(1 if not gpus else torch.get_num_threads())

    spec = peftc.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    compiled = peftc.compile(sharded_model(options.model, device), spec, inplace=True)
    compiled.train()
    optimizer = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=1e-3)

    first = last_checkpoint(options.out / "checkpoints", compiled, optimizer)
    for step, ids in enumerate(batches(options, device, first), first + 1):
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(compiled.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step:4d}  loss {mean.item() / dist.get_world_size():.4f}", flush=True)
        if step % options.save_every == 0:
            save_checkpoint(options.out / "checkpoints", compiled, optimizer, step)

    compiled.save_pretrained(options.out / "adapter", is_main_process=dist.get_rank() == 0)  # PEFT's files, whole
    save_merged(options.out / "merged", compiled)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
