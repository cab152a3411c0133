"""The real training scripts as processes of tiny trainings, and what must be the same at the end.

A process is started from the command line, or forked from this one, where the imports are done
already: the same script from its file as `__main__`, five seconds faster.
"""

import importlib
import json
import os
import re
import runpy
import signal
import sqlite3
import sys
import time
import traceback
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.chaos.harness import ROOT
from tests.conftest import write_images
from utils.data.indices import IndicesMeta, write_indices
from utils.data.sources import Row
from utils.training.checkpoint import checkpoints_in

STEPS = 60
COMMON = f"--max_steps {STEPS} --max_epochs 99 --evaluate_every 20 --checkpoint_every 5".split()
COMMON += ["--device", "cpu", "--ema_decay", "0.9", "--resume", "auto", "--experiment", "chaos"]
# All that a checkpoint can hold takes part: averages, an adversary, dropout, parts of a batch.
FLAGS = {
    "train_vqvae.py": "--path_to_data data/data.csv --horizontal_flip --num_workers 0 "
    "--quantizer ema --channels 8 --codebook_size 16 --codebook_dim 4 --batch_size 4 "
    "--accumulate 2 --random_crop --disc_weight 0.5 --disc_start 0.2 --disc_channels 4 "
    "--lecam_weight 0.01",
    "train.py": "--path_to_data indices --dim 16 --num_heads 2 --num_layers 1 --dropout 0.2 "
    "--batch_size 4 --patience 0 --precision bf16",
}
# What the clock and the machine say.
NOT_COMPARED = re.compile(r"time|run_id|system/.*|.*_per_second")
STORE = Path("mlflow.db")


def prepare() -> None:
    """Images and indices in the working folder, and the imports of the scripts."""
    for name in ("mlflow", "train", "train_vqvae"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    write_images(Path("data"))
    rows = [Row(f"{n}.png", "ab"[n % 2], "val" if n % 4 == 0 else "train") for n in range(40)]
    grids = torch.randint(0, 16, (40, 6, 10), generator=torch.Generator().manual_seed(0))
    write_indices("indices", grids, rows, IndicesMeta(16, (6, 10)))


def command(script: str, output_dir: str) -> list[str]:
    """The script and its flags."""
    return [str(ROOT / script), *FLAGS[script].split(), *COMMON, "--output_dir", output_dir]


@dataclass
class Process:
    """A script that runs, in a session of its own, with its output in a file.

    Attributes:
        pid: of it.
        log: where its output goes.
        code: its exit code, the negative number of the signal that ended it, or None.
    """

    pid: int
    log: Path
    code: int | None = field(default=None)

    def running(self) -> bool:
        """Whether it has not ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until it has ended. Has it?"""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.002)
        return not self.running()

    def kill(self) -> None:
        """kill -9, also of its children."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait(60)

    @property
    def output(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")


def start(words: list[str], *, forked: bool) -> Process:
    """Start a script, from the command line or as a fork of this process."""
    log = Path(f"log-{time.monotonic_ns()}.txt")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if not forked:
            os.execv(sys.executable, [sys.executable, *words])
        _run_here(words)
    while not log.exists():  # it has a session of its own by then
        time.sleep(0.001)
    return Process(pid, log)


def _run_here(words: list[str]) -> None:
    code = 1
    sys.argv = words
    sys.path.insert(0, str(ROOT))
    try:
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def logged(output_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without what the clock and the machine say."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: x for k, x in line.items() if not NOT_COMPARED.fullmatch(k)} for line in lines]
    return [line for line in kept if line.keys() - {"step"}]


def in_mlflow(output_dir: Path) -> list[tuple[str, int, float]]:
    """Every number that MLflow has of a training, without those, in order."""
    query = "select key, step, value from metrics where run_uuid = ? order by step, key"
    return [row for row in _ask(query, output_dir) if not NOT_COMPARED.fullmatch(row[0])]


def status_in_mlflow(output_dir: Path) -> str:
    """FINISHED, KILLED, ..."""
    return _ask("select status from runs where run_uuid = ?", output_dir)[0][0]


def _ask(query: str, output_dir: Path) -> list[tuple]:
    run_id = json.loads((output_dir / "status.json").read_text())["run_id"]
    with closing(sqlite3.connect(STORE)) as database:
        return database.execute(query, [run_id]).fetchall()


def differences(output_dir: Path, reference: Path) -> list[str]:
    """In what a finished training differs from the uninterrupted one; empty if in nothing."""
    found = []
    for name in ("best/model.safetensors", f"checkpoints/step-{STEPS:08}/model.safetensors"):
        if (output_dir / name).read_bytes() != (reference / name).read_bytes():
            found.append(f"{name} differs")
    states = [
        load_file(checkpoints_in(folder)[-1] / "training.safetensors")
        for folder in (output_dir, reference)
    ]
    names = states[0].keys() | states[1].keys()
    for name in sorted(names - {"averages.seconds"}):  # since the last log
        if any(name not in state for state in states) or not torch.equal(
            *(state[name] for state in states)
        ):
            found.append(f"state {name} differs")
    if logged(output_dir) != logged(reference):
        found.append("metrics.jsonl differs")
    if in_mlflow(output_dir) != in_mlflow(reference):
        found.append("MLflow differs")
    if json.loads((output_dir / "status.json").read_text())["status"] != "FINISHED":
        found.append("status.json does not say FINISHED")
    return [f"{output_dir}: {line}" for line in found]
