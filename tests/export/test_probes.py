"""Models that branch in Python: exports are right on other inputs than those traced, or refuse them, or are refused."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import peftc
from tests.support.adapters import perturb
from tests.support.programs import program_inputs, program_model


class Branching(nn.Module):
    """A linear, doubled on one side of a branch."""

    def __init__(self, branch: Any) -> None:
        super().__init__()
        self.linear, self.branch = nn.Linear(4, 4), branch

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if self.branch(x, mask) else y


def longer(x: Tensor, mask: Tensor) -> bool:
    return x.shape[1] > 4


def below(x: Tensor, mask: Tensor) -> bool:
    return x.shape[1] < 100


def even(x: Tensor, mask: Tensor) -> bool:
    return x.shape[1] % 2 == 0


def one_row(x: Tensor, mask: Tensor) -> bool:
    return x.shape[0] == 1


def product(x: Tensor, mask: Tensor) -> bool:
    return x.shape[0] * x.shape[1] > 15


def square(x: Tensor, mask: Tensor) -> bool:
    return x.shape[0] == x.shape[1]


def three_rows(x: Tensor, mask: Tensor) -> bool:
    return len(x) in [3]


def no_padding(x: Tensor, mask: Tensor) -> bool:
    """As masks are left out where nothing is padded; a trace takes that side."""
    return torch.compiler.is_exporting() or bool(mask.all())


def never(x: Tensor, mask: Tensor) -> bool:
    return False


BRANCHES: dict[Any, str] = {
    longer: r"x\.size\(1\) > 4",
    below: r"x\.size\(1\) < 100",
    even: r"x\.size\(1\) % 2\) == 0",
    one_row: "of sizes that are 1 or not",
    product: r"x\.size\(1\)\*x\.size\(0\) > 15",
    square: r"x\.size\(0\) != x\.size\(1\)",
    three_rows: r"x\.size\(0\) == 3",
    no_padding: "of values",
}
# What no guard tells, so no runtime refuses it.
UNGUARDED = (one_row, no_padding)


def made(branch: Any) -> Any:
    torch.manual_seed(0)
    return perturb(peftc.compile(Branching(branch), peftc.LoraConfig(r=2, target_modules=["linear"])))


def inputs(rows: int = 3, length: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, length, 4), "mask": torch.ones(rows, length, dtype=torch.bool)}


@pytest.mark.parametrize("adapters", ["merged", "inputs"])
@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.__name__)
def test_onnx_of_a_branch_is_refused(branch: Any, adapters: Any, tmp_path: Path) -> None:
    with pytest.raises(peftc.ExportError, match=f"gives other outputs.*{BRANCHES[branch]}"):
        made(branch).export(tmp_path / "out", "onnx", adapters=adapters, inputs=inputs())
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.__name__)
def test_pt2_of_a_branch_refuses_the_other_side_or_is_refused(branch: Any, tmp_path: Path) -> None:
    model = made(branch)
    if branch in UNGUARDED:
        with pytest.raises(peftc.ExportError, match=f"gives other outputs.*{BRANCHES[branch]}"):
            model.export(tmp_path, "pt2", inputs=inputs())
        return
    certificate = model.export(tmp_path, "pt2", inputs=inputs())
    assert certificate.compared
    assert certificate.refused
    assert "which it refuses" in str(certificate)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (1, 2, 3):
        for length in (1, 3, 4, 5, 16, 100):
            given = inputs(rows, length)
            try:
                found = program(**given)
            except (AssertionError, RuntimeError):
                continue
            torch.testing.assert_close(found, model.eval()(**given), rtol=1e-4, atol=1e-5)
    assert peftc.verify(tmp_path) == certificate


@pytest.mark.slow
@pytest.mark.parametrize("branch", [longer, one_row, no_padding], ids=lambda branch: branch.__name__)
def test_a_compiled_program_which_checks_nothing_is_refused(branch: Any, tmp_path: Path) -> None:
    with pytest.raises(peftc.ExportError, match=BRANCHES[branch]):
        made(branch).export(tmp_path / "out", "aoti", inputs=inputs())


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ["merged", "inputs"])
def test_the_ways_out_are_some(adapters: Any, tmp_path: Path) -> None:
    certificate = made(longer).export(tmp_path / "fixed", "onnx", adapters=adapters, inputs=inputs(), sizes="fixed")
    assert certificate.difference <= 1e-5 * certificate.scale
    session = onnxruntime.InferenceSession(str(tmp_path / "fixed" / "model.onnx"))
    assert session.get_inputs()[0].shape == [3, 8, 4]
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="invalid dimensions"):
        session.run(None, {name: value.numpy() for name, value in inputs(3, 3).items()})
    made(longer).export(tmp_path / "pt2", "pt2", adapters=adapters, inputs=inputs())
    bare = made(never).export(tmp_path / "bare", "onnx", adapters=adapters, inputs=inputs())
    assert len(bare.compared) > 10
    assert not bare.refused
    assert "so they are for" in str(bare)


def test_fixed_sizes_are_for_programs(tmp_path: Path) -> None:
    for how in ({"to": "pt2", "sizes": "fixed", "generation": True}, {"to": "pt2", "sizes": "any"}):
        with pytest.raises(peftc.ExportError, match="valid are open, fixed; fixed is for programs"):
            made(never).export(tmp_path / "out", **how)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_an_unrolled_loop_goes_with_fixed_sizes(to: Any, tmp_path: Path) -> None:
    model = program_model("mamba")
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(r=2, target_modules="all-linear")))
    given = program_inputs("mamba", model, labels=False)
    with pytest.raises(peftc.ExportError, match=r"other lengths.*sizes='fixed' writes it for inputs of these sizes"):
        compiled.export(tmp_path / "open", to, inputs=given)
    certificate = compiled.export(tmp_path / "fixed", to, inputs=given, sizes="fixed")
    assert certificate.difference <= 1e-5 * certificate.scale
    assert peftc.verify(tmp_path / "fixed").difference <= 1e-5 * certificate.scale


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bart", "vit", "mixtral"])
def test_families_run_on_other_sizes_one_row_and_padding(kind: str, to: Any, tmp_path: Path) -> None:
    model = program_model(kind)
    compiled = perturb(peftc.compile(model, peftc.LoraConfig(r=2, target_modules="all-linear")))
    certificate = compiled.export(tmp_path, to, inputs=program_inputs(kind, model, labels=False))
    first = next(iter(program_inputs(kind, model)))
    rows = {int(text.split(",")[0].removeprefix(f"{first} ").split("×")[0]) for text in certificate.compared}
    assert {1, 3} <= rows
    assert not certificate.refused
