"""An MLflow server that is slow, hangs or dies does no harm to a training."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import PICTURE, environment, lines_of, open_run
from utils import addresses, tracking
from utils.tracking import sync

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses

SERVER = """
import logging
from mlflow.server import app
from mlflow.server.handlers import _get_tracking_store
from werkzeug.serving import make_server

_get_tracking_store()
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def server_process(
    first_starts: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen, str]]:
    """An MLflow server (`mlflow server` takes much longer to start) and its address.

    The last test of this file kills it.
    """
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(first_starts[0] / "mlflow.db", folder)
    settings = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=folder,
        env=environment(**settings),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process, f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


@pytest.fixture
def server(
    server_process: tuple[subprocess.Popen, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen]:
    process, address = server_process
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():
        monkeypatch.setenv(name, value)
    yield process
    process.send_signal(signal.SIGCONT)


def log(run: tracking.Run, step: int) -> None:
    """Everything that a training logs; no call may hold it up."""
    calls: list[Callable[[], object]] = [
        lambda: run.metrics("train", {"loss": float(step)}, step),
        lambda: run.picture("samples", PICTURE, step),
        lambda: run.table(f"pairs-{step}", {"original": [PICTURE]}),
        lambda: run.file(run.output_dir / "metrics.jsonl"),
    ]
    for call in calls:
        started = time.monotonic()
        call()
        assert time.monotonic() - started < 1


def await_attempts(count: int) -> None:
    """Wait until MLflow was tried that often at the port of a server that is gone."""
    address = os.environ["MLFLOW_TRACKING_URI"].removeprefix("http://").split(":")
    with socket.create_server((address[0], int(address[1]))) as listener:
        listener.settimeout(20)
        for _ in range(2 * count):  # each attempt is two connections
            listener.accept()[0].close()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)


def steps_in_mlflow(run: tracking.Run) -> list[int]:
    import mlflow

    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return [metric.step for metric in client.get_metric_history(run.run_id, "train/loss")]


def test_all_of_a_run_over_http(server: subprocess.Popen, capsys: pytest.CaptureFixture) -> None:
    with open_run(params={"batch_size": 4}) as run:
        log(run, 0)
    assert steps_in_mlflow(run) == [0]
    fetched = addresses.fetch(f"runs:/{run.run_id}/metrics.jsonl")
    assert json.loads(fetched.read_text()) == lines_of(run)[0]
    assert os.environ["MLFLOW_TRACKING_URI"] in run.ui_hint
    assert capsys.readouterr() == ("", "")


def test_a_server_that_hangs_and_comes_back_gets_everything(
    server: subprocess.Popen,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sync, "RETRY_SECONDS", 0.05)
    said: list[str] = []

    def warned() -> bool:
        said.append(capsys.readouterr().err)
        return "warning" in "".join(said)

    with open_run() as run:
        for step in range(2):  # it is said only once even so
            server.send_signal(signal.SIGSTOP)
            log(run, step)
            wait_for(warned)
            server.send_signal(signal.SIGCONT)
            wait_for(lambda count=step + 1: len(steps_in_mlflow(run)) == count)
    assert steps_in_mlflow(run) == [0, 1]
    assert addresses.fetch(f"runs:/{run.run_id}/tables/pairs-1.json").is_file()
    said.append(capsys.readouterr().err)
    assert len("".join(said).splitlines()) == 1
    assert not caplog.records


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "is gone"])
def test_a_server_that_dies(
    server: subprocess.Popen,
    number: int,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sync, "RETRY_SECONDS", 0.05)
    run = open_run()
    log(run, 0)
    wait_for(lambda: steps_in_mlflow(run) == [0])
    server.send_signal(number)
    for step in range(1, 20):
        log(run, step)
    if number == signal.SIGKILL:
        server.wait()
        await_attempts(3)
    started = time.monotonic()
    run.close()
    assert time.monotonic() - started < 30
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: MLflow")
    assert str(run.output_dir) in warning
    assert not caplog.records  # without pytest they would be on stderr, too
    assert [line["step"] for line in lines_of(run)] == list(range(20))
    assert len(list((run.output_dir / "pictures").iterdir())) == 20
    assert (run.output_dir / "tables" / "pairs-19.csv").is_file()
