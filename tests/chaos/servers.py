"""MLflow under load and in trouble: nothing lost, nothing doubled, no training held up."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos.harness import Result
from tests.conftest import FIRST_START, environment
from tests.test_tracking_server import SERVER
from utils.addresses import open_client
from utils.tracking.__main__ import replay

# A training that only logs: numbers, now and then a picture, at the end a table and a file. It
# prints its run id, how long the slowest call took, and how long the end.
LOGS = """
import sys, time
from pathlib import Path
from PIL import Image
from utils import cli
from utils.tracking import Run, sync
cli.configure_process()
sync.RETRY_SECONDS = 0.5
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
started = time.monotonic()
run.close()
print(slowest, time.monotonic() - started, flush=True)
"""
# A training whose model has the given number of bytes; it prints its run id, then what `LOGS` does.
UPLOADS = """
import sys, time
from pathlib import Path
from utils import cli
from utils.tracking import Run
cli.configure_process()
name, size = sys.argv[1], int(sys.argv[2])
run = Run(Path(name), stage="gpt", experiment="chaos")
print(run.run_id, flush=True)
best = Path(name, "best")
best.mkdir()
with (best / "model.safetensors").open("wb") as file:
    file.truncate(size)
run.model(best, {"val/best_loss": 0.5}, 1)
started = time.monotonic()
run.metrics("train", {"loss": 0.0, "rate": 1.0}, 0)
slowest = time.monotonic() - started
started = time.monotonic()
run.close()
print(slowest, time.monotonic() - started, flush=True)
"""
# What makes a server slow, or its artifact store fail, while there is a file of that name.
SLOW = """
import time
from pathlib import Path
at_once = app.wsgi_app

def slow(environ, start):
    if Path("slow").exists():
        time.sleep(3)
    if Path("full").exists() and environ["REQUEST_METHOD"] == "PUT":
        start("500 Internal Server Error", [])
        return [b"no space left"]
    return at_once(environ, start)

app.wsgi_app = slow
"""
PATIENCE = 300


class Training:
    """A process of `LOGS` in the current folder."""

    def __init__(
        self, name: str, count: int, pause: float, address: str, timeout: int = 2, code: str = LOGS
    ) -> None:
        where = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout)}
        self.name, self.count = name, count
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, name, str(count), str(pause)],
            env=environment(**where),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.run_id = self.process.stdout.readline().strip()

    def end(self) -> tuple[float, float]:
        """Seconds of the slowest call and of the end."""
        out, self.error = self.process.communicate(timeout=PATIENCE)
        error = self.error
        if self.process.returncode or "Traceback" in error:
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}: {error[-300:]}")
        slowest, end = map(float, out.splitlines()[-1].split())
        return slowest, end


Part = tuple[dict[str, Any], Counter[str]]  # what was seen, and what went wrong


def run(count: int) -> Result:
    """Runs of `count` calls each; a quick round has two at once, a full one eight."""
    parallel, starts = (8, 20) if count >= 1000 else (2, 3)
    parts: dict[str, Callable[[], Part]] = {
        "first-starts": lambda: _first_starts(starts),
        "at-once": lambda: _at_once(parallel, count),
        "locked": lambda: _locked(count),
        "slow": lambda: _slow(count),
        "killed": lambda: _server_killed(count),
        "black-hole": lambda: _black_hole(count),
        "artifacts": lambda: _artifacts_fail(count),
        "slow-link": lambda: _slow_link(500_000_000 if count >= 1000 else 20_000_000),
    }
    seen: dict[str, Any] = {}
    bad: Counter[str] = Counter()
    slowest = 0.0
    for name, part in parts.items():
        Path(name).mkdir()
        with contextlib.chdir(name):
            figures, wrong = part()
        slowest = max(slowest, figures.pop("slowest", 0.0))
        seen |= figures
        bad.update(wrong)
    detail = f"{bad['lost']} lost, {bad['doubled']} doubled after replay"
    for name, value in ({"slowest call": f"{slowest:.2f} s"} | seen | +bad).items():
        detail += f"; {name} {value}"
    return Result((parallel + 6) * count + starts, not +bad and slowest < 1, detail)


def _first_starts(count: int) -> Part:
    """Processes that all open a run in an empty folder at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_START, str(number)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for process in processes:
        process.stdout.readline()  # it is ready
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=PATIENCE) for process in processes]
    opened = {out.strip() for out, _ in ends}
    failed = sum(process.returncode != 0 for process in processes) + count - len(opened)
    return {"first starts at once": count}, Counter({"failed first starts": failed})


