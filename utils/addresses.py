"""Addresses of models and data: a path, runs:/<run id>/<file>, models:/<name>@<alias>, or a URL.

`fetch` turns each of them into a local path. MLflow and fsspec are imported when first needed.
"""

import functools
import hashlib
import importlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from utils.cli import UserError, one_line
from utils.files import CACHE
from utils.progress import ProgressBar

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
REMOTE = CACHE / "remote"  # copies of files at URLs
THREADS = 32  # that download
DIGEST = 16  # characters
SECRET = r"(?i)([?&][^=&\s]*(?:pass|pwd|secret|token|key|sig)[^=&\s]*=)[^&\s'\")]+"
copies: list["Copy"] = []  # that this process uses


def is_url(address: str | Path) -> bool:
    """Whether an address is s3://, https:// or one of another file system, not a path."""
    return bool(re.match(r"[a-z][a-z0-9+]*://", str(address)))


def fetch(address: str) -> Path:
    """The local path of an address, downloaded if it is not local; a UserError if that fails."""
    if not address.startswith(MLFLOW):
        return download(address)[0] if is_url(address) else Path(address)
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
def download(url: str, endings: tuple[str, ...] = ("",)) -> list[Path]:
    """The local copy of a file or a folder at a URL, or of each file that its `*` stands for.

    Of a folder, files with one of the `endings`. Copies stay in `outputs/cache`, and later only
    what has changed is downloaded. A UserError for no files, no connection and a full disk.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    with store_errors(f"cannot fetch {without_credentials(url)}"):
        system, path = fsspec.url_to_fs(url)
        if isinstance(system, LocalFileSystem):
            return [Path(path)]
        found = system.glob(path, detail=True) if "*" in path else {path: system.info(path)}
        root = path.partition("*")[0].rpartition("/")[0]
        if is_folder := path in found and found[path]["type"] == "directory":
            files = system.find(path, detail=True).items()
            root, found = path, {name: x for name, x in files if name.lower().endswith(endings)}
        if not found:
            raise FileNotFoundError("no such files")
        copy = Copy(system, root)
        names = {name[len(root) + 1 :]: about for name, about in found.items()}
        copy.update(names, is_complete=is_folder)
        return [copy.folder] if is_folder else [copy.folder / name for name in names]


def download_named(folder: Path, names: Iterable[str]) -> None:
    """Download files of these names, if they exist, into a folder where `download` has put some.

    Those that are there already are taken to be unchanged. Other folders are left as they are.
    """
    for copy in copies:
        if folder.is_relative_to(copy.folder):
            place = folder.relative_to(copy.folder)
            inside = (str(place / x) for x in names if not x.startswith("/") and ".." not in x)
            with store_errors(f"cannot fetch the files of {folder}"):
                copy.update({name: {} for name in inside})


class Copy:
    """The local copy of files below a folder in a file system of fsspec.

    Attributes:
        folder: where the copies are; it has the name of the original.
    """

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root
        key = hashlib.sha256(system.unstrip_protocol(root).encode()).hexdigest()[:16]
        self.folder = (REMOTE / key / PurePosixPath(root).name).absolute()
        copies.append(self)

    def update(self, files: Mapping[str, Any], *, is_complete: bool = False) -> None:
        """Download the files that are not there yet, or have changed.

        Args:
            files: what the file system says about each, by name; {}: it never changes.
            is_complete: there are no others; what is left of them is removed.
        """
        home = self.folder.parent
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "lock"), (home / "versions").open("a+", newline="\n") as log:
            os.utime(home)
            log.seek(0)
            known = {line[DIGEST + 1 : -1]: line[:DIGEST] for line in log}
            versions = {name: about and _version(about) for name, about in files.items()}
            wanted = [
                name
                for name, version in versions.items()
                if (version and version != known.get(name)) or not (self.folder / name).is_file()
            ]
            for name in known.keys() - versions.keys() if is_complete else ():
                (self.folder / name).unlink(missing_ok=True)
            _make_room(home, sum(files[name].get("size") or 0 for name in wanted))
            with ThreadPool(THREADS) as pool:
                done = pool.imap_unordered(self._get, wanted)
                for name in ProgressBar(done, "downloading", len(wanted), unit=" files"):
                    if version := versions.get(name):
                        log.write(f"{version} {name}\n")

    def _get(self, name: str, pauses: Sequence[float] = (1, 5)) -> str:
        """Download a file, and again after pauses; its name, or "" if it does not exist."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        staging = file.with_name(f"{file.name}.part")
        try:
            self._system.get_file(f"{self._root}/{name}", str(staging))
        except FileNotFoundError:
            return ""
        except Exception:  # each file system raises its own
            if not pauses:
                raise
            time.sleep(pauses[0])
            return self._get(name, pauses[1:])
        staging.replace(file)
        return name


def _version(about: Mapping[str, Any]) -> str:
    """A digest of what says whether a file has changed."""
    # A server may redirect to another URL each time.
    known = sorted((key, str(value)) for key, value in about.items() if key != "url")
    return hashlib.sha256(repr(known).encode()).hexdigest()[:DIGEST]


def _make_room(home: Path, size: int) -> None:
    """Remove the longest unused copies but `home` until so many bytes fit on the disk."""
    others = sorted({*REMOTE.iterdir()} - {home}, key=lambda x: x.stat().st_mtime)
    while size > (free := shutil.disk_usage(REMOTE).free * 9 // 10):
        if not others:
            raise OSError(f"{size:,} bytes are more than nine tenths of the free disk, {free:,}")
        shutil.rmtree(others.pop(0))


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
