"""Calls of MLflow in plain types: metrics, images, tables, links between runs, models.

Each call may be repeated: metrics aside, logging something twice has the effect of once.
"""

import csv
import json
import math
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from utils.provenance import Lineage, to_json
from utils.tracking.opening import LINEAGE, NOTE, page

CHAMPION = "champion"
TABLES = "tables"  # a folder of the output folder and of the artifacts
MAX_METRICS = 1000  # that MLflow accepts in one call
MAX_DIGEST = 36  # characters of a data set's digest that MLflow accepts
THUMBNAIL = 256  # pixels of the longer side of the images in MLflow's lists

Point = tuple[Any, ...]  # arguments of mlflow.entities.Metric: key, value, milliseconds, step, ...


def is_refusal(error: Exception) -> bool:
    """Whether MLflow refuses a call for good, as after the run was deleted."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    status = getattr(getattr(error, "response", None), "status_code", status)  # of an upload
    return 400 <= status < 500 and status not in (401, 408, 429)  # those mean: try again


# --- metrics, images, tables ---


def log_points(client: Any, run_id: str, points: Iterable[Point]) -> None:
    """Log any number of values of metrics."""
    from mlflow.entities import Metric

    metrics = [Metric(*point) for point in points]
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def logged_values(client: Any, run: Any) -> set[tuple[str, int | None, int]]:
    """Name, milliseconds and step of every value that a run has in MLflow."""
    histories = (client.get_metric_history(run.info.run_id, key) for key in run.data.metrics)
    return {(one.key, one.timestamp, one.step) for history in histories for one in history}


def artifacts(client: Any, run_id: str, folder: str) -> dict[str, int]:
    """Bytes of the artifacts in a folder, by path."""
    files = client.list_artifacts(run_id, folder if folder != "." else None)
    return {file.path: file.file_size for file in files}


def image_names(key: str, step: int, time: int) -> tuple[str, str]:
    """The names of the two artifacts of an image: in full, and for lists.

    MLflow's `log_image` gives them random ids; with one of its content a repeated upload replaces
    the first, also after a server failed between the two files.
    """
    name = f"{key.replace('/', '~')}+step+{step}+timestamp+{time}"
    name += f"+{uuid.uuid5(uuid.NAMESPACE_OID, name)}"
    return f"{name}.png", f"{name}+compressed.webp"


def log_image(client: Any, run_id: str, path: Path, key: str, step: int, time: int) -> None:
    """Log a PNG file as an image that MLflow shows with a slider over the steps."""
    full, small = image_names(key, step, time)
    with TemporaryDirectory() as folder, Image.open(path, formats=["PNG"]) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(Path(folder, small))
        shutil.copy(path, Path(folder, full))
        client.log_artifacts(run_id, folder, "images")
    client.set_tag(run_id, "mlflow.loggedImages", True)


def write_table(folder: Path, name: str, columns: dict[str, list[Any]]) -> None:
    """Write `name`.csv, the same as MLflow's JSON, and the images among its values to `name`/."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows, data = [], []
    for number, row in enumerate(zip(*columns.values(), strict=True)):
        values, entries = dict(zip(columns, row, strict=True)), list(row)
        for place, (key, value) in enumerate(values.items()):
            if isinstance(value, Image.Image):
                values[key] = f"{name}/{key}-{number:05}.png"
                value.save(folder / values[key])
                path = f"{TABLES}/{values[key]}"  # among the artifacts
                # MLflow's type; its lists show the second path, which may be a thumbnail.
                entries[place] = {"type": "image", "filepath": path, "compressed_filepath": path}
        rows.append(values)
        data.append(entries)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    content = {"columns": list(columns), "data": data}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def log_table(client: Any, run_id: str, output_dir: Path, name: str) -> None:
    """Log a table of the output folder; MLflow's own call would append to an existing one."""
    client.log_artifacts(run_id, str(output_dir / TABLES / name), f"{TABLES}/{name}")
    client.log_artifact(run_id, str(output_dir / TABLES / f"{name}.json"), TABLES)
    list_table(client, run_id, name)


def list_table(client: Any, run_id: str, name: str) -> None:
    """Add a table to the tag that MLflow's page for comparing tables reads."""
    tag = "mlflow.loggedArtifacts"
    known = json.loads(client.get_run(run_id).data.tags.get(tag, "[]"))
    entry = {"path": f"{TABLES}/{name}.json", "type": "table"}
    if entry not in known:
        client.set_tag(run_id, tag, json.dumps([*known, entry]))


# --- links between the runs of a lineage ---


