"""`python -m peftc`: the command `peftc`."""

from peftc.cli import main

if __name__ == "__main__":
    main()
