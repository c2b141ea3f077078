"""examples/train_fsdp2.py as it is started: on two processes, and on one that goes on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import peftc

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def losses(folder: Path, processes: int, steps: int) -> dict[int, float]:
    """The loss of every step that the example takes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = ["--out", str(folder), "--steps", str(steps), "--save-every", "5"]
    done = subprocess.run(
        [*launcher, str(ROOT / "examples" / "train_fsdp2.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+)  loss ([\d.]+)", done.stdout)}


def test_it_learns_goes_on_and_leaves_a_merged_model(tmp_path: Path) -> None:
    first = losses(tmp_path, 2, 10)
    assert list(first) == list(range(1, 11))
    assert first[10] < first[1] - 0.4
    more = losses(tmp_path, 1, 12)
    assert list(more) == [11, 12]
    assert abs(more[11] - first[10]) < 0.1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    ids = torch.arange(4)[None]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(plain.config, dtype=torch.bfloat16)
    loaded = peftc.load(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, loaded(ids).logits, atol=0.02, rtol=0.02)
