"""The model changes after it was compiled: followed, or refused at once, never dropped in silence."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftc
from tests.support.adapters import lora, perturb
from tests.support.models import tiny

IDS = torch.tensor([[5, 6, 7, 8]])


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    return tiny("llama", **config)


SPECS = {
    "head": lora("lm_head"),
    "embedding": lora("embed_tokens"),
    "saved head": lora("q_proj", modules_to_save=["lm_head"]),
    "saved embedding": lora("q_proj", modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", SPECS)
def test_resizing_an_adapted_vocabulary_is_refused_and_the_advice_holds(kind: str, tied: bool) -> None:
    compiled = perturb(peftc.compile(llama(tie_word_embeddings=tied), SPECS[kind]))
    want, size = compiled(IDS).logits, compiled.config.vocab_size
    with pytest.raises(peftc.AdapterError, match=r"can't be resized now. Resize the model first"):
        compiled.resize_token_embeddings(size + 6, mean_resizing=False)
    assert torch.equal(compiled(IDS).logits, want)
    assert compiled.config.vocab_size == size
    model = llama(tie_word_embeddings=tied)
    model.resize_token_embeddings(size + 6, mean_resizing=False)
    assert peftc.compile(model, SPECS[kind])(torch.tensor([[5, size + 2]])).logits.shape[-1] == size + 6


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_no_adapter_touches_grows(tied: bool) -> None:
    compiled = perturb(peftc.compile(llama(tie_word_embeddings=tied), lora("q_proj")))
    want, size = compiled(IDS).logits, compiled.config.vocab_size
    compiled.resize_token_embeddings(size + 6, mean_resizing=False)
    torch.testing.assert_close(compiled(IDS).logits[..., :size], want)
    y = compiled(torch.tensor([[5, size + 2]])).logits
    with compiled.merged():
        torch.testing.assert_close(compiled(torch.tensor([[5, size + 2]])).logits, y)
    compiled.set_adapter([])
    compiled.unload()


class Wraps(nn.Module):
    """A wrapper as users write them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.layers = nn.Linear(4, 4), nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.a(x)


@pytest.mark.parametrize("place", ["a", "layers.0", "layers.0.0", "layers"])
def test_exchanging_a_module_that_adapters_are_on_is_refused(place: str) -> None:
    compiled, x = perturb(peftc.compile(Net(), lora("a", "0", "0.0"))), torch.randn(2, 4)
    y = compiled(x)
    parent, _, name = f"base.{place}".rpartition(".")
    with pytest.raises(peftc.AdapterError, match="adapters are on it, and would be lost"):
        setattr(compiled.get_submodule(parent), name, nn.Linear(4, 4))
    assert torch.equal(compiled(x), y)
    base = compiled.unload()
    setattr(base.get_submodule(parent.removeprefix("base").removeprefix(".")), name, nn.Identity())  # The advice.


@pytest.mark.parametrize("place", ["a", "layers.0", "layers.0.0"])
def test_a_module_that_is_wrapped_keeps_its_adapters(place: str) -> None:
    compiled, x = perturb(peftc.compile(Net(), lora("a", "0", "0.0"))), torch.randn(2, 4)
    y = compiled(x)
    parent, _, name = f"base.{place}".rpartition(".")
    holder = compiled.get_submodule(parent)
    setattr(holder, name, Wraps(holder.get_submodule(name)))
    assert torch.equal(compiled(x), y)
    with compiled.merged():
        torch.testing.assert_close(compiled(x), y)


def test_other_modules_may_be_exchanged() -> None:
    compiled, x = perturb(peftc.compile(Net(), lora("a"))), torch.randn(2, 4)
    compiled.base.layers[1] = nn.Identity()
    compiled.base.layers.append(nn.Tanh())
    assert compiled(x).shape == (2, 4)
