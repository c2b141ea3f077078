"""Merging: fold adapters into the weights, and take them out again bit for bit."""

from peftc.merge.merge import Undo, forget, merge, unmerge

__all__ = ["Undo", "forget", "merge", "unmerge"]
