"""Letting `import peft` mean peftc's: one copy of everything, metadata, and a refusal where it comes too late."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(code: str, *how: str) -> str:
    done = subprocess.run(
        [sys.executable, *how, *(() if how else ("-c", code))],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_every_way_of_importing_gives_one_copy() -> None:
    code = """
import peftc.peft
peftc.peft.install()
peftc.peft.install()
import peft, importlib.metadata
import peft.tuners.lora.layer as layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper as one
from peft.utils import ModulesToSaveWrapper as other
from peft import *
assert peft is peftc.peft and layer.LoraLayer is LoraLayer is peft.tuners.lora.LoraLayer
assert issubclass(LoraLayer, BaseTunerLayer) and one is other and PeftModel is peft.peft_model.PeftModel
assert importlib.metadata.version("peft") == peft.__version__ == "0.21.2"
assert importlib.metadata.metadata("peft")["Name"] == "peft"
assert [d.metadata["Name"] for d in importlib.metadata.distributions() if d.metadata["Name"] == "peft"]
from transformers.utils import is_peft_available
assert is_peft_available()
print("fine")
"""
    assert run(code) == "fine"


@pytest.mark.slow
def test_uninstalling_gives_the_package_back() -> None:
    code = """
import peftc.peft
peftc.peft.install()
import peft.tuners.lora
peftc.peft.uninstall()
import peft, peft.tuners.lora
assert peft is not peftc.peft and peft.tuners.lora.LoraLayer is not peftc.peft.LoraModel
print(peft.__file__.endswith("peft/__init__.py"))
"""
    assert run(code) == "True"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("import peft", "peft is imported already"),
        # Where there is no peft, what has looked for it remembers that.
        ("import accelerate", "accelerate is imported already, and has found no peft"),
    ],
    ids=["imported", "looked for"],
)
def test_too_late_is_refused_and_the_advice_holds(first: str, said: str, tmp_path: Path) -> None:
    late = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "peft" else find(name, *more)
{first}
import peftc.peft
try:
    peftc.peft.install()
except peftc.PeftcError as error:
    print(error)
"""
    assert said in run(late)
    script = tmp_path / "script.py"
    script.write_text("import peft, sys\nprint(peft.__name__, sys.argv[1:], __name__)\n")
    assert run("", "-m", "peftc.peft", str(script), "a", "--b") == "peftc.peft ['a', '--b'] __main__"


def test_a_name_or_module_that_peft_has_not_is_an_error() -> None:
    code = """
import peftc.peft
peftc.peft.install()
import peft
try:
    peft.LoraConfg
except AttributeError as error:
    assert "LoraConfg" in str(error)
try:
    import peft.tuners.lara
except ModuleNotFoundError as error:
    assert "peft 0.21.2" in str(error)
try:
    peft.ShadowConfig(r=4)
except NotImplementedError as error:
    print(error)
"""
    assert "peftc has it not yet" in run(code)


def test_peftc_itself_stays_light() -> None:
    code = "import sys, peftc; print([m for m in sys.modules if m.startswith('peftc.peft') or m == 'transformers'])"
    assert run(code) == "[]"
    code = "import sys, peftc.peft; print('peftc.peft.models' in sys.modules, 'transformers' in sys.modules)"
    assert run(code) == "False False"
