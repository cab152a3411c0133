"""MLflow gets everything, and may be missing, slow or dead without harm to a training."""

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from utils import outbox, tracking
from utils.cli import Stopped, UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Image.new("RGB", (8, 8), (200, 0, 0))

FIRST_START = """
import sys
from pathlib import Path
import mlflow
from utils.tracking import Run
print("ready", flush=True)
sys.stdin.readline()
with Run(Path("outputs") / sys.argv[1], stage="gpt", experiment="first") as run:
    run.metrics("train", {"loss": 0.5}, 1)
print(run.run_id)
"""


def environment(**values: str) -> dict[str, str]:
    """This one's, without what says where MLflow is."""
    kept = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
    return kept | {"PYTHONPATH": str(ROOT)} | values


@pytest.fixture(scope="module")
def first_starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder in which two processes opened a run in the same moment; what each had to say."""
    folder = tmp_path_factory.mktemp("first")
    # MLflow takes such a file for a store, of a kind that it then refuses.
    (folder / "mlruns" / "0").mkdir(parents=True)
    (folder / "mlruns" / "0" / "meta.yaml").write_text("artifact_location: x\n")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_START, name],
            cwd=folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = []
    for process in processes:
        out, error = process.communicate(timeout=60)
        said.append(out.strip() if process.returncode == 0 else error)
    return folder, said


@pytest.fixture
def store(
    first_starts: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A client of a copy of that store: a new one takes MLflow five seconds."""
    import mlflow

    shutil.copy(first_starts[0] / "mlflow.db", tmp_path)
    address = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.chdir(tmp_path)
    return mlflow.MlflowClient(address)


def open_run(folder: str = "out", **options: Any) -> tracking.Run:
    return tracking.Run(Path(folder), **{"stage": "tokenizer", "experiment": "tests"} | options)


def lines_of(run: tracking.Run) -> list[dict]:
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").open()]


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


def test_what_is_logged_is_in_the_folder_and_in_mlflow(store: Any) -> None:
    Path("best").mkdir()
    Path("best/weights.txt").write_text("w")
    with open_run(
        run_name="name",
        config={"a": 1},
        params={"shape": (24, 40)},
        tags={"tokenizer_run_id": "abc"},
    ) as run:
        for step in range(30):
            run.metrics("train", {"loss": 1 / (step + 1), "learning_rate": 1e-3}, step)
            run.metrics("val", {"mse": float(step)}, step)
        picture = run.picture("final/samples", PICTURE, 3)
        run.table("pairs", {"image_path": ["a.png", "b.png"], "original": [PICTURE, PICTURE]})
        run.folder(Path("best"), "checkpoints/best")
        run.file(Path("best/weights.txt"), "extra")

    lines = lines_of(run)
    assert len(lines) == 60
    for key, count in (("train/loss", 30), ("train/learning_rate", 30), ("val/mse", 30)):
        logged = {m.step: (m.value, m.timestamp) for m in store.get_metric_history(run.run_id, key)}
        kept = {
            line["step"]: (line[key], int(line["time"] * 1000)) for line in lines if key in line
        }
        assert logged == kept
        assert len(logged) == count

    found = store.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "name"
    assert found.data.params == {"shape": "(24, 40)"}
    assert found.data.tags["stage"] == "tokenizer"
    assert found.data.tags["tokenizer_run_id"] == "abc"
    assert Path(sys.argv[0]).name in found.data.tags["mlflow.note.content"]
    assert found.data.tags["mlflow.runColor"].startswith("#")
    assert f"/experiments/{found.info.experiment_id}/runs/{run.run_id}/" in run.link
    assert run.link.endswith("workflowType=machine_learning")
    assert os.environ["MLFLOW_TRACKING_URI"] in run.how_to_look

    assert json.loads(Path("out/config.json").read_text()) == {"a": 1}
    with Image.open(picture) as image:
        assert image.getpixel((0, 0)) == (200, 0, 0)
    names = {file.path for file in walk(store, run.run_id)}
    assert {"config.json", "tables/pairs.json", "extra/weights.txt"} < names
    assert "checkpoints/best/weights.txt" in names
    assert any(name.startswith("images/final") and name.endswith(".png") for name in names)
    table = store.load_table(found.info.experiment_id, "tables/pairs.json", [run.run_id])
    assert list(table["image_path"]) == ["a.png", "b.png"]
    rows = list(csv.DictReader(Path("out/tables/pairs.csv").read_text().splitlines()))
    assert [row["image_path"] for row in rows] == ["a.png", "b.png"]
    with Image.open(Path("out/tables") / rows[1]["original"]) as image:
        assert image.size == (8, 8)


def walk(client: Any, run_id: str, path: str | None = None) -> Iterator[Any]:
    for file in client.list_artifacts(run_id, path):
        if file.is_dir:
            yield from walk(client, run_id, file.path)
        else:
            yield file


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a bug"), "FAILED"),
        (UserError("a mistake"), "FAILED"),
        (Stopped(15), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),  # the second signal
    ],
)
def test_how_a_run_ended(store: Any, error: BaseException, status: str) -> None:
    run = open_run()

    def train() -> None:
        with run:
            run.metrics("train", {"loss": 1.0}, 1)
            raise error

    with pytest.raises(type(error)):
        train()
    assert store.get_run(run.run_id).info.status == status
    assert store.get_run(run.run_id).data.metrics == {"train/loss": 1.0}


def test_at_most_ten_params(store: Any) -> None:
    with pytest.raises(ValueError, match="at most 10 params, got 11"):
        open_run(params=dict.fromkeys("abcdefghijk", 1))
    with open_run(params=dict.fromkeys("abcdefghij", 1)) as run:
        pass
    assert len(store.get_run(run.run_id).data.params) == 10


