"""MLflow itself: its client, and calls of it in plain types. No other file imports it; late."""

import http.client
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from PIL import Image

from utils.cli import UserError, one_line

ADDRESSES = ("runs:/", "models:/")
START_TIMEOUT = 5  # seconds until a silent server counts as missing
AT_ONCE = 1000  # numbers in a call; MLflow takes no more


class Point(NamedTuple):
    """A number of a run.

    Attributes:
        key: its name.
        value: NaN and infinities are numbers, too.
        when: milliseconds since 1970.
        step: of the training.
        model_id: of the logged model that it is a figure of; None: of none.
        dataset_name, dataset_digest: of the data that it was measured on, as far as they are known.
    """

    key: str
    value: float
    when: int
    step: int
    model_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


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


def send_params(client: Any, run_id: str, params: dict[str, object]) -> None:
    """Log settings."""
    from mlflow.entities import Param

    params = [Param(key, str(value)) for key, value in params.items()]
    client.log_batch(run_id, params=params)


def send_points(client: Any, run_id: str, points: Iterable[Point]) -> None:
    """Log numbers, however many."""
    from mlflow.entities import Metric

    metrics = [Metric(*point) for point in points]
    for start in range(0, len(metrics), AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + AT_ONCE])


def send_inputs(
    client: Any, run_id: str, data_sets: Iterable[tuple[str, str]], models: Iterable[str]
) -> None:
    """Log what a run learns from: data sets, by path and SHA-256, and models, by id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

    tags = [InputTag("mlflow.data.context", "training")]
    digest_length = 36  # MLflow takes no more
    inputs = [
        DatasetInput(Dataset(Path(path).name, sha256[:digest_length], "local", path), tags)
        for path, sha256 in data_sets
    ]
    client.log_inputs(run_id, inputs, [LoggedModelInput(model_id) for model_id in models])


def send_output(client: Any, run_id: str, model_id: str, step: int) -> None:
    """Log that a run made a model."""
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def small_copy(image: Image.Image) -> Image.Image:
    """The small picture that MLflow's lists show in place of a picture."""
    from mlflow.tracking.multimedia import compress_image_size

    return compress_image_size(image)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow is there and will never take it, as when the run was deleted meanwhile."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    return 400 <= status < 500 and status not in (408, 429)  # those two ask to try again
