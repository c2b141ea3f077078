"""What transformers' tensor parallelism puts around the forward of a linear or an embedding, seen from outside.

It replaces the forward on the instance by a function that takes and gives tensors of one process, lays them out over the
mesh inside, and at inference lets each process compute with its own weights. Adapters of such a module work on its inputs
and outputs, as tensors laid out over the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftc.graph.hooked import parallel_style
from peftc.rewrite.sharding import is_sharded


@dataclass(frozen=True)
class Boundary:
    """Over which `mesh` a module's input and output lie, how, and how wide they are where their last dimension is cut."""

    mesh: Any
    takes: Any
    gives: Any
    inputs: int
    outputs: int

    def taken(self, x: Any) -> Any:
        """The input laid out."""
        return _laid_out(x, self.mesh, self.takes, self.inputs)

    def given(self, y: Any) -> Any:
        """The output laid out."""
        return _laid_out(y, self.mesh, self.gives, self.outputs)

    def local(self, y: Any) -> Any:
        """The output as the process has it."""
        return y.redistribute(placements=[self.gives]).to_local() if is_sharded(y) else y

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run(binding, x, …)` on tensors that are laid out."""

        def inside(binding: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            return self.local(run(binding, self.taken(x), *args, **kwargs))

        return inside


def boundary_of(module: nn.Module, patched: Any) -> Boundary | None:
    """What is around `module`, whose forward on the instance is or was `patched`; None if it is not tensor parallel."""
    found = parallel_style(patched)
    if found is None:
        return None
    from torch.distributed.tensor import Replicate

    style, mesh = found
    if isinstance(module, nn.Embedding):
        return Boundary(mesh, Replicate(), Replicate(), module.num_embeddings, module.embedding_dim)
    linear: Any = module
    return Boundary(mesh, style.input_layouts, style.output_layouts, linear.in_features, linear.out_features)


def _laid_out(tensor: Any, mesh: Any, placement: Any, width: int) -> Any:
    if not isinstance(tensor, Tensor) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    if not placement.is_shard():
        return DTensor.from_local(tensor, mesh, [placement], run_check=False)
    shape = torch.Size((*tensor.shape[:-1], width))
    stride = tensor.new_empty(shape, device="meta").stride()
    return DTensor.from_local(tensor, mesh, [placement], run_check=False, shape=shape, stride=stride)
