"""Every call of MLflow: runs, metrics, images, tables, links between runs, models.

Runs are opened by the conventions of MLflow's own client and of platforms that set its names in
the environment: MLFLOW_EXPERIMENT_NAME and _ID, MLFLOW_RUN_ID, MLFLOW_TAGS, MLFLOW_NESTED_RUN.
Each call may be repeated: what is logged twice has the effect of once.
"""

import json
import os
import re
import shlex
import shutil
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from utils.addresses import OUTPUT_TAG, find_run, tracking_uri, without_credentials
from utils.cli import UserError, command_line, user_error
from utils.progress import warn
from utils.provenance import LINEAGE, Lineage, to_json
from utils.tracking.sync import TABLES, Event, is_refusal

NOTE = "mlflow.note.content"
CHAMPION = "champion"
MAX_METRICS = 1000  # that MLflow accepts in one call
MAX_DIGEST = 36  # characters of a data set's digest that MLflow accepts
THUMBNAIL = 256  # pixels of the longer side of the images in MLflow's lists
GENERAL_NAMES = ("data", "train", "images", "index", "indices", "list", "metadata")  # of a CSV
OF_TRAINING = ("train/", "val/", "system/")  # prefixes of the metrics that a training logs
Point = tuple[str, int, int]  # name, milliseconds and step of a value of a metric


def send(client: Any, home: Path, event: Event) -> None:
    """Send an event of the event log in `home` to MLflow."""
    run_id, path = event.run_id, home / event.path
    match event.kind:
        case "picture":
            log_image(client, run_id, path, event)
        case "table":
            log_table(client, run_id, home, event.name)
        case "folder":
            client.log_artifacts(run_id, str(path), event.name)
        case "file":
            client.log_artifact(run_id, str(path), event.name or None)
        case "lineage":
            link(client, event.lineage, event.name)
        case "model":
            log_model(client, path, event)
            if event.name:
                print(register(client, event))
        case "status" if event.name != "RUNNING":  # which was set when the run was opened
            client.set_terminated(run_id, event.name, event.milliseconds)


def fail_if_running(client: Any, run_id: str) -> None:
    """Set the status of a run to FAILED, unless it has ended."""
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, "FAILED")


def find_experiment(client: Any, name: str, fallback: str) -> str:
    """The id of an experiment, which is created if it does not exist.

    `name` is what the user chose; without it, MLFLOW_EXPERIMENT_NAME and MLFLOW_EXPERIMENT_ID
    count, then `fallback`. A UserError if it is deleted.
    """
    from mlflow.exceptions import MlflowException

    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
    if not name and (number := os.environ.get("MLFLOW_EXPERIMENT_ID")):
        return number
    name = name or fallback
    found = client.get_experiment_by_name(name)
    if found is None:
        place = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):  # MLflow does not quote a ? in its own choice
            place = Path("mlruns", re.sub(r"[^\w.-]+", "-", name)).resolve().as_uri()
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException:  # another process may have created it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {found.name!r} is deleted; choose another --experiment, or "
            f"restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return found.experiment_id


