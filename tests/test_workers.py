"""Files are read by processes in order; one that dies or hangs is named, and nothing waits on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from utils.cli import UserError
from utils.data import workers
from utils.data.workers import read_batches

FILES = [f"{number}.png" for number in range(40)]


def read(file: str) -> str:
    """What each process does with a file; some files are fatal."""
    if file == "17.png" and os.environ.get("FATE") == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if file == "17.png" and os.environ.get("FATE") == "starves":
        raise MemoryError
    if file == "17.png" and os.environ.get("FATE") == "hangs":
        os.kill(os.getpid(), signal.SIGSTOP)
    return file.upper()


def all_read(num_workers: int) -> list[str]:
    pieces = [range(40)[start : start + 3] for start in range(0, 40, 3)]
    found = read_batches(read, FILES, pieces, num_workers, lambda row: f"row {row + 1}")
    return [result for results in found for result in results]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_in_order(num_workers: int) -> None:
    assert all_read(num_workers) == [file.upper() for file in FILES]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_process_that_dies_is_named_with_its_row(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended in a BrokenProcessPool that named no file."""
    monkeypatch.setenv("FATE", "dies")
    with pytest.raises(UserError, match=r"^a process that reads images died at row 18; .*num_work"):
        all_read(num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_out_of_memory_arrives_as_that(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATE", "starves")
    with pytest.raises(MemoryError):
        all_read(num_workers)


def test_a_process_that_hangs_is_named_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was waited for without end."""
    monkeypatch.setenv("FATE", "hangs")
    monkeypatch.setattr(workers, "PATIENCE", 0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match="took more than 0 s at row 18;"):
        all_read(2)
    assert time.monotonic() - started < 10


WORKING = """
import os, sys, time
from utils.data.workers import read_batches

def read(file):
    return os.getpid()

if __name__ == "__main__":
    batches = read_batches(read, ["a"], [[0]] * 9, 1, str)
    sys.stdout.write(f"{next(batches)[0]}")
    sys.stdout.flush()
    time.sleep(60)
"""


def test_they_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """After kill -9 of a training they would have stayed for ever."""
    root = Path(__file__).resolve().parents[1]
    (tmp_path / "work.py").write_text(WORKING)
    with subprocess.Popen(
        [sys.executable, "work.py"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as parent:
        worker = psutil.Process(int(os.read(parent.stdout.fileno(), 20)))
        assert worker.is_running()
        worker.send_signal(signal.SIGTERM)  # what a scheduler sends to all processes
        time.sleep(0.2)
        assert worker.status() != psutil.STATUS_ZOMBIE
        parent.kill()
    until = time.monotonic() + 10
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)
