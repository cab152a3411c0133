"""Models in MLflow: logged with what they came from and how good they are; the best is champion."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from utils.provenance import Lineage
from utils.tracking import gateway
from utils.tracking.gateway import Point

CHAMPION = "champion"
READY, PENDING = "READY", "PENDING"  # of a logged model


def log_inputs(client: Any, lineage: Lineage) -> None:
    """Tell MLflow what the last stage of a lineage reads: data sets with digests, and models."""
    *upstream, stage = lineage
    makers = {one.sha256: one for one in upstream if one.name in ("tokenizer", "gpt")}
    data_sets, models = [], []
    for path, sha256 in stage.inputs.items():
        if sha256 not in makers:
            data_sets.append((path, sha256))
        elif model_id := newest_model(gateway.find_run(client, makers[sha256].run_id)):
            models.append(model_id)
    gateway.send_inputs(client, stage.run_id, data_sets, models)


def newest_model(run: Any) -> str:
    """The id of the newest model that a run logged; "" for none, or without a run."""
    outputs = run.outputs.model_outputs if run is not None and run.outputs else []
    return max(outputs, key=lambda output: output.step).model_id if outputs else ""


def log_model(
    client: Any, run_id: str, folder: Path, values: dict[str, float], seconds: float, step: int
) -> None:
    """Log a model folder as the model that a run ends with, and its figures, if it is not yet.

    Args:
        client: of MLflow.
        run_id: of the training.
        folder: the model folder.
        values: figures by name.
        seconds: when they were taken, since 1970.
        step: of the training.
    """
    run = client.get_run(run_id)
    experiment_id, stage = run.info.experiment_id, run.data.tags.get("stage", "")
    name = re.sub(r"[/:.%\"']+", "-", run.info.run_name)  # what names of models must not have
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    outputs = run.outputs.model_outputs if run.outputs else []
    of_step = {one.model_id for one in outputs if one.step == step}
    if any(x.status == READY and x.model_id in of_step for x in found):
        return
    begun = [model for model in found if model.status == PENDING]
    if begun:  # an attempt that was cut off
        model = begun[0]
    else:
        model = client.create_logged_model(
            experiment_id, name, run_id, {"stage": stage}, run.data.params, stage
        )
    client.log_model_artifacts(model.model_id, str(folder))
    if model.model_id not in of_step:
        gateway.send_output(client, run_id, model.model_id, step)
    data = {}
    if run.inputs.dataset_inputs:
        first = run.inputs.dataset_inputs[0].dataset
        data = {"dataset_name": first.name, "dataset_digest": first.digest}
    when = int(seconds * 1000)
    missing = [
        Point(key, value, when, step, model.model_id, **data)
        for key, value in values.items()
        if all(one.step != step for one in client.get_metric_history(run_id, key))
    ]
    gateway.send_points(client, run_id, missing)
    client.finalize_logged_model(model.model_id, READY)


class Criterion(NamedTuple):
    """What decides which of two models is better: a metric of their runs."""

    metric: str
    lower_is_better: bool

    def prefers(self, one: float, other: float) -> bool:
        """Whether the first is better; any number is better than none (NaN)."""
        if math.isnan(other):
            return not math.isnan(one)
        return one < other if self.lower_is_better else one > other


def register(client: Any, run_id: str, name: str, criterion: Criterion) -> str:
    """Make a run's model a version of a registered one, its champion if it beats that so far.

    Args:
        client: of MLflow.
        run_id: of the training.
        name: of the registered model, which is made where it is missing.
        criterion: what "beats" means.

    Returns:
        What was done, in a line.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    run = client.get_run(run_id)
    metric, model_id = criterion.metric, newest_model(run)
    value = run.data.metrics[metric]
    versions = client.search_model_versions(f"name = '{name}'")
    source = f"models:/{model_id}"  # some stores list versions without their model_id
    version = next((one for one in versions if one.source == source), None)
    if version is None:
        version = client.create_model_version(
            name, source, run_id, description=f"{metric} {value:.6g}", model_id=model_id
        )
    done = f"registered as version {version.version} of {name}"
    aliases = client.get_registered_model(name).aliases
    if CHAMPION in aliases and aliases[CHAMPION] != version.version:
        champion = client.get_model_version(name, aliases[CHAMPION])
        best = client.get_run(champion.run_id).data.metrics.get(metric)
        named = f"the champion, version {champion.version},"
        if best is None:
            return f"{done}; {named} has no {metric} to compare with, and stays"
        if not criterion.prefers(value, best):
            return f"{done}; {named} stays: its {metric} is {best:.6g}, this one's {value:.6g}"
        done += f"; {metric} {value:.6g} beats {best:.6g} of {named}"
    client.set_registered_model_alias(name, CHAMPION, version.version)
    return f"{done}; champion: models:/{name}@{CHAMPION}"
