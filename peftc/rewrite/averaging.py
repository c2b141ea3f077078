"""Gradients of adapters that came to a model which FSDP2 had sharded: it knows them not, so they are averaged here.

FSDP2 takes no parameters into a group that is there. Adapters that are added afterwards are whole in every process, as
small as they are, and at the end of each backward pass their gradients become the mean over all processes, as FSDP2's do.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peftc.rewrite.sharding import add_up, own


class Averaging:
    """What averages the gradients of these parameters over `mesh`, as long as it is not stopped.

    Once more for what is averaged already changes nothing, so gradients may accumulate over several passes.
    """

    def __init__(self, mesh: Any, parameters: Iterable[Tensor]) -> None:
        self.mesh, self.parameters, self.task = mesh, list(parameters), -1
        self.handles = [p.register_post_accumulate_grad_hook(self._accumulated) for p in self.parameters]

    def stop(self) -> None:
        """Leave the parameters alone from now on."""
        for handle in self.handles:
            handle.remove()

    def _accumulated(self, _: Tensor) -> None:
        """Once in each backward pass, let the averaging follow it. (One that failed leaves nothing queued.)"""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task = task
            engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore
            engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """One message for each dtype. A process whose batch did not reach a parameter takes part with zeros; what none
        has reached stays without a gradient.
        """
        for dtype in dict.fromkeys(parameter.dtype for parameter in self.parameters):
            mine = [parameter for parameter in self.parameters if parameter.dtype == dtype]
            reached = [float(parameter.grad is not None) for parameter in mine]
            for parameter in mine:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grads = [own(parameter.grad) for parameter in mine if parameter.grad is not None]
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), grads[0].new_tensor(reached)])
            add_up(flat, self.mesh)
            *totals, counts = flat.split([*(grad.numel() for grad in grads), len(mine)])
            for parameter, grad, total, count in zip(mine, grads, totals, counts.tolist(), strict=True):
                grad.copy_(total.view_as(grad) / self.mesh.size())
                parameter.grad = parameter.grad if count else None
