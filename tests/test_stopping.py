"""Signals: the step is finished and saved, a second one stops at once."""

import os
import signal

import pytest
import torch

from utils.cli import Stopped
from utils.processes import Processes
from utils.training.stopping import StopRequest

ALONE = Processes(0, 1, torch.device("cpu"))
CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_stops_after_the_step_with_a_checkpoint(number: int, code: int) -> None:
    before = signal.getsignal(number)
    saved = []
    with StopRequest() as stop:
        stop.obeyed(ALONE, lambda: saved.append("too early"))
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as caught:
            stop.obeyed(ALONE, lambda: saved.append("now"))
    assert caught.value.exit_code == code
    assert saved == ["now"]
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once() -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
