"""Merging: fold adapters into the weights, and take them out again bit for bit."""

from peftc.merge.fold import forget, merge, unmerge

__all__ = ["forget", "merge", "unmerge"]