def _at_once(parallel: int, count: int) -> Part:
    """Runs that log into one new database at the same time."""
    address = f"sqlite:///{Path('mlflow.db').absolute()}"
    trainings = [Training(f"run{number}", count, 0.0, address) for number in range(parallel)]
    slowest = max(training.end()[0] for training in trainings)
    bad: Counter[str] = Counter()
    for training in trainings:
        bad.update(_check(address, training))
    return {"runs at once": parallel, "slowest": slowest}, bad


def _locked(count: int) -> Part:
    """A database that another program locks for longer than anybody waits for it."""
    address = f"sqlite:///{Path('mlflow.db').absolute()}"
    training = Training("run", count, 2 / count, address)
    with contextlib.closing(sqlite3.connect("mlflow.db", timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        slowest, _ = training.end()
        other.rollback()
    return {"slowest": slowest}, _check(address, training)


def _slow(count: int) -> Part:
    """A server that takes 3 s to answer: a client waits for that, another gives up before."""
    bad: Counter[str] = Counter()
    with _server() as server:
        trainings = [
            Training(f"run{timeout}", count, 8 / count, server.address, timeout)
            for timeout in (5, 2)
        ]
        Path("slow").touch()
        time.sleep(7)
        Path("slow").unlink()
        slowest = max(training.end()[0] for training in trainings)
        for training in trainings:
            bad.update(_check(server.address, training))
    return {"seconds to answer": 3, "slowest": slowest}, bad


def _server_killed(count: int) -> Part:
    """A server killed and restarted while a run logs to it, then gone for its end."""
    bad: Counter[str] = Counter()
    with _server() as server:
        training = Training("run", count, 5 / count, server.address)
        for _ in range(3):
            time.sleep(0.7)
            server.kill()
            time.sleep(0.3)
            server.start()
        server.kill()
        slowest, end = training.end()
        bad["slow end"] = end > 30
        server.start()
        bad.update(_check(server.address, training))
    return {"restarts of the server": 4, "slowest": slowest}, bad


def _black_hole(count: int) -> Part:
    """A server that accepts and never answers: at the start, and from the middle of a run on."""
    bad: Counter[str] = Counter()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        refused = subprocess.run(
            [sys.executable, "-c", LOGS, "none", "1", "0"],
            env=environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{silent.getsockname()[1]}"),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        seconds = time.monotonic() - started
    bad["start not refused"] = "cannot use MLflow" not in refused.stderr or seconds > 60
    with _server() as server:
        training = Training("run", count, 3 / count, server.address)
        time.sleep(1)
        server.process.send_signal(signal.SIGSTOP)
        slowest, end = training.end()
        bad["slow end"] = end > 30
        server.process.send_signal(signal.SIGCONT)
        bad.update(_check(server.address, training))
    return {"start refused after": f"{seconds:.0f} s", "slowest": slowest}, bad


def _artifacts_fail(count: int) -> Part:
    """A server whose artifact store is full all the time: metrics and status arrive without it."""
    with _server() as server:
        Path("full").touch()
        training = Training("run", count, 0.0, server.address)
        slowest, end = training.end()
        client = _client(server.address)
        history = client.get_metric_history(training.run_id, "train/loss")
        bad = Counter({"metrics lost to artifacts": count - len({x.step for x in history})})
        status = client.get_run(training.run_id).info.status
        bad["status lost to artifacts"] = int(status != "FINISHED")
        bad["slow end"] = end > 30
        Path("full").unlink()
        bad.update(_check(server.address, training))
    return {"slowest": slowest}, bad


def _slow_link(size: int) -> Part:
    """A model of `size` bytes over a link of 20 MB/s; metrics do not wait for it."""
    bad: Counter[str] = Counter()
    with _server() as server, throttled(server.port, 20e6) as port:
        training = Training("run", size, 0.0, f"http://127.0.0.1:{port}", 120, UPLOADS)
        client = _client(server.address)
        deadline = time.monotonic() + 20
        while not client.get_metric_history(training.run_id, "train/loss"):
            if time.monotonic() > deadline:
                bad["metrics held up"] = 1
                break
            time.sleep(0.5)
        slowest, end = training.end()
        bad["warnings"] = len(training.error.splitlines())
        run = client.get_run(training.run_id)
        bad["status lost"] = run.info.status != "FINISHED"
        (file,) = client.list_artifacts(training.run_id, "checkpoints/best")
        (output,) = run.outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        bad["model lost"] = file.file_size != size or model.status != "READY"
    return {
        "MB over 20 MB/s": size // 1_000_000,
        "its seconds": round(end),
        "slowest": slowest,
    }, bad


@contextlib.contextmanager
def throttled(port: int, rate: float) -> Iterator[int]:
    """The port of a proxy that passes on at most `rate` bytes a second to another port."""
    lock, sent = threading.Lock(), [0.0, time.monotonic()]  # bytes since

    def passed_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with lock:
                    sent[0] += len(data)
                    wait = sent[1] + sent[0] / rate - time.monotonic()
                    if wait < 0:  # the link was idle
                        sent[:] = 0.0, time.monotonic()
                time.sleep(max(wait, 0))
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is closed at the end
            while True:
                near = listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", port))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=passed_on, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]


def _client(address: str) -> Any:
    os.environ["MLFLOW_TRACKING_URI"] = address
    return open_client()


def _check(address: str, training: Training) -> Counter[str]:
    """What MLflow lost or has twice of a run after a replay, of which a second sends nothing."""
    client = _client(address)
    replay(client, Path(training.name))
    again = replay(client, Path(training.name))
    bad = Counter({"sent again": again.total()})
    run_id, steps = training.run_id, list(range(training.count))
    for key in ("train/loss", "train/rate"):
        history = client.get_metric_history(run_id, key)
        found = Counter(metric.step for metric in history)
        bad["lost"] += len(set(steps) - set(found))
        bad["doubled"] += found.total() - len(found)
        wrong = [m for m in history if key == "train/loss" and m.value != m.step / 7]
        bad["of another value"] += len(wrong)
    pictures = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    for ending in (".png", ".webp"):  # each picture is logged in full and as a thumbnail
        found = Counter(int(n.split("+")[2]) for n in pictures if n.endswith(ending))
        bad["lost"] += len(set(steps[::50]) - set(found))
        bad["doubled"] += found.total() - len(found)
    names = {Path(file.path).name for file in client.list_artifacts(run_id)}
    bad["lost"] += not {"config.json", "tables", "images"} <= names
    run = client.get_run(run_id)
    bad["lost"] += run.info.status != "FINISHED"
    return bad


class _Server:
    """An MLflow server in the current folder, always at the same port."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        here = Path.cwd()
        settings = {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{here}/mlflow.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(here / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        }
        code = SERVER.replace('"127.0.0.1", 0', f'"127.0.0.1", {self.port}')
        code = code.replace("server = make_server", f"{SLOW}server = make_server")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.process.stdout.readline()  # it is ready

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def _server() -> Iterator[_Server]:
    server = _Server()
    try:
        yield server
    finally:
        server.kill()
