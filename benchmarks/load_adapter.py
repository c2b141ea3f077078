"""Loading the 16th LoRA adapter into 80 layers × 7 targets, against peft with `low_cpu_mem_usage=True`.

    python benchmarks/load_adapter.py

The layers are narrow, so what is timed is what a load does around the tensors: planning, attaching, checking names. The
limit is reading the file. CPU seconds of one thread; each round loads into both libraries, and the adapter is deleted
untimed.
"""

import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from benchmarks.timing import median_ms, paired, ratio

LAYERS, LOADED, ROUNDS = 80, 15, 15
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    return LlamaForCausalLM(config).eval()


def write_adapters(root: Path) -> None:
    """One adapter as peft writes it, and one as peftc does, with a manifest and the base's fingerprint."""
    config = peft.LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(make_model(), config).save_pretrained(root / "peft")
    peftc.load(make_model(), root / "peft").save_pretrained(root / "peftc")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_adapters(root)
        theirs: Any = peft.PeftModel.from_pretrained(make_model(), root / "peft", "a0", low_cpu_mem_usage=True)
        ours = peftc.load(make_model(), root / "peft", "a0")
        for number in range(1, LOADED):
            theirs.load_adapter(root / "peft", f"a{number}", low_cpu_mem_usage=True)
            ours.load_adapter(root / "peft", f"a{number}")
        assert_equal_outputs(theirs, ours, root)
        file = root / "peftc" / "adapter_model.safetensors"
        contenders: dict[str, Callable[[], object]] = {
            "peft": lambda: theirs.load_adapter(root / "peft", "new", low_cpu_mem_usage=True),
            "peftc": lambda: ours.load_adapter(root / "peft", "new"),
            "peftc, verified": lambda: ours.load_adapter(root / "peftc", "new"),
            "reading the file": file.read_bytes,
        }
        after = {
            "peft": lambda: theirs.delete_adapter("new"),
            "peftc": lambda: ours.delete_adapter("new"),
            "peftc, verified": lambda: ours.delete_adapter("new"),
        }
        seconds = paired(contenders, ROUNDS, after=after)
    print(f"torch {torch.__version__}, peft {peft.__version__}; {LAYERS} layers × {len(TARGETS)}, {ROUNDS} rounds")
    for label, values in seconds.items():
        print(f"{label:>18}: {median_ms(values)}, {ratio(seconds, label, 'peft')} of peft")
    print(f"bar: 0.055; 1/{statistics.median(seconds['peft']) / statistics.median(seconds['peftc']):.0f} here")


def assert_equal_outputs(theirs: Any, ours: peftc.CompiledModel, root: Path) -> None:
    """Both compute the same with the adapter that was loaded last."""
    theirs.load_adapter(root / "peft", "new", low_cpu_mem_usage=True)
    ours.load_adapter(root / "peftc", "new")
    theirs.set_adapter("new")
    ours.set_adapter("new")
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    for model in (theirs, ours):
        model.set_adapter("a0")
        model.delete_adapter("new")


if __name__ == "__main__":
    main()
