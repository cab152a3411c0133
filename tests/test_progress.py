"""Long work shows that it goes on, also where nobody looks at a terminal."""

import pytest
import tqdm.std

from utils import progress
from utils.distributed import Distributed
from utils.progress import ProgressBar


def test_without_a_terminal_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a Slurm log or under nohup a training was silent for ten minutes."""
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    with ProgressBar(total=1000, unit=" steps", initial=100, desc="train") as bar:
        for _ in range(10):
            now[0] += 30
            bar.update(10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("train: 1")
    assert " of 1,000 steps, " in lines[0]
    assert lines[0].endswith(" left")


def test_messages_leave_no_trace_of_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(total=3, unit=" steps") as bar:
        bar.update()
        Distributed(0, 1, None).print("a message")
    assert capsys.readouterr() == ("a message\n", "")


def test_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with ProgressBar(total=3, unit=" steps", mininterval=0) as bar:
        bar.update()
    assert "1/3" in capsys.readouterr().err
