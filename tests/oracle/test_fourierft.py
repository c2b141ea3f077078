"""FourierFT against peft: outputs, gradients, files both ways, merging, the same places of coefficients."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftc
from tests.support.methods import LINEARS, ROWS, Linears, compare

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zeros": {"init_weights": True},
    "fields": {"scaling": 7.0, "random_loc_seed": 3, "bias": "fourier_only"},
    "pattern": {"n_frequency_pattern": {"l": 3, "n": 40}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_files(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {"n_frequency": 20, "scaling": 30.0, "target_modules": LINEARS, **VARIANTS[variant]}
    _, ours = compare(Linears(), ROWS, peft.FourierFTConfig(**fields), tmp_path, within=5e-6, moved=0.5)
    counts = {"l": 3, "c": 20, "n": 40} if variant == "pattern" else dict.fromkeys(LINEARS, 20)
    assert {edit.site: edit.params[0].shape for edit in ours.plan.edits} == {k: (n,) for k, n in counts.items()}


def test_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.FourierFTConfig(n_frequency=20, scaling=30.0, target_modules=LINEARS)
    compare(Linears().bfloat16(), ROWS.bfloat16(), config, tmp_path, within=1e-5, merged=4e-2, moved=0.5)


def test_a_fresh_one_of_zeros_is_the_base_and_another_is_not() -> None:
    net = Linears().requires_grad_(False)
    fields = {"n_frequency": 20, "target_modules": LINEARS}
    with torch.no_grad():
        assert torch.equal(peftc.compile(net, peftc.FourierFTConfig(**fields, init_weights=True))(ROWS), net(ROWS))
        assert not torch.equal(peftc.compile(net, peftc.FourierFTConfig(**fields))(ROWS), net(ROWS))


def test_what_does_not_fit_is_refused_or_told() -> None:
    with pytest.raises(peftc.NoMatchError, match="its weight has 48 entries, fewer than n_frequency=49"):
        peftc.compile(Linears(), peftc.FourierFTConfig(n_frequency=49, target_modules=["l"]))
    pattern = {"q": 3}
    with pytest.raises(peftc.NoMatchError, match=r"n_frequency_pattern: 'q' matches none of the 1 adapted sites"):
        peftc.compile(
            Linears(), peftc.FourierFTConfig(n_frequency=9, target_modules=["l"], n_frequency_pattern=pattern)
        )
