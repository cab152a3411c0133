"""The MLflow store: what is opened, asked and sent to, where a run lives."""

import http.client
import logging
import os
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from utils.cli import UserError

DEFAULT_EXPERIMENT = "image-synthesis"
ADDRESSES = ("runs:/", "models:/")
START_TIMEOUT = 5  # seconds until a silent server counts as missing


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
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
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
            f"({one_line(error)}); mend it, or unset it to write to ./mlflow.db"
        ) from error
    return client


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


def logged_points(client: Any, run_id: str) -> set[tuple[str, int]]:
    """The names and steps of all numbers that an MLflow run has."""
    names = client.get_run(run_id).data.metrics
    return {
        (name, point.step) for name in names for point in client.get_metric_history(run_id, name)
    }


def fetch(address: str) -> Path:
    """The local path of a path or an MLflow address (`runs:/<id>/<artifact>`, `models:/...`).

    Raises:
        UserError: an address that MLflow does not know.
    """
    if not address.startswith(ADDRESSES):
        return Path(address)
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


def create_run(
    client: Any, experiment: str, name: str, params: dict[str, Any], tags: dict[str, str]
) -> Any:
    """A new MLflow run in an experiment, which is made where it is missing."""
    from mlflow.entities import Param

    experiment = experiment or DEFAULT_EXPERIMENT
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
    run = client.create_run(experiment_id, run_name=name, tags=tags)
    client.log_batch(
        run.info.run_id, params=[Param(key, str(value)) for key, value in params.items()]
    )
    return run


def send_metrics(
    client: Any, run_id: str, values: dict[str, float], seconds: float, step: int
) -> None:
    """Log numbers of one step, which were taken at a time in `seconds` since 1970."""
    from mlflow.entities import Metric

    when = int(seconds * 1000)
    client.log_batch(
        run_id, metrics=[Metric(key, value, when, step) for key, value in values.items()]
    )


def send_table(client: Any, run_id: str, name: str, columns: dict[str, list[Any]]) -> None:
    """Log a table, whose columns may hold pictures."""
    import mlflow

    data = {
        key: [mlflow.Image(v) if isinstance(v, Image.Image) else v for v in values]
        for key, values in columns.items()
    }
    client.log_table(run_id, data, artifact_file=f"tables/{name}.json")


def one_line(error: Exception) -> str:
    """What an error says, in one short line."""
    return " ".join(str(error).split())[:150] or type(error).__name__


def is_refusal(error: Exception) -> bool:
    """Whether MLflow is there and will never take it, as when the run was deleted meanwhile."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    return 400 <= status < 500 and status not in (408, 429)  # those two ask to try again
