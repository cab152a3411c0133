"""Results of benchmarks: JSON files that say where, when and by which command they were made."""

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

RESULTS = Path("benchmarks/results")
PACKAGES = ("torch", "torchvision", "numpy")


def write(name: str, results: object) -> Path:
    """Write benchmarks/results/`name`.json, under the current folder.

    Args:
        name: of the benchmark.
        results: what it found, in plain types.

    Returns:
        The file.
    """
    content = {"command": _command(), **circumstances(), "results": results}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def merge(name: str, rows: dict[str, dict[str, object]]) -> Path:
    """Put rows into benchmarks/results/`name`.json, each with its circumstances; others stay.

    Args:
        name: of the benchmark.
        rows: what it found, in plain types, by the row's name.

    Returns:
        The file.
    """
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    new = {row: found | {"command": _command()} | circumstances() for row, found in rows.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(before | new, indent=2) + "\n", encoding="utf-8")
    return path


def circumstances() -> dict[str, object]:
    """When, from which commit and where something was measured."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }


def machine() -> dict[str, object]:
    """What the figures depend on: processor, its cores, threads in use, memory, GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": gpu,
    }


def _command() -> str:
    """As one types it in the repository, whatever its path on this machine and that of its data."""
    parts = [part for part in Path(sys.argv[0]).with_suffix("").parts if part != "__main__"]
    words = [str(Path(*Path(x).parts[-2:])) if Path(x).is_absolute() else x for x in sys.argv[1:]]
    return shlex.join(["python", "-m", ".".join(parts[-2:]), *words])


def _commit() -> str:
    """The commit of this file, marked where the files differ from it; "" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    """The processor's name, which only Linux tells in full."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
