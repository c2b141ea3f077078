"""One method held against peft: outputs, gradients, files both ways, merging, half precision."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftc
from tests.support.interchange import perturbed, quietly
from tests.support.methods import gradients as by_name


def config_of(name: str, fields: dict[str, Any]) -> Any:
    """peft's config `name`, without its remarks."""
    return quietly(getattr(peft, name), **fields)


def adapted(net: nn.Module, config: Any) -> Any:
    """`net` in peft, everything it trains moved away from its start."""
    torch.manual_seed(1)
    return perturbed(quietly(peft.get_peft_model, copy.deepcopy(net), config), 2)


def _itself(output: Tensor) -> Tensor:
    return output


def same_gradients(
    ours: Any,
    theirs: Any,
    x: Any,
    tolerance: float,
    without: tuple[str, ...] = (),
    of: Callable[[Any], Tensor] = _itself,
    apart: bool = False,
) -> None:
    """Hold the gradients of a sum of squares to each other, relative to the largest number of all, or `apart` of each.

    `of`: what is squared of an output. `without`: parts of the names of parameters that are not compared.
    """
    found: list[dict[str, Tensor]] = []
    for model in (ours, theirs):
        model.zero_grad()
        of(model(x)).float().square().sum().backward()
        found.append(by_name(model))
    own, expected = found
    assert own.keys() == expected.keys(), own.keys() ^ expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        if not any(part in name for part in without):
            near(own[name].float(), gradient.float(), tolerance, f"gradients of {name}", None if apart else largest)


def same_as_peft(
    net: nn.Module,
    config: Any,
    x: Any,
    folder: Path,
    tolerance: float = 1e-5,
    without: tuple[str, ...] = (),
) -> peftc.CompiledModel:
    """Hold what peft makes of `net`, trained, against what peftc makes of its files; and the way back.

    Differences are relative to the largest number. `without`: parts of the names of parameters whose gradients are not
    compared. Returns peftc's, loaded from peft's files.
    """
    model = adapted(net, config)
    quietly(model.save_pretrained, folder / "theirs")
    ours = peftc.load(net, folder / "theirs", is_trainable=True).eval()
    y = ours(x)
    assert not torch.allclose(y, net(x), rtol=1e-3, atol=1e-3), "the adapter changes nothing"
    near(y, model(x), tolerance, "outputs")
    same_gradients(ours, model, x, 10 * tolerance, without)
    ours.save_pretrained(folder / "ours")
    again = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(net), str(folder / "ours")).eval()
    near(again(x), model(x), tolerance, "outputs of peft, from files of peftc")
    _merges(ours, x, tolerance)
    return ours


def _merges(ours: peftc.CompiledModel, x: Any, tolerance: float) -> None:
    y, before = ours(x), {name: value.clone() for name, value in ours.state_dict().items()}
    with ours.merged():
        near(ours(x), y, 10 * tolerance, "outputs after merging")
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items()), "undone, but for bits"


def half_as_peft(
    net: nn.Module, config: Any, x: Tensor, folder: Path, tolerance: float = 2e-2, without: tuple[str, ...] = ()
) -> None:
    """The same outputs and gradients in bfloat16, within its rounding."""
    net = copy.deepcopy(net).bfloat16()
    x = x.bfloat16() if x.is_floating_point() else x
    model = adapted(net, config)
    quietly(model.save_pretrained, folder / "half")
    ours = peftc.load(net, folder / "half", is_trainable=True).eval()
    y = ours(x)
    assert y.dtype == torch.bfloat16
    near(y.float(), model(x).float(), tolerance, "bfloat16: outputs")
    same_gradients(ours, model, x, 2 * tolerance, without)


def near(ours: Tensor, theirs: Tensor, tolerance: float, what: str, largest: float | None = None) -> None:
    """Raise AssertionError if they differ by more than `tolerance` of the largest number."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    scale = largest or float(theirs.detach().abs().max()) or 1.0
    error = float((ours - theirs).detach().abs().max()) / scale
    kind = what.partition(" of ")[0]
    RECORDED[kind] = max(error, RECORDED.get(kind, 0.0))
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


# The largest difference so far, by what was compared.
RECORDED: dict[str, float] = {}
