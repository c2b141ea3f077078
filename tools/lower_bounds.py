"""Run tests with the oldest versions that pyproject.toml allows. By hand, before a release; downloads what they need.

    python tools/lower_bounds.py                  # all of them, in .venv-lower; torch is a large download
    python tools/lower_bounds.py --keep torch     # as it is installed here, with all that is not listed
    python tools/lower_bounds.py tests/specs      # other tests than those that run by default

What tests ask of transformers by name may be younger than its oldest version (a family, a fingerprint of its code, what a
layer of it is called), and what help and recordings look like is typer's and rich's: such a failure is no fault. Any other
is: mend it, or raise the bound. CONTRIBUTING.md has what the last run gave. On Linux the oldest torch is a build for CUDA
of some 3 GB, and needs all of it to be imported.
"""

import argparse
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINTERS = ("build", "import-linter", "pyright", "ruff", "setuptools")
TESTS = ["tests/specs", "tests/plan", "tests/merge", "tests/checkpoint", "tests/cli", "tests/laws"]


def oldest(keep: list[str]) -> list[str]:
    """The dependencies of peftc, each in the oldest version that is allowed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = [*project["dependencies"], *project["optional-dependencies"]["undo"]]
    pairs = [re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in given]
    unread = [line for line, pair in zip(given, pairs, strict=True) if pair is None]
    if unread:
        raise SystemExit(f"no lower bound: {', '.join(unread)}")
    return [f"{pair[1]}=={pair[2]}" for pair in pairs if pair is not None and pair[1] not in keep]


def tools() -> list[str]:
    """What tests need beside, in any version: the extras that `make test` installs for them, without the linters."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [line for line in (*extras["demo"], *extras["test"]) if re.split("[>=]", line)[0] not in LINTERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="append", default=[], help="take this package as it is installed here")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-lower")
    parser.add_argument("tests", nargs="*", default=TESTS)
    given = parser.parse_args()
    venv.create(given.folder, clear=True, with_pip=True)
    python = given.folder / "bin" / "python"
    if given.keep:
        # What is installed here comes after what is installed there.
        (site,) = given.folder.glob("lib/python*/site-packages")
        places = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
        (site / "here.pth").write_text("\n".join(places) + "\n")
    wanted = oldest(given.keep)
    print("installing", *wanted, flush=True)
    others = [] if given.keep else tools()
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted, *others], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", ROOT], check=True)
    raise SystemExit(subprocess.run([python, "-m", "pytest", "-m", "not slow", *given.tests], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
