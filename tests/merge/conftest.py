"""Merges work side by side, by as many threads as torch has, so they are tested with two."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads(_seed: None) -> None:
    torch.set_num_threads(2)
