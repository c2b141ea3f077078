"""What a captured program costs: FLOPs as torch counts them, and the bytes of the model's tensors that it reads."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def flops(program: Any, inputs: dict[str, Tensor]) -> int:
    """Of a call."""
    # Torch's table lacks this one.
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        program(**inputs)
    return counter.get_total_flops()


def bytes_read(program: Any) -> int:
    """Of the base's tensors that the graph reads."""
    graph, state = program.graph_of(""), dict(program.base.named_parameters(remove_duplicate=False))
    names = {str(node.target).removeprefix("host.") for node in graph.nodes if node.op == "get_attr"}
    return sum({id(state[name]): state[name].nbytes for name in names if name in state}.values())