def test_a_later_stage_adds_to_a_run_and_leaves_its_status(store: Any) -> None:
    run = open_run()
    run.metrics("train", {"loss": 1.0}, 1)
    run.close("KILLED")
    later = tracking.continue_run(Path("later"), None, run.run_id)
    with later:
        later.metrics("samples", {"accuracy": 0.5}, 0)
    found = store.get_run(run.run_id)
    assert found.info.status == "KILLED"
    assert found.data.metrics == {"train/loss": 1.0, "samples/accuracy": 0.5}
    assert tracking.experiment_of(run.run_id) == "tests"


def test_a_resumed_run_goes_on(store: Any) -> None:
    first = open_run(params={"batch_size": 4})
    first.close("KILLED")
    with open_run(run_id=first.run_id, continued=True, params={"batch_size": 8}) as run:
        assert store.get_run(run.run_id).info.status == "RUNNING"
    assert run.run_id == first.run_id
    assert store.get_run(run.run_id).info.status == "FINISHED"


def test_a_resumed_run_that_is_gone_gets_a_new_one(
    store: Any, capsys: pytest.CaptureFixture
) -> None:
    """Whoever removed mlflow.db could resume no training any more."""
    with open_run(run_id="0" * 32, continued=True) as run:
        run.metrics("train", {"loss": 1.0}, 1)
    assert store.get_run(run.run_id).info.status == "FINISHED"
    assert "a new run takes its place" in capsys.readouterr().err


def test_a_wrong_run_id(store: Any) -> None:
    deleted = open_run()
    deleted.close()
    store.delete_run(deleted.run_id)
    for run_id in ("", "nonsense", "0" * 32, deleted.run_id):
        with pytest.raises(UserError, match="MLflow run"):
            tracking.continue_run(Path("later"), run_id, "")
    assert tracking.experiment_of("0" * 32) == ""
    assert tracking.experiment_of("") == ""


def test_a_model_from_elsewhere_is_not_logged(store: Any, capsys: pytest.CaptureFixture) -> None:
    with tracking.continue_run(Path("later"), None, "0" * 32) as run:
        run.metrics("samples", {"accuracy": 0.5}, 0)
        run.picture("samples", PICTURE, 0)
    assert "--run_id" in capsys.readouterr().out
    assert not Path("later").exists()
    assert run.how_to_look == "not logged to MLflow"


def test_what_mlflow_refuses_for_good_does_not_hold_up_the_rest(
    store: Any, capsys: pytest.CaptureFixture
) -> None:
    """It was tried again for ever, and nothing came after it."""
    with open_run() as run:
        run.metrics("train", {"100 % & more!": 1.0}, 1)
        run.metrics("train", {"loss": 2.0}, 2)
    assert store.get_run(run.run_id).data.metrics == {"train/loss": 2.0}
    assert store.get_run(run.run_id).info.status == "FINISHED"
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(lines_of(run)) == 2


def test_a_run_that_is_deleted_meanwhile(store: Any, capsys: pytest.CaptureFixture) -> None:
    run = open_run()
    store.delete_run(run.run_id)
    for step in range(20):
        run.metrics("train", {"loss": 1.0}, step)
    started = time.monotonic()
    run.close()
    assert time.monotonic() - started < 5
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(lines_of(run)) == 20


def test_fetch(store: Any) -> None:
    Path("best").mkdir()
    Path("best/weights.txt").write_text("w")
    with open_run() as run:
        run.folder(Path("best"), "checkpoints/best")
    fetched = tracking.fetch(f"runs:/{run.run_id}/checkpoints/best")
    assert (fetched / "weights.txt").read_text() == "w"
    assert tracking.fetch("some/path") == Path("some/path")
    for address in (f"runs:/{run.run_id}/none", f"runs:/{'0' * 32}/best", "models:/none@best"):
        with pytest.raises(UserError, match=f"cannot fetch {address} from MLflow"):
            tracking.fetch(address)


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
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        open_run()
    assert time.monotonic() - started < 10
    assert not list(Path("out").glob("*.jsonl"))
    return str(caught.value)


def test_no_server_on_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    message = refused(f"http://127.0.0.1:{port}", monkeypatch)
    assert f"no MLflow server answers at http://127.0.0.1:{port}" in message
    assert "unset MLFLOW_TRACKING_URI" in message


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(None) as port:
        assert "no MLflow server answers" in refused(f"http://127.0.0.1:{port}", monkeypatch)


def test_something_else_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(b"SSH-2.0-OpenSSH_9.6\r\n") as port:
        assert "no MLflow server answers" in refused(f"http://127.0.0.1:{port}", monkeypatch)
    page = b"HTTP/1.0 404 Not Found\r\nContent-Length: 4\r\n\r\nnone"
    with listening(page) as port:
        assert "is no MLflow store" in refused(f"http://127.0.0.1:{port}", monkeypatch)


@pytest.mark.parametrize(
    "address", ["http://[", "http://127.0.0.1:port", "nonsense://x", "sqlite:////dev/null/a.db"]
)
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    message = refused(address, monkeypatch)
    assert address in message
    assert "\n" not in message


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
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
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
    fetched = tracking.fetch(f"runs:/{run.run_id}/metrics.jsonl")
    assert json.loads(fetched.read_text()) == lines_of(run)[0]
    assert run.link.startswith(os.environ["MLFLOW_TRACKING_URI"])
    assert capsys.readouterr() == ("", "")


def test_a_server_that_hangs_and_comes_back_gets_everything(
    server: subprocess.Popen,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.05)
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
    assert tracking.fetch(f"runs:/{run.run_id}/tables/pairs-1.json").is_file()
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
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.05)
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
