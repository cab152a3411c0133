"""Signals: the step is finished and saved, a second one stops at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import environment
from utils.cli import Stopped
from utils.distributed import Distributed
from utils.tracking import sync
from utils.training.stopping import StopRequest

ALONE = Distributed(0, 1, torch.device("cpu"))
CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_stops_after_the_step_with_a_checkpoint(number: int, code: int) -> None:
    before = signal.getsignal(number)
    saved = []
    with StopRequest(saved.append) as stop:
        stop.obeyed(ALONE, lambda: saved.append("too early"))
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as caught:
            stop.obeyed(ALONE, lambda: saved.append("now"))
    assert caught.value.exit_code == code
    assert saved == ["now"]
    assert signal.getsignal(number) is before


# A training whose MLflow does not answer. It says when it is in a step, and when it is closing.
FROZEN = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from utils.distributed import Distributed
from utils.tracking import Run
from utils.training.resume import Progress, State
from utils.training.saving import Checkpoints
from utils.training.stopping import StopRequest

group, net = Distributed(0, 1, torch.device("cpu")), nn.Linear(1, 1)
run = Run(Path("out"), stage="gpt", experiment="tests")
run._queue.put(lambda: time.sleep(60))
progress = Progress(run_id=run.run_id)
checkpoints = Checkpoints(run, "", group, State(group, net, {}, progress=progress), None)

def save():
    checkpoints.save({"model.safetensors": net.state_dict()})

with StopRequest(checkpoints.leave) as stop, run, checkpoints:
    save()
    progress.step = 5
    print("step", flush=True)
    if sys.argv[1] == "step":
        time.sleep(60)
    while True:
        time.sleep(0.01)
        stop.obeyed(group, lambda: print("closing", flush=True))
"""


@pytest.mark.parametrize(("moment", "number"), [("step", 15), ("closing", 2)])
def test_a_second_signal_ends_the_process_at_once(store: Any, moment: str, number: int) -> None:
    """It waited for all that was left to send, and for the report."""
    address = os.environ["MLFLOW_TRACKING_URI"]
    process = subprocess.Popen(
        [sys.executable, "-c", FROZEN, moment],
        env=environment(MLFLOW_TRACKING_URI=address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
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
    sync.replay(store, Path("out"))
    assert store.get_run(status["run_id"]).info.status == "KILLED"
