"""MLflow under load and in trouble: nothing lost, nothing doubled, no training held up."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.chaos.harness import Result
from tests.conftest import FIRST_START, environment
from tests.test_tracking_server import SERVER
from utils import replay, store

# A training that only logs: numbers, now and then a picture, at the end a table and a file. It
# prints its run id, how long the slowest call took, and how long the end.
LOGS = """
import sys, time
from pathlib import Path
from PIL import Image
from utils import outbox
from utils.tracking import Run
outbox.RETRY_SECONDS = 0.5
name, count, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
picture = Image.new("RGB", (64, 64), (200, 0, 0))
run = Run(Path(name), stage="gpt", experiment="chaos", config={"name": name})
print(run.run_id, flush=True)
slowest = 0.0
for step in range(count):
    started = time.monotonic()
    run.metrics("train", {"loss": step / 7, "rate": 1.0}, step)
    if step % 50 == 0:
        run.picture("pictures/samples", picture, step)
    slowest = max(slowest, time.monotonic() - started)
    time.sleep(pause)
run.table("pairs", {"name": ["a", "b"], "original": [picture, picture]})
run.tag("upstream", "none")
started = time.monotonic()
run.close()
print(slowest, time.monotonic() - started, flush=True)
"""
PATIENCE = 300


class Training:
    """A process of `LOGS` in the current folder."""

    def __init__(self, name: str, count: int, pause: float, address: str | None = None) -> None:
        where = {"MLFLOW_TRACKING_URI": address} if address else {}
        self.name, self.count = name, count
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOGS, name, str(count), str(pause)],
            env=environment(**where, MLFLOW_HTTP_REQUEST_TIMEOUT="2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.run_id = self.process.stdout.readline().strip()

    def end(self) -> tuple[float, float]:
        """Seconds of the slowest call and of the end."""
        out, error = self.process.communicate(timeout=PATIENCE)
        if self.process.returncode or "Traceback" in error:
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}: {error[-300:]}")
        slowest, end = map(float, out.split())
        return slowest, end


def run(count: int) -> Result:
    """Runs of `count` calls each; a quick round has two at once, a full one eight."""
    parallel, starts = (8, 20) if count >= 1000 else (2, 3)
    figures: dict[str, Any] = {}
    bad: Counter[str] = Counter()
    shutil.rmtree("store", ignore_errors=True)
    home = Path.cwd()
    for name, part in (
        ("first starts", lambda: _first_starts(starts)),
        ("at once", lambda: _at_once(parallel, count)),
        ("server", lambda: _server_killed(count)),
        ("black hole", _black_hole),
    ):
        folder = home / name.replace(" ", "-")
        folder.mkdir()
        with contextlib.chdir(folder):
            seen, wrong = part()
        figures |= seen
        bad.update(wrong)
    calls = parallel * count + 2 * count + starts
    detail = ", ".join(f"{name} {value}" for name, value in (figures | bad).items())
    return Result(calls, not bad.total() and figures["slowest call"] < 1, detail)
