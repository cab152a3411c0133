"""Processes that decode images: their order, their end, and what happens when one dies."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from utils.cli import UserError
from utils.data.workers import load_files

FILES = [f"{number}.png" for number in range(40)]


def read(file: str) -> str:
    """What each worker does with a file; some files are fatal."""
    if file == "17.png" and os.environ.get("FATE") == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if file == "17.png" and os.environ.get("FATE") == "starves":
        raise MemoryError
    return file.upper()


def read_all(num_workers: int) -> list[str]:
    pieces = [range(40)[start : start + 3] for start in range(0, 40, 3)]
    return [x for batch in load_files(read, FILES, pieces, num_workers) for x in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_in_order_and_leave_random_numbers_alone(num_workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert read_all(num_workers) == [file.upper() for file in FILES]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_out_of_memory_in_a_worker(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATE", "starves")
    with pytest.raises(MemoryError):
        read_all(num_workers)


def test_a_worker_that_dies_between_two_batches_is_noticed_at_the_next() -> None:
    """PyTorch raised it inside the training step, whose state was lost."""
    before = {child.pid for child in multiprocessing.active_children()}
    pieces = [[0]] * 40
    batches = load_files(read, FILES, pieces, 1)
    next(batches)
    (worker,) = (x for x in multiprocessing.active_children() if x.pid not in before)
    worker.kill()
    worker.join(10)
    time.sleep(0.1)  # a training step
    with pytest.raises(UserError, match="images died"):
        list(batches)


def test_a_worker_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    other = multiprocessing.Process(target=time.sleep, args=(60,))
    other.start()
    monkeypatch.setenv("FATE", "dies")
    with pytest.raises(UserError, match=r"^a process that reads images died .*num_workers"):
        read_all(1)
    assert other.is_alive()  # only workers of these files are killed
    other.kill()
    other.join()


def test_a_reader_that_ends_early_leaves_no_worker() -> None:
    """They ignore SIGTERM, so Python waited for them at exit."""
    before = {child.pid for child in multiprocessing.active_children()}
    batches = load_files(read, FILES, [[0]] * 40, 2)
    next(batches)
    batches.close()
    assert {child.pid for child in multiprocessing.active_children()} <= before


WORKING = """
import os, sys, time
from utils.data.workers import load_files

def read(file):
    return os.getpid()

batches = load_files(read, ["a"], [[0]] * 9, 1)
sys.stdout.write(f"{next(batches)[0]}")
sys.stdout.flush()
time.sleep(60)
"""


def test_workers_ignore_signals_and_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORKING)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with subprocess.Popen(
        [sys.executable, "work.py"], stdout=subprocess.PIPE, env=environment
    ) as parent:
        worker = psutil.Process(int(os.read(parent.stdout.fileno(), 20)))
        worker.send_signal(signal.SIGTERM)  # a scheduler sends it to all processes
        time.sleep(0.2)
        assert worker.status() != psutil.STATUS_ZOMBIE
        parent.kill()
    until = time.monotonic() + 120
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)
