"""Running peftc and peft side by side on the same weights."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftc

# Relative to the largest magnitude. One layer in float32; several in a row add their roundings up, and peft scales B's
# output where peftc scales A's, so those are compared in float64 as well, where an error of algebra could not hide.
TOLERANCE = 1e-6
SEVERAL_LAYERS = 4e-6
FLOAT64 = 1e-12


def randomise(compiled: peftc.CompiledModel, seed: int = 0) -> None:
    """Move every adapter tensor away from its start, so that nothing is compared with the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in compiled.peft_config:
            for key, tensor in compiled.adapter_state_dict(adapter).items():
                # What an adapter started from (lora_A0, lora_B0) is given, not learned.
                if tensor.is_floating_point() and not key.endswith("0"):
                    tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


def to_peft(compiled: peftc.CompiledModel, model: nn.Module, folder: Path) -> Any:
    """The same adapters in peft, from the files peftc writes; trainable, in eval mode."""
    compiled.save_pretrained(folder)
    first, *others = compiled.peft_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(
            copy.deepcopy(model), folder if first == "default" else folder / first, first, is_trainable=True
        )
        for name in others:
            theirs.load_adapter(folder / name, name, is_trainable=True)
    return theirs.eval()


def first_tensor(output: Any) -> Tensor:
    """The logits, or whatever comes first."""
    return output if isinstance(output, Tensor) else output[0]


def assert_close(ours: Tensor, theirs: Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    """Equal within `tolerance` of the largest magnitude."""
    scale = theirs.abs().max().clamp_min(1e-30)
    error = ((ours - theirs).abs().max() / scale).item()
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def assert_same_function(
    compiled: peftc.CompiledModel, theirs: Any, inputs: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Equal outputs, and equal gradients of every trained parameter for the same random cotangent."""
    mine, other = first_tensor(compiled(**inputs)), first_tensor(theirs(**inputs))
    assert_close(mine, other, "output", tolerance)
    cotangent = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3))
    (mine * cotangent).sum().backward()
    (other * cotangent).sum().backward()
    expected = {_plain(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name.removeprefix("base."): p.grad for name, p in compiled.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    # Relative to the largest gradient: a bias in front of a normalisation has none but rounding.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        error = float((gradient - expected[name]).abs().max()) / largest
        assert error <= tolerance, f"gradient of {name}: relative error {error:.2e}"


def _plain(name: str) -> str:
    """peft's parameter names without its wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
