"""Tests of several processes, all of which run one function; and what they compare with a process alone."""

import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

# Their server imports once what they all need.
_PRELOADED = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama",
    "peftc",
]


def run(function: Callable[..., None], *args: Any, folder: Path, world: int = 2) -> None:
    """Call `function(rank, folder, *args)` in `world` processes of one group, on one seed. Raises what the first raises."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.multiprocessing.set_forkserver_preload([function.__module__, *_PRELOADED])
    start: Any = torch.multiprocessing.start_processes
    start(_process, (function, world, folder, args), nprocs=world, start_method="forkserver")


def _process(rank: int, function: Callable[..., None], world: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # What launchers set.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    # They meet in a file: a port may be taken, by a test in the next process too. Who waits in vain says so soon.
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{function.__name__}.group",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    function(rank, folder, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def llama(**fields: Any) -> LlamaForCausalLM:
    """A Llama whose sizes can be halved, the same in every process."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **fields})).eval()


def parallel(model: Any) -> Any:
    """A Llama cut over two processes, as torch's tutorial has it, the head with its outputs gathered."""
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for number in range(len(model.model.layers)):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"model.layers.{number}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.{number}.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def batch(step: int, rank: int | None = None, rows: int = 4) -> dict[str, Tensor]:
    """The batch of a step: all of it, or this rank's half."""
    ids = torch.randint(1, 64, (rows, 12), generator=torch.Generator().manual_seed(100 + step))
    mine = ids if rank is None else ids.chunk(2)[rank]
    return {"input_ids": mine, "labels": mine}


def train(
    call: Any, parameters: Any, steps: Sequence[int], rank: int | None = None, halves: bool = False
) -> list[float]:
    """Train on the batches of `steps`; the losses of the whole batches. `rank`: this process has a part of each.

    `halves`: each half by itself, and the mean of their gradients, which is what two processes compute, rounding and all.
    """
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.2, momentum=0.9)
    losses: list[float] = []
    for step in steps:
        loss = torch.zeros(())
        for part in (0, 1) if halves else (rank,):
            own = call(**batch(step, part)).loss / (2 if halves else 1)
            own.backward()
            loss = loss + own.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.detach()) if rank is not None else loss.item())
    return losses


def mean(value: Tensor) -> float:
    """The mean of a number over all processes."""
    total = value.clone()
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()


def full(tensor: Any) -> Tensor:
    """The whole of a tensor that may be sharded."""
    value = tensor.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def close(found: Any, expected: Any, near: float = 1e-5) -> None:
    """Numbers or tensors are equal to within `near`."""
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=near, rtol=near)
