"""Killing a process (kill -9) at a chosen moment of its dealings with files."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Whatever changes a file or a folder, as peftc and the standard library below it call them.
_CHANGES = ("pwrite", "write", "copy_file_range", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate")


def changes_made(action: Callable[[], object], count_in: Path) -> int:
    """How many times `action` changes files."""
    pid = os.fork()
    if pid == 0:
        made = _watched(lambda _: None)
        _run(action)
        count_in.write_text(str(made()))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return int(count_in.read_text())


def kill_at(moment: int, action: Callable[[], object]) -> bool:
    """Run `action` in a process that dies before its change number `moment` if that is even, after it if it is odd.

    Whether it came so far.
    """

    def die(done: int) -> None:
        if done == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        _watched(die)
        action()

    status = os.waitpid(started(watched), 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def finish(action: Callable[[], object]) -> None:
    """Run `action` in a process of its own, so that the one that forks never has threads that are just ending."""
    assert os.waitpid(started(action), 0)[1] == 0


def started(action: Callable[[], object]) -> int:
    """The id of a new process that runs `action`. It exits with 3 if that raises, and is ended after two minutes."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        _run(action)
        os._exit(0)
    return pid


def _run(action: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    try:
        action()
    except BaseException:
        os._exit(3)


def _watched(look: Callable[[int], None]) -> Callable[[], int]:
    """Call `look` around every change: with 2·n before the one of number n, with 2·n + 1 after it. What counts them."""
    lock, counted = threading.Lock(), [0]

    def watch(real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with lock:
                number = counted[0]
                counted[0] += 1
                look(2 * number)
            try:
                return real(*args, **kwargs)
            finally:
                look(2 * number + 1)

        return watched

    for name in _CHANGES:
        setattr(os, name, watch(getattr(os, name)))
    return lambda: counted[0]
