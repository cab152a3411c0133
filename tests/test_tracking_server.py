"""An MLflow server that is slow, hangs or dies does no harm to a training."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.conftest import PICTURE, environment, lines_of, open_run
from tests.forks import Forked
from utils import addresses, tracking
from utils.cli import UserError
from utils.tracking import run as tracking_run
from utils.tracking import store, sync
from utils.tracking.__main__ import replay
from utils.tracking.sync import Event, Sender

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses

# Behind its own certificate, for a user with a password.
GUARDED = """
import base64, ssl
password = "Basic " + base64.b64encode(b"alice:hush").decode()

def guarded(environ, start):
    if environ.get("HTTP_AUTHORIZATION") == password:
        return app(environ, start)
    start("401 Unauthorized", [("WWW-Authenticate", "Basic")])
    return [b"who are you?"]

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("certificate.pem", "key.pem")
server = make_server("localhost", 0, guarded, threaded=True, ssl_context=context)
"""
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


@contextlib.contextmanager
def start_server(folder: Path, database: Path, code: str) -> Iterator[tuple[Forked, str]]:
    """An MLflow server (`mlflow server` takes much longer to start) and its port."""
    shutil.copy(database, folder)
    settings = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    with contextlib.chdir(folder):
        process = Forked("-c", code, env=environment(**settings))
    with process:
        yield process, process.stdout.readline().strip()


@pytest.fixture(scope="module")
def server_process(
    first_starts: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Forked, str]]:
    """A server and its address. The last test of this file kills it."""
    folder = tmp_path_factory.mktemp("server")
    with start_server(folder, first_starts[0] / "mlflow.db", SERVER) as (process, port):
        yield process, f"http://127.0.0.1:{port}"


def write_certificate(folder: Path) -> None:
    """A certificate of localhost that nobody else has signed, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    (folder / "certificate.pem").write_bytes(signed.public_bytes(Encoding.PEM))
    form = PrivateFormat.PKCS8, NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, *form))


def test_a_server_with_a_password_and_its_own_certificate(
    first_starts: tuple[Path, list[str]],
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    write_certificate(own_folder)
    old, new = SERVER.split("server = make_server")
    code = f"{old}{GUARDED}" + new.split("\n", 1)[1]
    with start_server(own_folder, first_starts[0] / "mlflow.db", code) as (_, port):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # as scripts do
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://localhost:{port}")
        with pytest.raises(UserError, match="MLFLOW_TRACKING_SERVER_CERT_PATH"):
            open_run()
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(own_folder / "certificate.pem"))
        with pytest.raises(UserError, match="set MLFLOW_TRACKING_USERNAME"):
            open_run()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        with pytest.raises(UserError, match="set MLFLOW_TRACKING_USERNAME") as caught:
            open_run()
        assert "wrong" not in str(caught.value)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush")
        with open_run() as run:
            log(run, 0)
        assert steps_in_mlflow(run) == [0]
        assert addresses.fetch(f"runs:/{run.run_id}/metrics.jsonl").is_file()
        # Also where the address holds the password.
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://alice:hush@localhost:{port}")
        with open_run("second") as second:
            second.metrics("train", {"loss": 1.0}, 1)
        said = "".join(capsys.readouterr()) + second.ui_hint
    assert "hush" not in said
    assert "warning" not in said


def picture(number: int) -> Event:
    return Event(float(number), "run", "picture", "samples", "samples.png")


def test_a_failing_upload_keeps_no_other_from_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "RETRY_SECONDS", 0.01)
    done: list[Event] = []
    errors: list[Exception] = []
    model = Event(0.0, "run", "model", path="best", values={"val/mse": 1.0})

    def send(events: list[Event]) -> None:
        if events == [model]:
            raise OSError("full")
        done.extend(events)

    sender = Sender(send, errors.append)
    pictures = [picture(number) for number in range(3)]
    sender.put(model, *pictures)
    wait_for(lambda: done == pictures)
    sender.close()
    assert not sender.wait(5)
    assert sender.left() == [model]
    assert errors


