"""What every test starts from: a seed, threads, no hub; and fixtures of more than one folder."""

import gc
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests fork, and the lists in which MKL keeps memory for threads that have just ended don't survive that.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
# As in the Makefile: threads that wait sleep, so that other work beside the tests does not slow them down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

SIDE_BY_SIDE = "PYTEST_XDIST_WORKER" in os.environ


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side the slow ones come first, so that no process is left alone with one at the end."""
    if SIDE_BY_SIDE:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not go through a million objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    # Where pytest runs as several processes side by side, they are the parallelism.
    torch.set_num_threads(1 if SIDE_BY_SIDE else 2)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process only. It meets in a file: a port may be taken, by a test in the next process too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    # The group's threads need Python's lock to let go of their last work, and its end waits for them with that lock held.
    time.sleep(0.05)
    torch.distributed.destroy_process_group()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
