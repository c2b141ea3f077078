"""`import peftc` costs nothing, and any module may be the first that is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import peftc

ROOT = Path(peftc.__file__).parent
MODULES = sorted(
    ".".join(["peftc", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    for file in ROOT.rglob("*.py")
    if file.stem != "__main__"
)
# Each module in a process of its own, which has what others have brought, but nothing of peftc.
EACH_FIRST = """
import os, sys, traceback
import networkx, pydantic, safetensors.torch, torch, torch.fx, transformers, yaml
for name in sys.argv[1:]:
    if os.fork() == 0:
        try:
            __import__(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        print(name)
"""


def python(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_importing_peftc_imports_no_torch() -> None:
    assert (
        python("import peftc, sys; print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))") == "[]\n"
    )


def test_compiling_imports_nothing_slow_beside_torch_and_pydantic() -> None:
    slow = {"networkx", "transformers", "jinja2", "onnx", "gguf", "sklearn", "pywt", "peftc.view.page"}
    script = (
        "import peftc, sys; from torch import nn;"
        " peftc.compile(nn.Sequential(nn.Linear(4, 4)), peftc.LoraConfig(target_modules=['0'], r=2));"
        f" print(sorted({slow} & set(sys.modules)))"
    )
    assert python(script) == "[]\n"


def test_plan_is_the_function_whatever_is_imported_first() -> None:
    first = "from peftc.plan import Plan; import peftc.plan.make; import peftc; "
    assert python(first + "print(peftc.plan.__module__, Plan is peftc.Plan)") == "peftc.api True\n"
    assert python("import peftc.plan as it; print(it.__module__)") == "peftc.api\n"
    assert python("from peftc import plan; import peftc.plan.make, peftc; print(peftc.plan is plan)") == "True\n"


def test_all_names_are_there_and_no_other() -> None:
    assert python("from peftc import *; print(compile.__module__, LoraConfig if 'LoraConfig' in dir() else '')") == (
        "peftc.api \n"
    )
    assert {getattr(peftc, name).__module__.partition(".")[0] for name in peftc.__all__} == {"peftc"}
    with pytest.raises(AttributeError, match="no attribute 'compiles'"):
        _ = peftc.compiles
    with pytest.raises(AttributeError, match="no attribute 'NoSuchConfig'"):
        _ = peftc.NoSuchConfig


@pytest.mark.slow
def test_every_module_can_be_imported_first() -> None:
    assert len(MODULES) > 100
    assert python(EACH_FIRST, *MODULES) == ""
