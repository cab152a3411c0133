"""A disk that is full at any point of a training, under its output folder or its MLflow store."""

import os
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

from tests.chaos.harness import Result
from tests.chaos.trainings import Process, command, logged, prepare, start
from utils.files import is_intact
from utils.training.checkpoint import checkpoints_in

STEP = 64 << 10  # bytes from one size of the disk to the next
SMALL = Path("small")


def run(count: int) -> Result:
    """Run trainings on disks of at most `count` sizes, from next to nothing to enough."""
    prepare()
    if not _mounts():
        return Result(0, None, "it takes root and the right to mount a tmpfs")
    script = "train_vqvae.py"
    process = start(command(script, "roomy"), forked=True)
    if not process.wait(600) or process.code:
        raise RuntimeError(f"{script} fails on a disk that is not full:\n{process.output}")
    enough = 2 * _bytes_in(Path("roomy")) + _bytes_in(checkpoints_in(Path("roomy"))[-1])
    store = Path("mlflow.db").stat().st_size
    problems, seen = [], Counter()
    sizes = range(STEP, enough + STEP, STEP)
    sizes = sizes[:: -max(1, len(sizes) // count)]  # the largest in any case
    for size in sizes:
        problems += _full_output(script, size, seen)
    for size in [store + STEP * n for n in range(-2, 2 + count // 8)]:
        problems += _full_store(script, size, seen)
    detail = (
        f"output folder on {len(sizes)} disks of {sizes[-1] >> 10} to {sizes[0] >> 10} KiB: "
        f"{seen['stopped']} stopped with one line and only whole checkpoints, {seen['ended']} "
        f"ended; MLflow store on {seen['stores']} disks: {seen['complete']} trainings ended with "
        f"complete metrics, {seen['refused']} were refused at the start"
    )
    return Result(len(sizes) + seen["stores"], not problems, "; ".join([detail, *problems[:3]]))


def _full_output(script: str, size: int, seen: Counter[str]) -> list[str]:
    """A training into a small disk, and once more into what is then full."""
    with _Disk(size):
        for _ in range(2):
            process = start(command(script, str(SMALL / "out")), forked=True)
            process.wait(600)
            faults = _line_faults(process)
            bad = [folder for folder in checkpoints_in(SMALL / "out") if not is_intact(folder)]
            faults += [f"{folder} cannot be read" for folder in bad]
            seen["ended" if process.code == 0 else "stopped"] += 1
            if faults:
                return [f"disk of {size >> 10} KiB: {fault}" for fault in faults]
    return []


def _full_store(script: str, size: int, seen: Counter[str]) -> list[str]:
    """A training whose MLflow store has a small disk."""
    output_dir = Path(f"store-{size}")
    seen["stores"] += 1
    with _Disk(size):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{(SMALL / 'mlflow.db').resolve()}"
        try:
            process = start(command(script, str(output_dir)), forked=True)
            process.wait(600)
        finally:
            del os.environ["MLFLOW_TRACKING_URI"]
    faults = _line_faults(process)
    if process.code == 0:
        seen["complete"] += 1
        if logged(output_dir) != logged(Path("roomy")):
            faults.append("metrics.jsonl is not complete")
    else:
        seen["refused"] += 1
        if output_dir.exists() and checkpoints_in(output_dir):
            faults.append("MLflow stopped a training that had begun")
    return [f"MLflow store of {size >> 10} KiB: {fault}" for fault in faults]


def _line_faults(process: Process) -> list[str]:
    """What is wrong with how a process ended: it must be code 0, or 2 with one line of error."""
    errors = [line for line in process.output.splitlines() if line.startswith("error: ")]
    if process.code not in (0, 2) or "Traceback" in process.output:
        return [f"exit code {process.code}: {process.output[-300:]!r}"]
    return [] if len(errors) == (process.code == 2) else [f"{len(errors)} lines of error"]


class _Disk:
    """A tmpfs of a given size at SMALL."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        SMALL.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(SMALL)]
        subprocess.run(words, check=True, capture_output=True)

    def __exit__(self, *error: object) -> None:
        for _ in range(50):
            if (
                subprocess.run(["umount", str(SMALL)], check=False, capture_output=True).returncode
                == 0
            ):
                return
            time.sleep(0.1)
        raise RuntimeError(f"cannot unmount {SMALL}")


def _mounts() -> bool:
    if shutil.which("mount") is None or os.geteuid() != 0:
        return False
    try:
        with _Disk(1 << 20):
            return True
    except subprocess.CalledProcessError:
        return False


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
