"""The MLflow store where runs live; this file and utils/registry.py import MLflow, and late."""

import http.client
import json
import logging
import os
import sys
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from utils import picture_table
from utils.cli import UserError

ADDRESSES = ("runs:/", "models:/")
COLOURS = {"tokenizer": "#1f77b4", "gpt": "#ff7f0e"}
HOMES = {  # of the stages that are logged to the run of another
    "indices": ("tokenizer",),
    "samples": ("gpt",),
    "images": ("gpt", "tokenizer"),
}
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


def check_stage(run: Any, stage: str) -> None:
    """Refuse a run of another stage than the one whose run this stage is logged to.

    Raises:
        UserError: it is one.
    """
    homes = HOMES.get(stage, (stage,))
    found = run.data.tags.get("stage", stage)
    if stage and found not in homes:
        raise UserError(
            f"the MLflow run {run.info.run_id} is that of a {found}, but {stage} belong to the run "
            f"of a {' or '.join(homes)}; give that one as --run_id, or leave it away"
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


def one_line(error: Exception) -> str:
    """What an error says, in one short line."""
    return " ".join(str(error).split())[:150] or type(error).__name__


def is_refusal(error: Exception) -> bool:
    """Whether MLflow is there and will never take it, as when the run was deleted meanwhile."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    return 400 <= status < 500 and status not in (408, 429)  # those two ask to try again
