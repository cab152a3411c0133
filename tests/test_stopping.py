"""Signals: the step is finished and saved, a second one stops at once."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import environment
from tests.forks import Forked
from tests.test_training import make_state
from utils.cli import Stopped
from utils.tracking.__main__ import replay
from utils.training.loop import end_step
from utils.training.state import StopSignals

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]


class Saved:
    """Stands for the checkpointer."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def save(self) -> None:
        self.steps.append("saved")


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_stops_after_the_step_with_a_checkpoint(number: int, code: int) -> None:
    before = signal.getsignal(number)
    checkpoints, state = Saved(), make_state()
    with StopSignals(checkpoints.steps.append) as stop:
        assert not end_step(state, checkpoints, stop, evaluated=False)
        assert not checkpoints.steps
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as caught:
            end_step(state, checkpoints, stop, evaluated=False)
    assert caught.value.exit_code == code
    assert checkpoints.steps == ["saved"]
    assert signal.getsignal(number) is before


def test_a_signal_that_torchrun_passes_on_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm signals all processes of a step, and torchrun the others again: no checkpoint."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopSignals(ended.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.number, ended) == (signal.SIGTERM, [])
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 10)
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143, 143]


# A training whose MLflow does not answer. It says when it is in a step, and when it is closing.
FROZEN = """
import sys, time
from pathlib import Path
import torch
from tests.test_checkpoints import Net
from utils.cli import Stopped
from utils.distributed import Distributed
from utils.provenance import Provenance
from utils.tracking import Run
from utils.training.checkpoint import Checkpointer
from utils.training.state import CheckpointState, Progress, StopSignals

group, net = Distributed(0, 1, torch.device("cpu")), Net()
run = Run(Path("out"), stage="gpt", experiment="tests")
run._senders[0]._send = lambda event: time.sleep(60)
run.metrics("train", {"loss": 1.0}, 1)
progress = Progress(run_id=run.run_id)
checkpoints = Checkpointer(run, CheckpointState(group, net, {}, progress), Provenance(), None)

with StopSignals(checkpoints.end_at_once) as stop, run, checkpoints:
    checkpoints.save()
    progress.step = 5
    print("step", flush=True)
    if sys.argv[1] == "step":
        time.sleep(60)
    while True:
        time.sleep(0.01)
        if stop.number:
            print("closing", flush=True)
            raise Stopped(stop.number)
"""


@pytest.mark.parametrize(("moment", "number"), [("step", 15), ("closing", 2)])
def test_a_second_signal_ends_the_process_at_once(store: Any, moment: str, number: int) -> None:
    """It waited for all that was left to send, and for the report."""
    address = os.environ["MLFLOW_TRACKING_URI"]
    process = Forked("-c", FROZEN, moment, env=environment(MLFLOW_TRACKING_URI=address))
    assert process.stdout.readline() == "step\n", process.communicate()
    process.send_signal(signal.SIGTERM)
    if moment == "closing":
        assert process.stdout.readline() == "closing\n"
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert process.returncode == 128 + number
    assert said == "stopped at once; --resume out goes on from the last checkpoint\n"
    status = json.loads(Path("out/status.json").read_text())
    assert (status["status"], status["exit_code"], status["step"]) == ("KILLED", 128 + number, 5)
    assert status["checkpoint"] == "out/checkpoints/step-00000000"
    assert store.get_run(status["run_id"]).info.status == "RUNNING"
    replay(store, Path("out"))
    assert store.get_run(status["run_id"]).info.status == "KILLED"
