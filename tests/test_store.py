"""Opening an MLflow store, or being told why not; fetching from it."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import open_run
from utils import addresses, tracking
from utils.cli import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses


def test_two_first_starts_at_once_share_a_database_in_the_empty_folder(
    first_starts: tuple[Path, list[str]],
) -> None:
    import mlflow

    folder, run_ids = first_starts
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    for run_id in run_ids:
        assert len(run_id) == 32, run_id
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.metrics == {"train/loss": 0.5}
    assert len(set(run_ids)) == 2
    assert client.get_experiment(run.info.experiment_id).name == "first"


def test_a_wrong_run_id(store: Any) -> None:
    deleted = open_run()
    deleted.close()
    store.delete_run(deleted.run_id)
    for run_id in ("", "nonsense", "0" * 32, deleted.run_id):
        with pytest.raises(UserError, match="MLflow run"):
            tracking.continue_run(Path("later"), run_id, "")
    assert not addresses.has_run("0" * 32)
    assert not addresses.has_run("")


@pytest.mark.parametrize("call", ["create_run", "get_experiment_by_name"])
def test_a_store_that_dies_while_a_run_is_opened(
    store: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """It answered when it was asked whether it is there; then there was a traceback."""

    def full(*arguments: object, **options: object) -> None:
        raise OSError("database or disk is full")

    monkeypatch.setattr(type(store), call, full)
    with pytest.raises(UserError, match=r"cannot open a run .*\(database or disk is full\); start"):
        open_run()


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[int]:
    """A port that accepts connections and gives one answer to all, or none ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            held = []
            with contextlib.suppress(OSError):  # it is closed at the end
                while True:
                    held.append(listener.accept()[0])
                    if answer is not None:
                        held[-1].recv(10_000)
                        held.pop().sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def refused(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the user is told of a tracking address that is of no use, in time."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        open_run()
    assert time.monotonic() - started < 10
    assert not list(Path("out").glob("*.jsonl"))
    return str(caught.value)


def test_no_server_on_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    message = refused(f"http://127.0.0.1:{port}", monkeypatch)
    assert f"cannot use MLflow at http://127.0.0.1:{port}" in message
    assert "unset MLFLOW_TRACKING_URI" in message


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(None) as port:
        assert "cannot use MLflow" in refused(f"http://127.0.0.1:{port}", monkeypatch)


def test_something_else_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(b"SSH-2.0-OpenSSH_9.6\r\n") as port:
        assert "cannot use MLflow" in refused(f"http://127.0.0.1:{port}", monkeypatch)
    page = b"HTTP/1.0 404 Not Found\r\nContent-Length: 4\r\n\r\nnone"
    with listening(page) as port:
        assert "cannot use MLflow" in refused(f"http://127.0.0.1:{port}", monkeypatch)


@pytest.mark.parametrize(
    "address", ["http://[", "http://127.0.0.1:port", "nonsense://x", "sqlite:////dev/null/a.db"]
)
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    message = refused(address, monkeypatch)
    assert address in message
    assert "\n" not in message
