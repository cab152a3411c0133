"""Addresses of models and data: a path, runs:/<run id>/<file>, models:/<name>@<alias>, or a URL.

`fetch` turns each of them into a local path. MLflow and fsspec are imported when first needed.
"""

import functools
import importlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from filelock import FileLock

from utils.cli import UserError, one_line

MLFLOW = ("runs:/", "models:/")
OUTPUT_TAG = "output_dir"  # the tag of a training's run that holds its output folder
NOT_INSTALLED = "MLflow is not installed (pip install mlflow)"
START_SECONDS = 20  # for the first answer of a server
QUIET = {
    "alembic": logging.WARNING,
    "mlflow.store.db.utils": logging.CRITICAL,  # tracebacks
    "mlflow.tracking.context": logging.ERROR,  # no git
    "urllib3.connectionpool": logging.ERROR,  # one line per attempt
}
SECRET = r"(?i)([?&][^=&\s]*(?:pass|pwd|secret|token|key|sig)[^=&\s]*=)[^&\s'\")]+"


def fetch(address: str) -> Path:
    """The local path of an address, downloaded if it is not local; a UserError if that fails."""
    if not address.startswith(MLFLOW):
        return _download(address) if re.match(r"[a-z][a-z0-9+]*://", address) else Path(address)
    parts = address.split("/")[1:]
    if re.search(r"[%?#\\\x00-\x1f]", address) or {".", ".."} & set(parts) or "" in parts[:-1]:
        raise UserError(
            f"{address!r:.200} is not the address of an artifact; write runs:/<run id>/<artifact> "
            "or models:/<name>@<alias>"
        )
    open_client()
    import mlflow

    with store_errors(f"cannot fetch {address} from MLflow"):
        uri = tracking_uri()
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=address, tracking_uri=uri))


@functools.cache
def _download(url: str) -> Path:
    """Download a file or a folder by fsspec, once per process."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    with store_errors(f"cannot fetch {without_credentials(url)}"):
        system, path = fsspec.url_to_fs(url)
        if isinstance(system, LocalFileSystem):
            return Path(path)
        target = Path(tempfile.mkdtemp(prefix="fetched-")) / Path(path).name
        system.get(path, str(target), recursive=system.isdir(path))
        return target


def tracking_uri() -> str:
    """The address of the MLflow store: MLFLOW_TRACKING_URI, or ./mlflow.db."""
    path = str(Path("mlflow.db").resolve())
    if {"%", "?", "#"} & set(path):  # have a meaning in an address
        path = "mlflow.db"
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


def is_installed() -> bool:
    """Whether this machine has MLflow."""
    with suppress(ImportError):
        return bool(importlib.import_module("mlflow"))
    return False


def open_client() -> Any:
    """An MLflow client of the tracking store, which is created where it is missing.

    A UserError if there is no MLflow, or MLFLOW_TRACKING_URI names no usable store.
    """
    if not is_installed():
        raise UserError(f"{NOT_INSTALLED}; this needs it")
    import mlflow

    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    uri = tracking_uri()
    database = uri.removeprefix("sqlite:///")
    # Two processes that create the tables of a new database at once would break it.
    lock = FileLock(database + ".lock") if database != uri else nullcontext()
    with store_errors(f"cannot use MLflow at {without_credentials(uri)}", how_to_connect), lock:
        client = mlflow.MlflowClient(uri)
        patience = START_SECONDS if database == uri else None
        with ThreadPool(1) as pool:  # whose threads do not keep a process from ending
            pool.apply_async(client.search_experiments, kwds={"max_results": 1}).get(patience)
    return client


@contextmanager
def store_errors(what: str, remedy: Callable[[str], str] = lambda _: "") -> Iterator[None]:
    """Any error as a UserError: `what`, the error without passwords, and the `remedy` for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each kind of MLflow or artifact store raises its own
        parts = f"{what} ({without_credentials(one_line(error))})", remedy(str(error))
        raise UserError("; ".join(filter(None, parts))) from error


def how_to_connect(error: str) -> str:
    """What to do about an error of the MLflow store when it is opened."""
    if re.search(r"error code 40[13]|Unauthorized", error):
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if "CERTIFICATE_VERIFY_FAILED" in error:
        return "name the server's certificate in MLFLOW_TRACKING_SERVER_CERT_PATH"
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return "start the server or unset MLFLOW_TRACKING_URI to write to ./mlflow.db"
    return "make that file writable, or name another store in MLFLOW_TRACKING_URI"


def without_credentials(text: str) -> str:
    """The text without user names and passwords in URLs."""
    return re.sub(SECRET, r"\1...", re.sub(r"//[^/\s]*@", "//", text))


def find_run(run_id: str, client: Any = None) -> Any:
    """An MLflow run by its id; a UserError if the store has no such run, or it is deleted."""
    client, where = client or open_client(), without_credentials(tracking_uri())
    remedy = "copy the run id from mlflow ui or from the output of the previous stage"
    with store_errors(f"no MLflow run {run_id!r} in {where}", lambda _: remedy):
        run = client.get_run(run_id)
    if run.info.lifecycle_stage == "deleted":
        raise UserError(f"the MLflow run {run_id} in {where} is deleted; restore or replace it")
    return run


def has_run(run_id: str) -> bool:
    """Whether the store has an MLflow run."""
    with suppress(UserError):
        return bool(run_id and find_run(run_id))
    return False


def output_dir_of(run_id: str) -> Path:
    """The output folder that a training's run was started with; for errors see `find_run`."""
    return Path(find_run(run_id).data.tags.get(OUTPUT_TAG, ""))
