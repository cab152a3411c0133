"""The MLflow store where runs live; this file and registry.py import MLflow, and late."""

import http.client
import json
import logging
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock

from utils.cli import UserError, one_line
from utils.data.decoding import open_image
from utils.tracking import picture_table

ADDRESSES = ("runs:/", "models:/")
COLOURS = {"tokenizer": "#1f77b4", "gpt": "#ff7f0e"}
HOMES = {  # of the stages that are logged to the run of another
    "indices": ("tokenizer",),
    "samples": ("gpt",),
    "images": ("gpt", "tokenizer"),
}
START_TIMEOUT = 5  # seconds until a silent server counts as missing
PICTURE_FILES = 2  # of a picture: itself, and a small one for lists


def open_client() -> Any:
    """An MLflow client of the tracking store, which is created or checked first.

    Raises:
        UserError: what MLFLOW_TRACKING_URI names does not answer, or is no MLflow store.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path('mlflow.db').resolve()}"
    # MLflow's own patience is four minutes a call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(START_TIMEOUT))
    # A training says itself where its run is, and its progress is no upload's.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    address = os.environ["MLFLOW_TRACKING_URI"]
    if address.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=START_TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # it answers; what it does not let us do, it will say itself
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(
                f"no MLflow server answers at {address} ({one_line(error)}); start it, or unset "
                "MLFLOW_TRACKING_URI to write to ./mlflow.db"
            ) from error

    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line at every attempt
    # Two first starts at once would both create the tables, and both break.
    database = address.removeprefix("sqlite:///")
    lock = FileLock(database + ".lock") if database != address else nullcontext()
    try:
        with lock:
            client = mlflow.MlflowClient(address)
            client.search_experiments(max_results=1)
    except Exception as error:  # each kind of store has its own
        raise UserError(
            f"MLFLOW_TRACKING_URI={address} is no MLflow store that can be used "
            f"({one_line(error)}); fix it, or unset it to write to ./mlflow.db"
        ) from error
    return client


@contextmanager
def opening_a_run() -> Iterator[None]:
    """What a store that dies or fills up while a run is opened has to say, in a line.

    Raises:
        UserError: it does.
    """
    try:
        yield
    except (UserError, ValueError):
        raise
    except Exception as error:  # each kind of store has its own
        raise UserError(
            f"MLflow at {os.environ['MLFLOW_TRACKING_URI']} opens no run ({one_line(error)}); fix "
            "it, or unset MLFLOW_TRACKING_URI to write to ./mlflow.db"
        ) from error


def existing_run(client: Any, run_id: str) -> Any:
    """An MLflow run.

    Raises:
        UserError: there is none of that id, or it is deleted.
    """
    from mlflow.exceptions import MlflowException

    address = os.environ["MLFLOW_TRACKING_URI"]
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise UserError(
            f"no MLflow run {run_id!r} in {address}; copy the run id from mlflow ui or from the "
            "output of the stage before"
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow run {run_id} in {address} is deleted; restore it, or name another"
        )
    return run


def tag_of(run_id: str, key: str) -> str:
    """A tag of an MLflow run, "" where it has none.

    Raises:
        UserError: there is no such run.
    """
    return existing_run(open_client(), run_id).data.tags.get(key, "")


def has_artifacts(run_id: str, folder: str) -> bool:
    """Whether an MLflow run has anything in a folder of its artifacts.

    Raises:
        UserError: the artifacts cannot be listed.
    """
    try:
        return bool(open_client().list_artifacts(run_id, folder))
    except UserError:
        raise
    except Exception as error:  # each artifact store has its own
        raise UserError(f"cannot list the artifacts of {run_id}: {one_line(error)}") from error


def logged_points(client: Any, run_id: str) -> set[tuple[str, int]]:
    """The names and steps of all numbers that an MLflow run has."""
    names = client.get_run(run_id).data.metrics
    return {
        (name, point.step) for name in names for point in client.get_metric_history(run_id, name)
    }


def find_run(client: Any, run_id: str) -> Any:
    """An MLflow run; None for "", or one that is not in this store."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def fetch(address: str) -> Path:
    """The local path of a path or an MLflow address (`runs:/<id>/<artifact>`, `models:/...`).

    Raises:
        UserError: an address that MLflow does not know.
    """
    if not address.startswith(ADDRESSES):
        return Path(address)
    parts = address.split("/")[1:]
    odd = re.search(r"[%?#\\\x00-\x1f]", address) or {".", ".."} & set(parts)
    if odd or "" in parts[:-1]:
        raise UserError(
            f"{address!r:.200} is no address of an artifact; write runs:/<run id>/<artifact> or "
            "models:/<name>@<alias>"
        )
    open_client()

    import mlflow

    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=address))
    except Exception as error:  # each artifact store has its own
        raise UserError(f"cannot fetch {address} from MLflow: {one_line(error)}") from error


