"""Files read by processes of their own: one that dies or hangs is named with its file."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from itertools import islice
from typing import Any

from utils.cli import UserError, first_few

PATIENCE = 300.0  # seconds that a batch may take
AHEAD = 2  # batches that each process reads before they are asked for
IDLE = -1

# In a worker: (process id, row that it reads) of all workers, shared, and where its own are.
_state: tuple[Any, int] = ((), 0)


def read_batches(
    read: Callable[[str], Any],
    files: Sequence[str],
    batches: Sequence[Sequence[int]],
    num_workers: int,
    name: Callable[[int], str],
) -> Iterator[list[Any]]:
    """`[read(files[row]) for row in batch]` of each batch, in order.

    Args:
        read: what is done with a file; what it raises, as MemoryError, is raised here.
        files: by row.
        batches: rows that are wanted together.
        num_workers: processes; 0: this one reads them itself.
        name: what to call a row in a complaint.

    Raises:
        UserError: a process died or took longer than `PATIENCE`; says at which rows.
    """
    if num_workers == 0:
        for rows in batches:
            yield [read(files[row]) for row in rows]
        return
    shared = multiprocessing.Array("q", [0, IDLE] * num_workers)
    pool = ProcessPoolExecutor(num_workers, initializer=_begin, initargs=(shared, os.getpid()))
    rest = iter(batches)
    pending: deque[Future] = deque()

    def ask(count: int) -> None:
        for rows in islice(rest, count):
            pending.append(pool.submit(_read, read, rows, [files[row] for row in rows]))

    try:
        ask(AHEAD * num_workers)
        while pending:
            images = pending.popleft().result(timeout=PATIENCE)
            ask(1)
            yield images
    except (BrokenExecutor, TimeoutError) as error:
        died = isinstance(error, BrokenExecutor)
        rows = _end(list(shared), died)
        what = "died" if died else f"took more than {PATIENCE:.0f} s"
        where = first_few([name(row) for row in rows]) or "no file in particular"
        raise UserError(
            f"a process that reads images {what} at {where}; look at that file, or if memory ran "
            "out use fewer --num_workers (0: none)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end(shared: list[int], died: bool) -> list[int]:
    """Kill the workers; the rows that the dead ones (or, if none died, all of them) were at."""
    busy = {pid: row for pid, row in zip(shared[::2], shared[1::2], strict=True) if row != IDLE}
    until = time.monotonic() + 2  # what died is said to have before it is quite gone
    while True:
        alive = {child.pid: child for child in multiprocessing.active_children()}
        dead = busy.keys() - alive.keys()
        if not died or dead or time.monotonic() > until:
            break
        time.sleep(0.01)
    for pid in alive.keys() & set(shared[::2]):
        alive[pid].kill()
    return sorted(busy[pid] for pid in (dead if died else busy))


def _begin(shared: Any, parent: int) -> None:
    """Set up a worker: it ignores signals, and ends when its parent does."""
    global _state
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with shared.get_lock():
        place = list(shared[::2]).index(0) * 2
        shared[place] = os.getpid()
    _state = shared.get_obj(), place
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _read(read: Callable[[str], Any], rows: Sequence[int], files: Sequence[str]) -> list[Any]:
    shared, place = _state
    results = []
    for row, file in zip(rows, files, strict=True):
        shared[place + 1] = row
        results.append(read(file))
    shared[place + 1] = IDLE
    return results
