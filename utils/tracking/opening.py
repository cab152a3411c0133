"""How a run of MLflow is opened: its experiment, name, tags and parent.

Everything follows the conventions of MLflow's own client and of platforms that set its names in
the environment: MLFLOW_EXPERIMENT_NAME and _ID, MLFLOW_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_TAGS,
MLFLOW_NESTED_RUN.
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from utils.addresses import OUTPUT_TAG, find_run, open_client, tracking_uri, without_credentials
from utils.cli import Flags, UserError

PARENTS = {  # the stages whose runs a later stage logs to
    "indices": ("tokenizer",),
    "samples": ("gpt",),
    "images": ("gpt", "tokenizer"),
}
NOTE = "mlflow.note.content"
LINEAGE = "lineage.json"  # in the output folder of a training and among its artifacts
NOT_COMPARED = (  # flags of a training that do not make it another
    *("output_dir", "run_name", "experiment", "register", "resume", "debug", "device"),
    *("num_workers", "path_to_data", "model_dir", "checkpoint_every", "evaluate_every"),
    *("compile", "allow_outside_paths", "skip_bad_images", "feature_weights", "lpips_weights"),
)
IN_NAME = ("quantizer", "codebook_size", "num_layers", "dim", "window_size", "init_from", "preset")
MAX_NAME = 100  # characters


def given_settings(flags: Flags) -> dict[str, Any]:
    """The settings on the command line by which trainings differ, without paths and the like."""
    names = sorted(flags.given - set(NOT_COMPARED))
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def name_of(flags: Flags, model: str) -> str:
    """The name of a training's run: `--run_name`, MLFLOW_RUN_NAME, or the model and what is set.

    What `model` states already is not repeated.
    """
    if name := flags.run_name or os.environ.get("MLFLOW_RUN_NAME"):
        return name
    words = [f"{key}{value}" for key, value in given_settings(flags).items() if key not in IN_NAME]
    return re.sub(r"[^\w.-]+", "_", "-".join([model, *words]))[:MAX_NAME].rstrip("-_.")


def find_experiment(client: Any, name: str, fallback: str) -> str:
    """The id of an experiment, which is created if it does not exist.

    `name` is what the user chose; without it, MLFLOW_EXPERIMENT_NAME and MLFLOW_EXPERIMENT_ID
    count, then `fallback`.

    Raises:
        UserError: it is deleted.
    """
    from mlflow.exceptions import MlflowException

    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    if not name and (number := os.environ.get("MLFLOW_EXPERIMENT_ID")):
        found = client.get_experiment(number)
    else:
        name = name or fallback
        found = client.get_experiment_by_name(name)
    if found is None:
        place = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):  # MLflow does not quote a ? in its own choice
            place = Path("mlruns", re.sub(r"[^\w.-]+", "-", name)).resolve().as_uri()
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException as error:  # another process may have created it meanwhile
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {found.name!r} is deleted; choose another --experiment, or "
            f"restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return found.experiment_id


def create_run(
    client: Any,
    experiment: str,
    data_set: str,
    name: str,
    tags: dict[str, str],
    params: dict[str, Any],
) -> Any:
    """A new MLflow run with parameters and with the tags of MLflow's client: user, commit, source.

    Where a platform opened a run for this process, that run is used; if it holds a training
    already, or MLFLOW_NESTED_RUN is set, the new run is its child. A GPT belongs to the experiment
    of its tokenizer; see `find_experiment`.
    """
    from mlflow.entities import Param, RunTag
    from mlflow.tracking.context.registry import resolve_tags

    try:
        given = json.loads(os.environ.get("MLFLOW_TAGS") or "{}")
        tags = {**tags, **{str(key): str(value) for key, value in given.items()}}
    except (ValueError, AttributeError) as error:
        raise UserError(f"MLFLOW_TAGS must be a JSON object of tags: {error}") from error
    parent_id = os.environ.get("MLFLOW_RUN_ID")
    run = find_run(parent_id, client) if parent_id else None
    nested = os.environ.get("MLFLOW_NESTED_RUN", "").lower() in ("1", "true")
    if run is not None and not nested and "stage" not in run.data.tags:
        client.log_batch(parent_id, tags=[RunTag(key, value) for key, value in tags.items()])
        client.update_run(parent_id, status="RUNNING")
    else:
        if run is not None:
            tags["mlflow.parentRunId"] = run.info.run_id
        if run is not None and not experiment:
            experiment_id = run.info.experiment_id
        else:
            near = experiment_of(tags.get("tokenizer_run_id", ""))
            experiment_id = find_experiment(client, experiment, near or data_set)
        run = client.create_run(experiment_id, run_name=name, tags=resolve_tags(tags))
    run = client.get_run(run.info.run_id)
    new = params.keys() - run.data.params.keys()  # others cannot change
    client.log_batch(run.info.run_id, params=[Param(key, str(params[key])) for key in sorted(new)])
    return run


def reopen(client: Any, run_id: str, continued: bool, output_dir: Path) -> Any:
    """An existing run; None where a new one is to take its place, which is printed.

    A training that is `continued` counts as running. The copy of an output folder does not log into
    the run of the original.
    """
    try:
        run = find_run(run_id, client)
    except UserError as error:
        if not continued:
            raise
        print(f"warning: {error}; a new run takes its place", file=sys.stderr)
        return None
    if continued:
        original, here = run.data.tags.get(OUTPUT_TAG, ""), str(output_dir.resolve())
        if original != here and (Path(original) / LINEAGE).is_file():
            print(f"{here} is a copy of {original}, whose run it leaves alone: this is a new run")
            return None
        client.set_tag(run_id, OUTPUT_TAG, here)
        client.update_run(run_id, status="RUNNING")
    return run


def warn_if_moved(run: Any) -> None:
    """Warn if the project folder that holds a run's artifacts is gone."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    address = run.info.artifact_uri  # <project>/mlruns/<experiment>/<run>/artifacts
    if is_local_uri(address):
        project = Path(local_file_uri_to_path(address)).parents[:4][-1]
        if not project.exists():
            print(
                f"warning: {project}, which held this experiment's files, is gone (renamed?); "
                f"MLflow creates it again: {address}; to avoid this, choose a new --experiment, "
                "or give the folder its old name",
                file=sys.stderr,
            )


def experiment_of(run_id: str) -> str:
    """The name of the experiment of a run; "" if there is no such run."""
    try:
        run = find_run(run_id) if run_id else None
    except UserError:
        return ""
    return open_client().get_experiment(run.info.experiment_id).name if run else ""


def check_stage(run_id: str, stages: tuple[str, ...]) -> None:
    """Refuse a run of another stage than `stages`, unless that is empty.

    Raises:
        UserError: it is the run of another stage, or does not exist.
    """
    found = find_run(run_id).data.tags.get("stage", "")
    if stages and found not in stages:
        raise UserError(
            f"the MLflow run {run_id} is that of a {found or 'stage that is not known'}, but this "
            f"belongs to the run of a {' or '.join(stages)}; name that one as --run_id, or omit it"
        )


def page(run: Any) -> str:
    """The address of a run in MLflow's UI, relative to the server."""
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def ui_hint(run: Any) -> str:
    """The lines for the terminal that state how to open a run in MLflow's UI."""
    server, start = without_credentials(tracking_uri()).rstrip("/"), ""
    if not server.startswith("http"):
        start = f"\n  mlflow ui --backend-store-uri {shlex.quote(server)}"
        server = "http://127.0.0.1:5000"
    return f"\nbrowse:{start}\n  {server}/{page(run)}/model-metrics?workflowType=machine_learning"
