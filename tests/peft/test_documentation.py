"""All code samples of PEFT's documentation run, word for word, with tiny models under the Hub's names."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
# What is left in the names of the samples at the end of each: class and trained parameters, or a shape. The numbers of
# token classification, sequence classification and GPT-2 are those that the documentation prints.
EXPECTED: dict[str, list[tuple[int, str, Any]]] = {
    "base_tuner.md": [(0, "model_peft", ["PeftModelForCausalLM", 0])],
    "configurations_and_models.md": [
        (3, "lora_model", ["PeftModelForCausalLM", 4096]),
        (5, "lora_model", ["PeftModelForCausalLM", 0]),
        (6, "lora_model", ["PeftModelForCausalLM", 2048]),
        (7, "lora_model", ["PeftModelForCausalLM", 0]),
    ],
    "models.md": [
        (2, "peft_model", ["PeftModelForSequenceClassification", 370178]),
        (3, "peft_model", ["PeftModelForTokenClassification", 370178]),
        (4, "peft_model", ["PeftModelForCausalLM", 1843200]),
        (5, "peft_model", ["PeftModelForSeq2SeqLM", 37632]),
        (6, "peft_model", ["PeftModelForQuestionAnswering", 591362]),
        (7, "peft_model", ["PeftModelForFeatureExtraction", 589824]),
        (8, "peft_model", ["PeftMixedModel", 2048]),
    ],
    "tuners.md": [
        (0, "lora_model", ["LoraModel", 37632]),
        (1, "lora_model", ["PeftModelForCausalLM", 2188]),
        (2, "merged_model", ["FalconForCausalLM", True]),
        (3, "prompt_encoder", [1, 20, 768]),
        (4, "prefix_encoder", [1, 20, 2 * 12 * 768]),
        (5, "prompt_embedding", [1, 20, 768]),
        (6, "ia3_model", ["IA3Model", 96]),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("document", EXPECTED)
def test_the_samples_run(document: str) -> None:
    command = [sys.executable, "-m", "peftc.peft", "-m", "tests.peft.run_samples", document]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert [(place, name, made[place].get(name)) for place, name, _ in EXPECTED[document]] == EXPECTED[document]
