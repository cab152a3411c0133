"""Tracking as a team has it: MLflow with authentication, on PostgreSQL and an S3-compatible store.

`python -m tests.team_server` keeps all three running in a temporary folder, on free ports of this
machine, and prints what a client needs. PostgreSQL is Debian's package, the store is moto's server.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.screenshots import answers
from utils import cli

HOST, BUCKET, ADMIN, USER = "127.0.0.1", "artifacts", "admin", "alice"
PATIENCE = 300  # seconds until a server answers, on a machine that has other things to do
MLFLOW = """[mlflow]
default_permission = EDIT
database_uri = {database}
admin_username = {admin}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# Each call would hash the password anew, which takes longer than most calls do.
auth_cache_ttl_seconds = 60
"""


def binaries() -> Path | None:
    """The folder with PostgreSQL's programs, of the newest version; None without the package."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda path: int(path.parent.name), default=None)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def wait_for_server(process: subprocess.Popen, log: Path, condition: Callable[[], Any]) -> None:
    """Wait until a server answers; a UserError with the end of its log if it ends or hangs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            rest = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise cli.UserError(f"{log.stem} does not start:\n{rest}")
        time.sleep(0.1)


@dataclass
class TeamServer:
    """The three servers; `environment` holds what a client of MLflow needs, and nothing else."""

    folder: Path
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_hex(12))
    _secret: str = field(default_factory=lambda: secrets.token_hex(12))  # of all but the user
    _database: int = field(default_factory=free_port)
    _store: int = field(default_factory=free_port)
    _mlflow: ExitStack = field(default_factory=ExitStack)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }

    def database(self, name: str) -> str:
        return f"postgresql://mlflow:{self._secret}@{HOST}:{self._database}/{name}"

    @cached_property
    def s3(self) -> Any:
        """A client of the store, with the credentials that MLflow's server alone has."""
        import boto3

        keys = {"aws_access_key_id": "mlflow", "aws_secret_access_key": self._secret}
        address = f"http://{HOST}:{self._store}"
        return boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)

    @contextlib.contextmanager
    def _process(
        self, name: str, *words: object, stop: int = signal.SIGTERM, **options: Any
    ) -> Iterator[tuple[subprocess.Popen, Path]]:
        """A server in a session of its own, so that Ctrl-C leaves it to us; and its log."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            command = [str(word) for word in words]
            both = {"stdout": out, "stderr": out, "start_new_session": True}
            process = subprocess.Popen(command, **both, **options)
        try:
            yield process, log
        finally:
            process.send_signal(stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):  # what the server has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @contextlib.contextmanager
    def _postgresql(self, programs: Path) -> Iterator[None]:
        import psycopg

        # PostgreSQL refuses to run as root.
        own: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []}
        own = own if os.getuid() == 0 else {}
        home, password = self.folder / "postgresql", self.folder / "postgresql" / "password"
        home.mkdir(mode=0o700)
        password.write_text(self._secret)
        if own:
            self.folder.chmod(0o711)
            for path in (home, password):
                shutil.chown(path, own["user"], own["group"])
        cluster = home / "cluster"
        words = ("--username=mlflow", f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync")
        words = (programs / "initdb", "-D", cluster, *words, "--encoding=UTF8", "--locale=C")
        subprocess.run(words, cwd=home, check=True, stdout=subprocess.DEVNULL, **own)
        options = ("-p", self._database, "-c", f"listen_addresses={HOST}", "-k", home)
        server = (programs / "postgres", "-D", cluster, *options)

        def connect() -> Any:
            with contextlib.suppress(psycopg.OperationalError):
                return psycopg.connect(self.database("postgres"))

        # SIGINT ends the connections; SIGTERM would wait for MLflow to close them.
        with self._process("postgresql", *server, stop=signal.SIGINT, cwd=home, **own) as started:
            wait_for_server(*started, lambda: (connection := connect()) and not connection.close())
            connection = connect()
            connection.autocommit = True
            for name in ("mlflow", "users"):
                connection.cursor().execute(f"CREATE DATABASE {name}")
            connection.close()
            yield

    @contextlib.contextmanager
    def _start_mlflow(self) -> Iterator[None]:
        config = self.folder / "users.ini"
        config.touch(mode=0o600)
        text = {"database": self.database("users"), "admin": ADMIN, "password": self._secret}
        config.write_text(MLFLOW.format(**text))
        kept = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
        secret = {  # arguments would be in the list of processes
            "MLFLOW_BACKEND_STORE_URI": self.database("mlflow"),
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._secret,
            "MLFLOW_S3_ENDPOINT_URL": self.s3.meta.endpoint_url,
            "AWS_ACCESS_KEY_ID": "mlflow",
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # more processes
        }
        command = (sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth")
        command = (*command, "--artifacts-destination", f"s3://{BUCKET}", "--serve-artifacts")
        options = ("--host", HOST, "--port", self.port, "--workers", 1)
        env = {"cwd": self.folder, "env": kept | secret}
        with self._process("mlflow", *command, *options, stop=signal.SIGKILL, **env) as started:
            wait_for_server(*started, lambda: answers(f"{self.address}/health"))
            yield

    def stop_mlflow(self) -> None:
        self._mlflow.close()

    def start_mlflow(self) -> None:
        """Start MLflow's server again, on the same port."""
        self._mlflow.enter_context(self._start_mlflow())

    def _create_user(self) -> None:
        """An account without the administrator's rights, as a member of a team has it."""
        token = b64encode(f"{ADMIN}:{self._secret}".encode()).decode()
        headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
        body = json.dumps({"username": USER, "password": self.password}).encode()
        address = f"{self.address}/api/2.0/mlflow/users/create"
        urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=60).close()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Run all three; at the end each is stopped, the last one first."""
        programs = binaries()
        if programs is None:
            raise cli.UserError("no PostgreSQL in /usr/lib/postgresql; install Debian's postgresql")
        store = (sys.executable, "-m", "moto.server", "-H", HOST, "-p", self._store)
        with self._process("moto", *store) as started, self._postgresql(programs):
            wait_for_server(*started, lambda: answers(f"{self.s3.meta.endpoint_url}/moto-api/"))
            self.s3.create_bucket(Bucket=BUCKET)
            with self._mlflow:
                self.start_mlflow()
                self._create_user()
                yield


@contextlib.contextmanager
def team_server() -> Iterator[TeamServer]:
    """The three servers, in a temporary folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="team-") as folder:
        server = TeamServer(Path(folder))
        with server.run():
            yield server


def main(arguments: argparse.Namespace) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with team_server() as server:
        print(f"MLflow on PostgreSQL, with artifacts in s3://{BUCKET}; user {USER}. For clients:\n")
        for name, value in server.environment.items():
            print(f"export {name}={value}")
        print("\nCtrl-C stops all three servers and deletes what they hold.", flush=True)
        signal.pause()


if __name__ == "__main__":
    cli.run(main, cli.make_parser(__doc__, prog="python -m tests.team_server"))