def experiment_of(run_id: str) -> str:
    """The name of the experiment that a run belongs to; "" for no run, or one that is gone."""
    if not run_id:
        return ""
    client = open_client()
    try:
        run = existing_run(client, run_id)
    except UserError:
        return ""
    return client.get_experiment(run.info.experiment_id).name


def check_home(run_id: str, homes: tuple[str, ...]) -> None:
    """Refuse a run that is of none of the stages `homes`, where there are any.

    Raises:
        UserError: it is of another, or there is no such run.
    """
    found = tag_of(run_id, "stage")
    if homes and found not in homes:
        raise UserError(
            f"the MLflow run {run_id} is that of a {found or 'stage that is not known'}, but this "
            f"belongs to the run of a {' or '.join(homes)}; name that one as --run_id, or omit it"
        )


def create_run(
    client: Any,
    stage: str,
    experiment: str,
    name: str,
    params: dict[str, Any],
    tags: dict[str, str],
) -> Any:
    """A new MLflow run in an experiment, which is made where it is missing.

    Raises:
        ValueError: too many params.
    """
    from mlflow.entities import Param

    if len(params) > 10:
        raise ValueError(f"at most 10 params, got {len(params)}; the rest is in config.json")
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            experiment_id = client.create_experiment(experiment)
        except Exception:  # another process was first
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
    if found is not None:
        experiment_id = found.experiment_id
    tags = {
        "stage": stage,
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "LOCAL",
        "mlflow.runColor": COLOURS[stage],
        **tags,
    }
    run = client.create_run(experiment_id, run_name=name, tags=tags)
    client.log_batch(
        run.info.run_id, params=[Param(key, str(value)) for key, value in params.items()]
    )
    return run


def send_metrics(
    client: Any,
    run_id: str,
    values: dict[str, float],
    seconds: float,
    step: int,
    model_id: str | None = None,
) -> None:
    """Log numbers of one step, or of a model, taken at a time in `seconds` since 1970."""
    from mlflow.entities import Metric

    when = int(seconds * 1000)
    client.log_batch(
        run_id, metrics=[Metric(key, value, when, step, model_id) for key, value in values.items()]
    )


def send_table(client: Any, run_id: str, output_dir: Path, name: str) -> None:
    """Log a table of `picture_table.write`; MLflow's own call would append to one before it."""
    folder = picture_table.FOLDER
    client.log_artifacts(run_id, str(output_dir / folder / name), f"{folder}/{name}")
    client.log_artifact(run_id, str(output_dir / folder / f"{name}.json"), folder)
    # The page of MLflow that compares tables asks this tag which there are.
    tag = "mlflow.loggedArtifacts"
    known = json.loads(client.get_run(run_id).data.tags.get(tag, "[]"))
    entry = {"path": f"{folder}/{name}.json", "type": "table"}
    if entry not in known:
        client.set_tag(run_id, tag, json.dumps([*known, entry]))


def send_numbers(client: Any, run_id: str, numbers: list[tuple[str, float, int, int]]) -> None:
    """Log many numbers: key, value, time in milliseconds since 1970, and step of each."""
    from mlflow.entities import Metric

    for start in range(0, len(numbers), 1000):  # MLflow takes no more in a call
        metrics = [Metric(*number) for number in numbers[start : start + 1000]]
        client.log_batch(run_id, metrics=metrics)


def pictures(client: Any, run_id: str) -> dict[tuple[str, int, int], list[str]]:
    """The artifacts of each picture of a run, by its key, step and time in milliseconds."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for file in client.list_artifacts(run_id, "images"):
        # MLflow's names, of this version or an earlier one: key+step+3+timestamp+1700+id.png
        parts = re.split("[+%]", Path(file.path).name)
        if len(parts) >= 6 and parts[2].isdecimal() and parts[4].isdecimal():
            which = re.sub("[~#]", "/", parts[0]), int(parts[2]), int(parts[4])
            found.setdefault(which, []).append(file.path)
    return found


def send_picture(
    client: Any, run_id: str, path: Path, key: str, step: int, when: int, *, check: bool
) -> None:
    """Log the picture in a file, taken at a time in milliseconds since 1970.

    Args:
        check: whether it may be there already, as when a server died before it answered.
    """
    there = pictures(client, run_id).get((key, step, when), []) if check else []
    with open_image(path) as image:
        if not there:
            client.log_image(run_id, image, key=key, step=step, timestamp=when)
        elif len(there) < PICTURE_FILES:
            from mlflow.tracking.multimedia import compress_image_size

            name = there[0].removesuffix(".png")
            with TemporaryDirectory() as folder:
                small = Path(folder) / f"{Path(name).name}{name[-37]}compressed.webp"
                compress_image_size(image).save(small)
                client.log_artifact(run_id, str(small), "images")
    if check:
        client.set_tag(run_id, "mlflow.loggedImages", True)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow is there and will never take it, as when the run was deleted meanwhile."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    return 400 <= status < 500 and status not in (408, 429)  # those two ask to try again
