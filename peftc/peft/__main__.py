"""`python -m peftc.peft script.py …` and `python -m peftc.peft -m module …`: run a program in which peft is peftc."""

import runpy
import sys
from pathlib import Path

from peftc.peft import install


def main() -> None:
    """Run what the arguments say."""
    arguments = sys.argv[1:]
    if not arguments or arguments == ["-m"]:
        sys.exit("usage: python -m peftc.peft script.py [arguments …], or python -m peftc.peft -m module [arguments …]")
    install()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
