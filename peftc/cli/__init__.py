"""The command `peftc`: a thin line over each of the functions that people call from Python."""

from peftc.cli.app import app, main

__all__ = ["app", "main"]
