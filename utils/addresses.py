"""Addresses of models and data: a path, runs:/<run id>/<file>, models:/<name>@<alias>, or a URL.

`fetch` turns each of them into a local path. MLflow and fsspec are imported when first needed.
URLs are those of fsspec: s3://bucket/folder, gs://..., https://host/file, or hf://datasets/<name>,
which is a folder of Parquet files (of other data sets on the hub: hf://datasets/<name>@~parquet).
What they name is downloaded in whole into a cache on this machine: REMOTE_CACHE is its folder, and
REMOTE_CACHE_GIB its limit.
"""

import fcntl
import functools
import glob
import hashlib
import importlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils.cli import UserError, one_line
from utils.files import CACHE, TEMPORARY
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
URL = re.compile(r"[a-z][a-z0-9+]*://")
CACHE_GIB = 100
# What a file system states about a file that changes with its content, in lower case.
STATE = {"size", "etag", "mtime", "created", "lastmodified", "last-modified", "last_modified"}
STATE |= {"updated", "generation", "blob_id", "md5hash", "content-md5", "digest"}
SECRET = r"(?i)([?&][^=&\s]*(?:pass|pwd|secret|token|key|sig)[^=&\s]*=)[^&\s'\")]+"


def fetch(address: str) -> Path:
    """The local path of an address, downloaded if it is not local; a UserError if that fails."""
    if not address.startswith(MLFLOW):
        if not URL.match(address):
            return Path(address)
        root, _, name = address.rstrip("/").rpartition("/")
        return fetch_files(root, (name,)) / local_name(root, name)
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


def local_name(root: str, name: str) -> str:
    """The local name of a file below a URL: without a query."""
    return re.sub(r"[?#].*", "", name) if root.startswith("http") else name


@functools.cache
def fetch_files(root: str, names: tuple[str, ...]) -> Path:
    """A local folder in the place of the URL `root`, with the files and folders `names` below it.

    Names may be patterns. The folder is found again, also by other processes, as long as each
    remote file has the same size, date and ETag; an interrupted download continues. A UserError if
    something is missing or cannot be reached, or the cache is too small for it.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    where, options = without_credentials(f"{root}/{names[0]}"), {}
    with store_errors(f"cannot fetch {where}", how_to_reach), ThreadPool(8) as pool:
        if root.startswith("http"):
            from aiohttp import ClientTimeout

            limits = ClientTimeout(total=None, connect=60, sock_read=60)  # fsspec's total is 300 s
            options["client_kwargs"] = {"timeout": limits}
        system, base = fsspec.url_to_fs(root, **options)
        if isinstance(system, LocalFileSystem):
            return Path(base)
        is_pattern = not root.startswith("http") and any(map(glob.has_magic, names))
        paths = [f"{base}/{name}" for name in names]
        paths = [x for path in paths for x in system.glob(path)] if is_pattern else paths
        info, files = functools.partial(_info, system), {}
        for path, about in zip(paths, pool.map(info, paths), strict=True):
            found = {about["name"]: about}
            if about["type"] == "directory":
                found = system.find(path, detail=True)
            for name, file in found.items():
                relative = f"{path}{name.removeprefix(about['name'])}".removeprefix(f"{base}/")
                files[os.path.normpath(local_name(root, relative))] = file
        if not files:
            raise FileNotFoundError(where)
        if outside := [x for x in files if x.startswith(("..", "/"))]:
            raise UserError(f"{where}: {outside[0]} leads out of its folder; leave it out")
        state = [
            [name, {key: str(x) for key, x in files[name].items() if key.lower() in STATE}]
            for name in sorted(files)
        ]
        key = hashlib.sha256(json.dumps([without_credentials(root), state]).encode()).hexdigest()
        cache = Path(os.environ.get("REMOTE_CACHE") or CACHE / "remote").absolute()
        folder, staging = cache / key[:16], cache / f"{key[:16]}{TEMPORARY}"
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                _make_room(cache, where, sum(x.get("size") or 0 for x in files.values()), staging)
                get = functools.partial(_download, system, staging)
                bar = {"total": len(files), "desc": "downloading", "unit": " files"}
                for _ in ProgressBar(pool.imap(get, files.items()), **bar, leave=False, delay=1):
                    pass
                staging.rename(folder)
            os.utime(folder)
            with suppress(OSError):  # until this process ends, it is in use
                fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)
        return folder


def _info(system: Any, path: str) -> dict[str, Any]:
    try:
        return system.info(path)
    except FileNotFoundError as error:  # of which some file systems state the path alone
        raise FileNotFoundError(f"no such file or folder: {path}") from error


def _download(system: Any, staging: Path, file: tuple[str, dict[str, Any]]) -> None:
    """Download a file to its name in a folder, unless it is there."""
    target, about = staging / file[0], file[1]
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}{TEMPORARY}")
    system.get_file(about["name"], str(part))
    size = part.stat().st_size
    if about.get("size") not in (None, size):
        raise OSError(f"{file[0]} ended after {size:,} of {about['size']:,} bytes")
    part.replace(target)


def _make_room(cache: Path, where: str, size: int, staging: Path) -> None:
    """Remove what was used longest ago, and is not in use, until `size` bytes more fit."""
    limit = float(os.environ.get("REMOTE_CACHE_GIB") or CACHE_GIB) * 2**30
    others = sorted({x for x in cache.iterdir() if x.is_dir()} - {staging}, key=os.path.getmtime)
    sizes = {x: sum(file.stat().st_size for file in x.rglob("*")) for x in others}
    for old in others if size <= limit else ():
        if sum(sizes.values()) + size <= limit:
            break
        with suppress(OSError, Timeout), FileLock(old.with_suffix(".lock"), timeout=0):
            handle = os.open(old, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)
                del sizes[old]
            finally:
                os.close(handle)
    if sum(sizes.values()) + size > limit:
        used, most = sum(sizes.values()) / 2**30, f"{limit / 2**30:.3g} GiB"
        raise UserError(
            f"{where} takes {size / 2**30:.3g} GiB, but {used:.3g} of {most} in {cache} are in "
            "use; raise REMOTE_CACHE_GIB, or name a larger disk in REMOTE_CACHE"
        )


def how_to_reach(error: str) -> str:
    """What to do about an error of a file system."""
    if "nstall" in error:  # fsspec names the package
        return "pip install that package"
    return (
        "check the address, the network, and the credentials that its storage takes from the "
        "environment, such as AWS_ACCESS_KEY_ID or HF_TOKEN"
    )


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
    """Report any error as one line: each kind of MLflow or artifact store raises errors of its own.

    The UserError states `what` and the error, without passwords, and the `remedy` for it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
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
