"""Methods on linears whose weight can't be read: what they add is what they add to the same weight in the open."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftc


class Quantised(nn.Module):
    """A linear of another library: integers with a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.qweight: Tensor
        self.register_buffer("qweight", (linear.weight / 0.01).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight.to(x.dtype) * 0.01)


SPECS: dict[str, peftc.AdapterSpec] = {
    "AdaLoRA": peftc.AdaLoraConfig(total_step=10, init_r=3, target_modules=["0"]),
    "VeRA": peftc.VeraConfig(r=3, target_modules=["0"]),
    "RandLoRA": peftc.RandLoraConfig(r=3, target_modules=["0"]),
    "VB-LoRA": peftc.VBLoRAConfig(num_vectors=5, vector_length=2, target_modules=["0"]),
    "FourierFT": peftc.FourierFTConfig(n_frequency=9, target_modules=["0"]),
}


@pytest.mark.parametrize("method", SPECS)
def test_the_change_is_the_same(method: str) -> None:
    torch.manual_seed(0)
    quantised = Quantised(nn.Linear(8, 6, bias=False))
    plain = nn.Linear(8, 6, bias=False)
    plain.weight.data = quantised.qweight * 0.01
    x = torch.randn(3, 8)
    ours = peftc.compile(nn.Sequential(quantised), SPECS[method])
    other = peftc.compile(nn.Sequential(plain), SPECS[method])
    state: dict[str, Any] = ours.adapter_state_dict()
    with torch.no_grad():
        for key, value in other.adapter_state_dict().items():
            if value.is_floating_point():
                value += 0.3 * torch.randn(value.shape)
                state[key].copy_(value)
    assert not torch.allclose(other(x), plain(x), atol=1e-3)
    torch.testing.assert_close(ours(x), other(x))


@pytest.mark.parametrize(
    "spec", [peftc.ShiraConfig(r=1, target_modules=["0"]), peftc.LNTuningConfig(target_modules=["0"])]
)
def test_those_that_need_the_weight_say_so(spec: Any) -> None:
    with pytest.raises(peftc.PeftcError, match="weight"):
        peftc.compile(nn.Sequential(Quantised(nn.Linear(8, 6))), spec)