def create_run(
    client: Any,
    output_dir: Path,
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

    command = without_credentials(command_line())
    note = f"```\n{command}\n```\n\nOutput folder: `{output_dir}`"
    tags = {NOTE: note, OUTPUT_TAG: str(output_dir.resolve()), **tags}
    with user_error("MLFLOW_TAGS must be a JSON object of tags: %s", ValueError, AttributeError):
        given = json.loads(os.environ.get("MLFLOW_TAGS") or "{}")
        tags |= {key: str(value) for key, value in given.items()}
    run_id = os.environ.get("MLFLOW_RUN_ID")
    parent = find_run(run_id, client) if run_id else None
    nested = os.environ.get("MLFLOW_NESTED_RUN", "").lower() in ("1", "true")
    if parent is None or nested or "stage" in parent.data.tags:
        default = Path(data_set).stem
        if default in GENERAL_NAMES:
            default = Path(data_set).resolve().parent.name
        if tokenizer := _run_or_none(client, tags.get("tokenizer_run_id", "")):
            default = client.get_experiment(tokenizer.info.experiment_id).name
        if parent is not None:
            tags["mlflow.parentRunId"] = parent.info.run_id
            experiment = experiment or client.get_experiment(parent.info.experiment_id).name
        experiment_id = find_experiment(client, experiment, default)
        new = client.create_run(experiment_id, run_name=name, tags=resolve_tags(tags))
        run_id, tags = new.info.run_id, {}
    else:
        client.update_run(run_id, status="RUNNING")
    client.log_batch(
        run_id,
        params=[Param(key, str(value)) for key, value in sorted(params.items())],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    return client.get_run(run_id)


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
        warn(f"{error}; a new run takes its place")
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
    address = urlsplit(run.info.artifact_uri)  # <project>/mlruns/<experiment>/<run>/artifacts
    project = Path(url2pathname(address.path), "..", "..", "..", "..").resolve()
    if address.scheme in ("", "file") and not project.exists():
        warn(
            f"{project}, which held this experiment's files, is gone (renamed?); MLflow "
            f"creates {run.info.artifact_uri} again; to avoid this, choose a new --experiment, or "
            "give the folder its old name"
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


def log_metrics(client: Any, run: Any, lines: list[Event], there: set[Point]) -> int:
    """Log the values of metrics that are not `there`, see `logged_metrics`; how many these are.

    Those that do not come from a training are also metrics of the newest model of the run.
    """
    from mlflow.entities import Metric

    model_id = newest_model(run) or None
    metrics = [
        Metric(name, value, line.milliseconds, line.step, model_id=None if of_run else model_id)
        for line in lines
        for name, value in line.values.items()
        for of_run in [name.startswith(OF_TRAINING)]
        if (name, line.milliseconds, line.step) not in there
    ]
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + MAX_METRICS])
    return len(metrics)


def logged_metrics(client: Any, run_id: str) -> set[Point]:
    """Every value of a metric that a run has in MLflow."""
    names = client.get_run(run_id).data.metrics
    values = (one for name in names for one in client.get_metric_history(run_id, name))
    return {(one.key, one.timestamp, one.step) for one in values}


def log_image(client: Any, run_id: str, path: Path, event: Event) -> None:
    """Log a PNG file as an image that MLflow shows with a slider over the steps.

    MLflow's `log_image` gives its two files random ids; with one of their name a repeated upload
    replaces the first, also after a server failed between the two.
    """
    name = f"{event.name.replace('/', '~')}+step+{event.step}+timestamp+{event.milliseconds}"
    name += f"+{uuid.uuid5(uuid.NAMESPACE_OID, name)}"
    with TemporaryDirectory() as folder, Image.open(path, formats=["PNG"]) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(Path(folder, f"{name}+compressed.webp"))
        shutil.copy(path, Path(folder, f"{name}.png"))
        client.log_artifacts(run_id, folder, "images")
    client.set_tag(run_id, "mlflow.loggedImages", True)


def log_table(client: Any, run_id: str, output_dir: Path, name: str) -> None:
    """Log a table of the output folder; MLflow's own call would append to an existing one."""
    tag, file = "mlflow.loggedArtifacts", f"{TABLES}/{name}.json"
    client.log_artifacts(run_id, str(output_dir / TABLES / name), f"{TABLES}/{name}")
    client.log_artifact(run_id, str(output_dir / file), TABLES)
    known = json.loads(client.get_run(run_id).data.tags.get(tag, "[]"))
    entry = {"path": file, "type": "table"}
    if entry not in known:  # MLflow's page for comparing tables reads this tag
        client.set_tag(run_id, tag, json.dumps([*known, entry]))


def link(client: Any, lineage: Lineage, run_id: str) -> None:
    """Link the run of the last stage, or one of the stages before, with the others of a lineage.

    The note of a run names the others; a tag `gpt_run_id` or `tokenizer_run_id` holds the newest
    run of that stage. The run of the last stage gets its inputs, and its command where that is not
    the one that opened the run; each run gets the lineage as an artifact. Runs that are missing
    from this store are skipped.
    """
    *before, last = lineage
    run, is_last = _run_or_none(client, run_id), run_id == last.run_id
    if run is None:
        return
    notes = []
    if is_last and _stage_of(run) == last.name:
        _log_inputs(client, lineage)
    elif is_last:  # logged to the run of an earlier stage
        notes.append(f"{last.name.capitalize()}:\n```\n{last.command}\n```")
    for other_id in {stage.run_id for stage in (before if is_last else [last])} - {run_id}:
        other = _run_or_none(client, other_id)
        if other is None:
            continue
        # Samples and images are in the run of a GPT.
        if _stage_of(other) != _stage_of(run):
            client.set_tag(run_id, f"{_stage_of(other)}_run_id", other_id)
        way = "Upstream" if is_last else "Downstream"
        notes.append(f"{way}: {_stage_of(other)}, [{other.info.run_name}]({page(other)})")
    note = run.data.tags.get(NOTE, "")
    if new := [line for line in notes if line not in note]:
        client.set_tag(run_id, NOTE, "\n\n".join([note, *new]))
    client.log_text(run_id, to_json(lineage, indent=2) + "\n", LINEAGE)


def _stage_of(run: Any) -> str:
    return run.data.tags.get("stage", "upstream")


def _run_or_none(client: Any, run_id: str) -> Any:
    try:
        return client.get_run(run_id) if run_id else None
    except Exception as error:
        if not is_refusal(error):
            raise
        return None


def newest_model(run: Any) -> str:
    """The id of the newest model that a run logged; "" for none, or without a run."""
    models = run.outputs.model_outputs if run is not None and run.outputs else []
    return max(models, key=lambda one: one.step).model_id if models else ""


def _log_inputs(client: Any, lineage: Lineage) -> None:
    """Log what the last stage reads: data sets with their digests, and models."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

    *upstream, stage = lineage
    makers = {one.sha256: one for one in upstream if one.name in ("tokenizer", "gpt")}
    tags = [InputTag("mlflow.data.context", "training")]
    data_sets, models = [], []
    for path, sha256 in stage.inputs.items():
        if sha256 not in makers:
            kind, source = data_source(path)
            data_set = Dataset(Path(path).name, sha256[:MAX_DIGEST], kind, json.dumps(source))
            data_sets.append(DatasetInput(data_set, tags))
        elif model_id := newest_model(_run_or_none(client, makers[sha256].run_id)):
            models.append(LoggedModelInput(model_id))
    client.log_inputs(stage.run_id, data_sets, models)


def data_source(address: str) -> tuple[str, dict[str, str]]:
    """Type and content of MLflow's source of a data set, which `mlflow.data.get_source` reads."""
    scheme = re.match(r"([a-z][a-z0-9+]*)://", address)
    if scheme is None:
        return "local", {"uri": str(Path(address).absolute())}
    is_http = scheme[1].startswith("http")
    return ("http" if is_http else scheme[1]), {"url" if is_http else "uri": address}


def log_model(client: Any, folder: Path, event: Event) -> None:
    """Log a model folder as the final model of a run, with its metrics."""
    from mlflow.entities import LoggedModelOutput, Metric

    run_id, step = event.run_id, event.step
    run = client.get_run(run_id)
    experiment_id, stage = run.info.experiment_id, run.data.tags.get("stage", "")
    of_step = {one.model_id for one in run.outputs.model_outputs if one.step == step}
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    if any(one.status == "READY" and one.model_id in of_step for one in found):
        return
    model = next((one for one in found if one.status == "PENDING"), None)  # a killed attempt
    if model is None:
        name = re.sub(r"[/:.%\"']+", "-", run.info.run_name)  # forbidden in names of models
        about = {"stage": stage}, run.data.params, stage
        model = client.create_logged_model(experiment_id, name, run_id, *about)
    client.log_model_artifacts(model.model_id, str(folder))
    if model.model_id not in of_step:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    data_sets = [one.dataset for one in run.inputs.dataset_inputs[:1]]
    made_of = [x for one in data_sets for x in (one.name, one.digest)]
    metrics = [
        Metric(name, value, event.milliseconds, step, model.model_id, *made_of)
        for name, value in event.values.items()
    ]
    client.log_batch(run_id, metrics=metrics)
    client.finalize_logged_model(model.model_id, "READY")


def register(client: Any, event: Event) -> str:
    """Make a run's model a version of a registered model; the best by a metric is the champion.

    The registered model is created if it does not exist. Returns a line for the user.
    """
    name, metric = event.name, next(iter(event.values))
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    run = client.get_run(event.run_id)
    value, model_id = run.data.metrics[metric], newest_model(run)
    source = f"models:/{model_id}"  # some stores list versions without their model_id
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((one for one in versions if one.source == source), None)
    if version is None:
        about = {"description": f"{metric} {value:.6g}", "model_id": model_id}
        version = client.create_model_version(name, source, event.run_id, **about)
    done = f"registered as version {version.version} of {name}"
    champion = client.get_registered_model(name).aliases.get(CHAMPION, version.version)
    if champion != version.version:
        best_run = client.get_run(client.get_model_version(name, champion).run_id)
        best, named = best_run.data.metrics.get(metric), f"the champion, version {champion},"
        if best is None:
            return f"{done}; {named} has no {metric} to compare with, and stays"
        if not (value < best if event.lower_is_better else value > best):
            return f"{done}; {named} stays: its {metric} is {best:.6g}, this one's {value:.6g}"
        done += f"; {metric} {value:.6g} beats {best:.6g} of {named}"
    client.set_registered_model_alias(name, CHAMPION, version.version)
    return f"{done}; champion: models:/{name}@{CHAMPION}"
