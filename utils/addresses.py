"""Addresses of models and data: a path, runs:/<run id>/<file>, models:/<name>@<alias>, or a URL.

`fetch` turns each of them into a local path. MLflow and fsspec are imported when first needed.
"""

import functools
import hashlib
import importlib
import logging
import os
import posixpath
import re
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from filelock import FileLock

from utils.cli import UserError, first_few, one_line
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
THREADS = 32  # that download; where several would mix up files, one
VERSION = "(?i)etag|md5|checksum|modified|mtime|updated|created|generation|blob_id"  # of a file
SERVER = "ENDPOINT_URL|HF_ENDPOINT|AWS_PROFILE|STORAGE_(ACCOUNT_NAME|EMULATOR)"  # variables
SECRET = r"(?i)([?&][^=&\s]*(?:pass|pwd|secret|token|key|sig)[^=&\s]*=)[^&\s'\")]+"
_originals: dict[Path, tuple["Mirror", str]] = {}  # of folders into which files were downloaded


def is_url(address: str | Path) -> bool:
    """Whether an address is s3://, https:// or one of another file system, not a path."""
    return bool(re.match(r"(?i)(?!file:)[a-z][a-z0-9+]*://", str(address)))


def fetch(address: str) -> Path:
    """The local path of an address, downloaded if it is not local; a UserError if that fails."""
    if not address.startswith(MLFLOW):
        if is_url(address):
            return download((address,))[address][0]
        return Path(address.removeprefix("file://"))
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
def download(urls: tuple[str, ...], endings: tuple[str, ...] = ("",)) -> dict[str, list[Path]]:
    """Local copies, by URL, of the file or folder there, or of all that its `*` stands for.

    Of a folder, files with one of the `endings`. Copies stay in `outputs/cache/remote`; later, only
    what has changed is downloaded. A UserError if there are no files, or for lack of room.
    """
    with ThreadPool(THREADS) as pool:
        found = pool.map(functools.partial(_find, endings=endings), urls)
    copies: dict[str, list[Path]] = {}
    with store_errors(f"cannot fetch {first_few(urls)}"):
        for mirror in {mirror for mirror, _, _ in found}:
            own = [some for one, _, some in found if one is mirror]
            mirror.update({path: about for some in own for path, about in some.items()})
        for url, (mirror, paths, some) in zip(urls, found, strict=True):
            copies[url] = [mirror.copy_of(path) for path in paths]
            kept = {*map(mirror.copy_of, some)}
            for copy, path in zip(copies[url], paths, strict=True):
                _originals[copy.parent] = mirror, path.rpartition("/")[0]
                for file in {*copy.rglob("*")} - kept:  # in a folder: what is not there any more
                    if file.is_file() and file.name.lower().endswith(endings):
                        file.unlink()
    return copies


def download_named(folder: Path, names: Sequence[str]) -> None:
    """Download files named in one that `download` has put into this folder; else, do nothing.

    This is done once, as if they never changed. Those that do not exist are left out.
    """
    if names and folder in _originals:
        mirror, root = _originals[folder]
        quote: Callable[[str], str] = urllib.parse.quote if mirror.is_web else str
        with store_errors(f"cannot fetch what is named in {folder}"):
            mirror.update({f"{root}/{quote(name)}": {} for name in names if name[0] != "/"})


def _find(url: str, endings: tuple[str, ...]) -> tuple["Mirror", list[str], dict[str, Any]]:
    """The paths that a URL stands for, and what is known of each file there."""
    import fsspec

    with store_errors(f"cannot fetch {without_credentials(url)}"):
        if re.search(rf"://[^/\s]*:[^/\s]*@|{SECRET.removeprefix('(?i)')}", url, re.IGNORECASE):
            raise OSError("logs would show its password; use the environment or fsspec's settings")
        options = {"timeout": 1e5} if re.match("(?i)http", url) else {}  # not aiohttp's 5 minutes
        system, path = fsspec.url_to_fs(url, **options)
        paths = sorted(system.glob(path)) if re.search(r"[*[]", path) else [path]
        files: dict[str, Any] = {}
        for path in paths:
            about = system.info(path)
            if about["type"] == "directory":
                if getattr(system.find, "__func__", 0) is fsspec.AbstractFileSystem.find:
                    raise OSError("a folder there cannot be listed reliably; give files")
                inside = system.find(path, detail=True).items()
                files |= {name: x for name, x in inside if name.lower().endswith(endings)}
            elif about.get("mimetype") == "text/html":
                raise OSError("a web page; give the URL of a file")
            else:
                files[path] = about
        if not files:
            raise FileNotFoundError("no such files")
        return Mirror(system), paths, files


@functools.cache
class Mirror:
    """Local copies of files in a file system of fsspec, by their path there."""

    def __init__(self, system: Any) -> None:
        self._system, self.is_web = system, "http" in system.protocol
        server = [item for item in sorted(os.environ.items()) if re.search(SERVER, item[0])]
        place = system.protocol, system.storage_options, server
        self._home = REMOTE.absolute() / hashlib.sha256(repr(place).encode()).hexdigest()[:16]

    def copy_of(self, path: str) -> Path:
        """Where the copy of a file or folder is; a ValueError for a path that leaves its root."""
        if self.is_web:
            parts = urllib.parse.urlsplit(path)
            name, ending = posixpath.splitext(urllib.parse.unquote(parts.path))
            path = parts.netloc + name + urllib.parse.quote(parts.query, "") + ending
        inside = posixpath.normpath(path.lstrip("/"))
        if inside.startswith(".."):
            raise ValueError(f"{path} is outside of its root")
        return self._home / "files" / inside

    def update(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Download files that are not here, or have changed; an interrupted download continues.

        `files` are, by path, what the file system says about each; {}: it never changes.
        """
        self._home.mkdir(parents=True, exist_ok=True)
        lock, staging = FileLock(self._home / "lock"), self._home / "staging"
        with lock, (self._home / "versions").open("a+", newline="\n") as log:
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
            staging.mkdir()
            log.seek(0)
            known = {path: version for version, _, path in (x[:-1].partition(" ") for x in log)}
            wanted = {}
            for path, about in files.items():
                version = _version(about)
                if (version and known.get(path) != version) or not self.copy_of(path).is_file():
                    wanted[path] = version
            size = sum(files[path].get("size") or 0 for path in wanted)
            if size > (free := shutil.disk_usage(staging).free * 9 // 10):
                raise OSError(f"{size:,} bytes, but room for {free:,}; clear {REMOTE}")
            with ThreadPool(1 if self._system.protocol in ("ftp", "tar") else THREADS) as pool:
                done = pool.imap_unordered(self._get, wanted)
                for path in ProgressBar(done, "downloading", len(wanted), unit=" files"):
                    log.write(f"{wanted.get(path)} {path}\n")

    def _get(self, path: str) -> str:
        """Download a file; its path, or "" if it does not exist."""
        # After an error, threads of this process may write while the next one downloads.
        staging = self._home / "staging" / f"{os.getpid()}-{threading.get_ident()}"
        try:
            self._system.get_file(path, str(staging))
        except FileNotFoundError:
            return ""
        self.copy_of(path).parent.mkdir(parents=True, exist_ok=True)
        staging.replace(self.copy_of(path))
        return path


def _version(about: Mapping[str, Any]) -> str:
    """A digest of what changes with a file, "" for {}; if nothing does, another one each time."""
    known = sorted((key, str(value)) for key, value in about.items() if re.search(VERSION, key))
    text = repr((known, about.get("size"))) if known else os.urandom(8).hex()
    return hashlib.sha256(text.encode()).hexdigest()[:16] if about else ""


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
