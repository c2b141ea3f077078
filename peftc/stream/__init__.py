"""Checkpoints on disk: adapters merged into them, and taken out, without the model in memory."""

from peftc.stream.merge import merge_checkpoint, unmerge_checkpoint

__all__ = ["merge_checkpoint", "unmerge_checkpoint"]
