"""Follow every error that names an extra: install what it says, and do the same again. By hand, before a release.

    python tools/extras.py            # needs `make package` before, what `make test` installs, and a network

Each extra gets an environment in which all of this one can be seen, but for the extra's own packages and peftc, which is
installed from the wheel in dist/.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEFORE = """
import torch, transformers, peftc
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
def lora(**more): return peftc.compile(model, peftc.LoraConfig(r=2), **more)
"""
CALLS = {
    "undo": "lora(inplace=True).merge_adapter(undo='residual')",
    "export": "lora().export('onnx', to='onnx'); lora().export('gguf', to='gguf')",
    "wavelets": "peftc.compile(model, peftc.WaveFTConfig(target_modules=['q_proj'], n_frequency=8, wavelet_family='sym4'))"
    "(torch.ones(1, 4, dtype=torch.long))",
    "adamss": "peftc.compile(model, peftc.AdamssConfig(target_modules=['q_proj']))",
    "demo": "from peftc.demo.smollm2 import load_base; load_base(None)",
}


def brought(extra: str) -> set[str]:
    """The files and folders in site-packages of the packages that an extra brings."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    packages = [re.split(r"[\[><=]", line)[0] for line in lines]
    return {file.parts[0] for package in packages for file in distribution(package).files or ()}


def environment(folder: Path, extra: str, wheel: Path) -> Path:
    """The Python of an environment without an extra's packages."""
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    there, without = {path.name for path in site.iterdir()}, brought(extra)
    for path in (path for place in sys.path if place.endswith("site-packages") for path in Path(place).iterdir()):
        # Not what leads to other places either.
        if path.name not in there | without and "peftc" not in path.name and path.suffix != ".pth":
            there.add(path.name)
            (site / path.name).symlink_to(path)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return python


def followed(extra: str, wheel: Path, folder: Path) -> str:
    """What came of it."""
    python = environment(folder / "venv", extra, wheel)
    command = [python, "-c", BEFORE + CALLS[extra]]
    first = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    told = re.search(rf"pip install 'peftc\[{extra}\]'", first.stderr)
    if first.returncode == 0:
        return "works without it"
    if told is None:
        return f"is not named: {first.stderr.strip().splitlines()[-1]}"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{wheel}[{extra}]"], check=True)
    second = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return "works" if second.returncode == 0 else f"fails: {second.stderr.strip().splitlines()[-1]}"


def main() -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    results: dict[str, str] = {}
    for extra in sys.argv[1:] or CALLS:
        with tempfile.TemporaryDirectory() as folder:
            results[extra] = followed(extra, wheel, Path(folder))
        print(f"peftc[{extra}]: {results[extra]}", flush=True)
    raise SystemExit(any(told != "works" for told in results.values()))


if __name__ == "__main__":
    main()
