"""Addresses of models and data: a path, runs:/<run id>/<file>, models:/<name>@<alias>, or a URL.

`fetch` turns each of them into a local path. MLflow and fsspec are imported when first needed.
"""

import functools
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from utils.cli import UserError, one_line

MLFLOW = ("runs:/", "models:/")
OUTPUT_TAG = "output_dir"  # the tag of a training's run that holds its output folder
START_OR_UNSET = "start the server or unset MLFLOW_TRACKING_URI to write to ./mlflow.db"


def fetch(address: str) -> Path:
    """The local path of an address, downloaded if it is not local.

    Raises:
        UserError: the address is malformed, or nothing can be downloaded from it.
    """
    if address.startswith(MLFLOW):
        return _fetch_from_mlflow(address)
    return _download(address) if re.match(r"[a-z][a-z0-9+]*://", address) else Path(address)


def _fetch_from_mlflow(address: str) -> Path:
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
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def open_client() -> Any:
    """An MLflow client of the tracking store, which is created where it is missing.

    Raises:
        UserError: MLFLOW_TRACKING_URI names no usable MLflow store.
    """
    import mlflow

    for name, level in (
        ("alembic", logging.WARNING),
        ("mlflow.store.db.utils", logging.CRITICAL),  # tracebacks
        ("urllib3.connectionpool", logging.ERROR),  # one line per attempt
    ):
        logging.getLogger(name).setLevel(level)
    uri = tracking_uri()
    database = uri.removeprefix("sqlite:///")
    # Two processes that create the tables of a new database at once would break it.
    lock = FileLock(database + ".lock") if database != uri else nullcontext()
    with store_errors(f"cannot use MLflow at {without_credentials(uri)}", START_OR_UNSET), lock:
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


@contextmanager
def store_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Report any error as one line: each kind of MLflow or artifact store raises errors of its own.

    Raises:
        UserError: `what` and the error, without passwords, and the remedy.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = without_credentials(one_line(error))
        raise UserError(f"{what} ({text})" + f"; {remedy}" * bool(remedy)) from error


def without_credentials(text: str) -> str:
    """The text without user names and passwords in URLs."""
    return re.sub(r"//[^/\s]*@", "//", text)


def find_run(run_id: str, client: Any = None) -> Any:
    """An MLflow run by its id.

    Raises:
        UserError: the store has no such run, or it is deleted.
    """
    from mlflow.exceptions import MlflowException

    where = without_credentials(tracking_uri())
    try:
        run = (client or open_client()).get_run(run_id)
    except MlflowException as error:
        raise UserError(
            f"no MLflow run {run_id!r} in {where}; copy the run id from mlflow ui or from the "
            "output of the previous stage"
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow run {run_id} in {where} is deleted; restore it, or name another"
        )
    return run


def output_dir_of(run_id: str) -> Path:
    """The output folder that a training's run was started with.

    Raises:
        UserError: see `find_run`.
    """
    return Path(find_run(run_id).data.tags.get(OUTPUT_TAG, ""))


def has_artifacts(run_id: str, folder: str) -> bool:
    """Whether an MLflow run has files in a folder of its artifacts.

    Raises:
        UserError: the artifacts cannot be listed.
    """
    with store_errors(f"cannot list the artifacts of {run_id}"):
        return bool(open_client().list_artifacts(run_id, folder))