def test_what_fails_is_sent_again_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "RETRY_SECONDS", 0.01)
    done: list[Event] = []
    failures = iter([OSError("away")] * 3)

    def send(events: list[Event]) -> None:
        for error in failures:
            raise error
        done.extend(events)

    sender = Sender(send, lambda error: None)
    sender.put(picture(0), picture(1))
    wait_for(lambda: len(done) == 2)
    sender.close()
    assert sender.wait(5)


class Refused(Exception):
    def get_http_status_code(self) -> int:
        return 400


def test_metrics_that_wait_are_sent_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a line took minutes at the end of a run whose server was slow or away."""
    monkeypatch.setattr(sync, "RETRY_SECONDS", 0.01)
    calls: list[list[Event]] = []
    failures = iter([OSError("away")] * 3)

    def send(events: list[Event]) -> None:
        time.sleep(0.05)
        for error in failures:
            raise error
        if lines[77] in events:
            raise Refused
        calls.append(events)

    lines = [Event(float(step), "run", step=step, values={"loss": 1.0}) for step in range(1000)]
    status = Event(1000.0, "run", "status", "FINISHED")
    sender = Sender(send, lambda error: None)
    sender.put(*lines, status)
    sender.close()
    assert sender.wait(5)
    assert [status] in calls
    arrived = [event.step for events in calls for event in events if event != status]
    assert sorted(arrived) == [step for step in range(1000) if step != 77]
    assert sender.refused == {"metric": 1}
    assert len(calls) < 40


def test_an_upload_is_awaited_as_long_as_others_arrive() -> None:
    sender = Sender(lambda event: time.sleep(0.2), lambda error: None)
    sender.put(*map(picture, range(5)))
    sender.close()
    assert sender.wait(0.5)  # for each of them
    sender = Sender(lambda event: time.sleep(3), lambda error: None)
    sender.put(picture(0))
    sender.close()
    started = time.monotonic()
    assert not sender.wait(0.3)
    assert time.monotonic() - started < 2


def test_a_slow_upload_holds_up_no_metric_and_arrives(
    server: Forked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The server confirms late, as one that passes a large model on to a bucket."""
    monkeypatch.setattr(tracking_run, "SILENT_SECONDS", 0.1)
    real = store.log_image

    def slow(*arguments: object) -> None:
        time.sleep(2)
        real(*arguments)

    monkeypatch.setattr(store, "log_image", slow)
    with open_run() as run:
        run.picture("samples", PICTURE, 0)
        run.metrics("train", {"loss": 1.0}, 1)
        wait_for(lambda: steps_in_mlflow(run) == [1], seconds=1.5)
    said = capsys.readouterr()
    assert said.err == ""
    assert "MB to MLflow; Ctrl-C leaves them to --replay" in said.out
    assert not replay(addresses.open_client(), Path("out")).total()


@pytest.fixture
def server(server_process: tuple[Forked, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Forked]:
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


def test_all_of_a_run_over_http(server: Forked, capsys: pytest.CaptureFixture) -> None:
    with open_run(params={"batch_size": 4}) as run:
        log(run, 0)
    assert steps_in_mlflow(run) == [0]
    fetched = addresses.fetch(f"runs:/{run.run_id}/metrics.jsonl")
    assert json.loads(fetched.read_text()) == lines_of(run)[0]
    assert os.environ["MLFLOW_TRACKING_URI"] in run.ui_hint
    assert capsys.readouterr() == ("", "")


def test_a_server_that_hangs_and_comes_back_gets_everything(
    server: Forked,
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
    server: Forked,
    number: int,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sync, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(tracking_run, "END_SECONDS", 8)
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
    warning, last = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: MLflow")
    assert str(run.output_dir) in warning
    assert last.startswith("warning: not in MLflow: ")
    assert all(part in last for part in ("19 metrics, ", "1 status, ", "--replay out"))
    assert not caplog.records  # without pytest they would be on stderr, too
    assert [line["step"] for line in lines_of(run)] == list(range(20))
    assert len(list((run.output_dir / "pictures").iterdir())) == 20
    assert (run.output_dir / "tables" / "pairs-19.csv").is_file()
