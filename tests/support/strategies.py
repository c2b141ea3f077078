"""Random sites with random specs: a module of any kind in any dtype and layout, and inputs for it."""

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftc

laws = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

KINDS = ("linear", "transposed", "embedding", "conv1d", "conv2d", "conv3d")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Wrapped(nn.Module):
    """A model of one site, `inner.site`, and a scale around it."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"site": site})
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["site"](x) * self.gain


@dataclass(frozen=True)
class Case:
    """A model, a spec for it, an input, and how to run it."""

    model: nn.Module
    spec: peftc.AdapterSpec
    x: Tensor
    capture: Any

    def compile(self, **options: Any) -> peftc.CompiledModel:
        """The case compiled, its adapter moved away from its start."""
        compiled = peftc.compile(self.model, self.spec, capture=self.capture, **options)
        with torch.no_grad():
            for tensor in compiled.adapter_state_dict().values():
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) * 0.5)
        return compiled


def _module(kind: str, draw: Any, fan_in: int, fan_out: int) -> tuple[nn.Module, Tensor]:
    bias = draw(st.booleans())
    if kind == "linear":
        return nn.Linear(fan_in, fan_out, bias=bias), torch.randn(3, 2, fan_in)
    if kind == "transposed":
        return Conv1D(fan_out, fan_in), torch.randn(3, 2, fan_in)
    if kind == "embedding":
        return nn.Embedding(fan_in, fan_out), torch.randint(0, fan_in, (3, 4))
    cls = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[kind]
    dimensions = int(kind[4])
    options = {
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding_mode": draw(st.sampled_from(["zeros", "circular"])),
    }
    return cls(fan_in, fan_out, draw(st.integers(1, 2)), bias=bias, **options), torch.randn(
        2, fan_in, *[5] * dimensions
    )


@st.composite
def cases(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES, methods: tuple[str, ...] = ("LORA", "IA3")) -> Case:
    """A random case; everything random in it follows from the seed it draws."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    method = draw(st.sampled_from(methods))
    kind = draw(st.sampled_from([k for k in KINDS if method == "LORA" or k != "embedding"]))
    module, x = _module(kind, draw, draw(st.integers(2, 9)), draw(st.integers(2, 9)))
    dtype = draw(st.sampled_from(dtypes))
    model = Wrapped(module).to(dtype).eval()
    if method == "LORA":
        spec: peftc.AdapterSpec = peftc.LoraConfig(
            r=draw(st.integers(1, 4)),
            lora_alpha=draw(st.floats(0.5, 16)),
            use_rslora=draw(st.booleans()),
            target_modules=["site"],
        )
    else:
        feedforward = ["site"] if draw(st.booleans()) else []
        spec = peftc.IA3Config(target_modules=["site"], feedforward_modules=feedforward)
    capture = draw(st.sampled_from(["modules", "symbolic"]))
    return Case(model, spec, x.to(dtype) if x.is_floating_point() else x, capture)