def link(client: Any, lineage: Lineage) -> None:
    """Link the run of the last stage with those of the stages before, and log its inputs.

    The notes of both runs name each other; a tag `gpt_run_id` or `tokenizer_run_id` holds the
    newest run of that stage. Each run gets the lineage as an artifact. Runs that are missing from
    this store are skipped. A run that refuses to be written does not keep the others from it.
    """
    found = {stage.run_id: _run_or_none(client, stage.run_id) for stage in lineage}
    runs = {run_id: run for run_id, run in found.items() if run is not None}
    stages = {run_id: run.data.tags.get("stage", "upstream") for run_id, run in runs.items()}
    last, own = lineage[-1], runs.get(lineage[-1].run_id)
    if own is None:
        return
    if stages[last.run_id] == last.name:
        _log_inputs(client, lineage)
    else:  # logged to the run of an earlier stage, whose note has another command
        _add_note(client, own, f"{last.name.capitalize()}:\n```\n{last.command}\n```")
    others = [item for item in runs.items() if item[1] is not own]
    refusals: list[Exception] = []
    for run_id, other in others:
        client.set_tag(last.run_id, f"{stages[run_id]}_run_id", run_id)
        _add_note(client, own, f"Upstream: {stages[run_id]}, {_link_to(other)}")
    client.log_text(last.run_id, to_json(lineage, indent=2) + "\n", LINEAGE)
    for run_id, other in others:
        try:
            # Samples and images are logged to the run of a GPT, which then is downstream.
            if stages[last.run_id] != stages[run_id]:
                client.set_tag(run_id, f"{stages[last.run_id]}_run_id", last.run_id)
            _add_note(client, other, f"Downstream: {last.name}, {_link_to(own)}")
            client.log_text(run_id, to_json(lineage, indent=2) + "\n", LINEAGE)
        except Exception as error:
            if not is_refusal(error):
                raise
            refusals.append(error)
    if refusals:
        raise refusals[0]


def is_linked(client: Any, lineage: Lineage) -> bool:
    """Whether `link` was called with this lineage before, or has nothing to do."""
    own = _run_or_none(client, lineage[-1].run_id)
    if own is None:
        return True
    noted = lineage[-1].command in own.data.tags.get(NOTE, "")
    return noted and LINEAGE in artifacts(client, own.info.run_id, ".")


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


def _link_to(run: Any) -> str:
    return f"[{run.info.run_name}]({page(run)})"


def _add_note(client: Any, run: Any, line: str) -> None:
    """Append a paragraph to the note of a run, once."""
    note = client.get_run(run.info.run_id).data.tags.get(NOTE, "")
    if line not in note:
        client.set_tag(run.info.run_id, NOTE, f"{note}\n\n{line}")


# --- models ---


def log_model(
    client: Any, run_id: str, folder: Path, values: dict[str, float], time: int, step: int
) -> None:
    """Log a model folder as the final model of a run; an attempt that was killed is continued.

    `values` are its metrics by full name, taken at `time` (milliseconds since 1970).
    """
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    experiment_id, stage = run.info.experiment_id, run.data.tags.get("stage", "")
    of_step = {one.model_id for one in run.outputs.model_outputs if one.step == step}
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    if any(one.status == "READY" and one.model_id in of_step for one in found):
        return
    model = next((one for one in found if one.status == "PENDING"), None)
    if model is None:
        name = re.sub(r"[/:.%\"']+", "-", run.info.run_name)  # forbidden in names of models
        about = {"stage": stage}, run.data.params, stage
        model = client.create_logged_model(experiment_id, name, run_id, *about)
    client.log_model_artifacts(model.model_id, str(folder))
    if model.model_id not in of_step:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    data_set: Point = ()
    for one in run.inputs.dataset_inputs[:1]:
        data_set = one.dataset.name, one.dataset.digest
    missing = [
        (key, value, time, step, model.model_id, *data_set)
        for key, value in values.items()
        if step not in {one.step for one in client.get_metric_history(run_id, key)}
    ]
    log_points(client, run_id, missing)
    client.finalize_logged_model(model.model_id, "READY")


def is_better(value: float, best: float, lower_is_better: bool) -> bool:
    """Whether a metric is better than the best so far; any number is better than NaN."""
    if math.isnan(best):
        return not math.isnan(value)
    return value < best if lower_is_better else value > best


def register(client: Any, run_id: str, name: str, metric: str, lower_is_better: bool) -> str:
    """Make a run's model a version of a registered model; the best by `metric` is the champion.

    The registered model is created if it does not exist. Returns a line for the user.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    run = client.get_run(run_id)
    value, model_id = run.data.metrics[metric], newest_model(run)
    source = f"models:/{model_id}"  # some stores list versions without their model_id
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((one for one in versions if one.source == source), None)
    if version is None:
        about = f"{metric} {value:.6g}"
        version = client.create_model_version(
            name, source, run_id, description=about, model_id=model_id
        )
    done = f"registered as version {version.version} of {name}"
    champion = client.get_registered_model(name).aliases.get(CHAMPION, version.version)
    if champion != version.version:
        best_run = client.get_run(client.get_model_version(name, champion).run_id)
        best, named = best_run.data.metrics.get(metric), f"the champion, version {champion},"
        if best is None:
            return f"{done}; {named} has no {metric} to compare with, and stays"
        if not is_better(value, best, lower_is_better):
            return f"{done}; {named} stays: its {metric} is {best:.6g}, this one's {value:.6g}"
        done += f"; {metric} {value:.6g} beats {best:.6g} of {named}"
    client.set_registered_model_alias(name, CHAMPION, version.version)
    return f"{done}; champion: models:/{name}@{CHAMPION}"
