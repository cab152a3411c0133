"""Processes that read files, and what of the machine they may use."""

import math
import mmap
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.cli import UserError, user_error

START = "fork" if sys.platform == "linux" else "spawn"  # spawn imports torch in each worker
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # the limit of memory, what is used of it, and for what, in versions 2 and 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_cores() -> int:
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, its address space and its cgroup."""
    limits = [psutil.virtual_memory().available]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - psutil.Process().memory_info().vms)
    for names in CGROUP_FILES:
        with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
            most, used, stat = ((CGROUP / name).read_text() for name in names)
            cached = re.search(r"\binactive_file (\d+)", stat)  # of files, given up when needed
            limits.append(int(most) - int(used) + (int(cached[1]) if cached else 0))
    return max(0, min(limits))


def shared_memory(shape: Sequence[int]) -> Tensor:
    """uint8 memory into which workers can write."""
    if START != "fork":
        return torch.empty(shape, dtype=torch.uint8).share_memory_()
    with user_error("no memory for decoded images (%s); use --stream", OSError):
        memory = mmap.mmap(-1, math.prod(shape))  # /dev/shm is small in containers
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


def load_files(
    read: Callable[[Any], Any], files: Sequence[Any], batches: Sequence[Any], num_workers: int
) -> Iterator[list[Any]]:
    """`[read(files[row]) for row in batch]` of each batch, in order, by `num_workers` processes.

    Errors of `read`, such as MemoryError, are raised here. A UserError if a worker died.
    """
    loader: DataLoader = DataLoader(
        files,  # type: ignore[arg-type]  # a list is what a Dataset has to be
        batch_sampler=batches,
        collate_fn=partial(_read_each, read),
        num_workers=num_workers,
        multiprocessing_context=START if num_workers else None,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # it would take a number from PyTorch's global one
    )
    before = signal.getsignal(signal.SIGCHLD)
    iterator: Any = iter(loader)
    # PyTorch's handler would raise inside a training step, whose state could then not be saved.
    # Without it, the iterator notices a dead worker within five seconds.
    signal.signal(signal.SIGCHLD, before)
    try:
        yield from iterator
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise UserError(
            f"a process that reads images died ({error}); if memory ran out use fewer "
            "--num_workers (0: none)"
        ) from error
    finally:
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()  # it ignores SIGTERM, so Python would wait for it at exit


def _read_each(read: Callable[[str], Any], files: list[str]) -> list[Any]:
    return [read(file) for file in files]


def _ignore_signals(_: int) -> None:
    """Leave signals to the main process, which saves and stops its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
