"""What is in the MLflow store: runs, and their tables and pictures."""

import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from utils.cli import UserError
from utils.data.decoding import open_image
from utils.tracking import gateway, picture_table

COLOURS = {"tokenizer": "#1f77b4", "gpt": "#ff7f0e"}
HOMES = {  # of the stages that are logged to the run of another
    "indices": ("tokenizer",),
    "samples": ("gpt",),
    "images": ("gpt", "tokenizer"),
}
PICTURE_FILES = 2  # of a picture: itself, and a small one for lists


def tag_of(run_id: str, key: str) -> str:
    """A tag of an MLflow run, "" where it has none.

    Raises:
        UserError: there is no such run.
    """
    return gateway.existing_run(gateway.open_client(), run_id).data.tags.get(key, "")


def logged_points(client: Any, run_id: str) -> set[tuple[str, int]]:
    """The names and steps of all numbers that an MLflow run has."""
    names = client.get_run(run_id).data.metrics
    return {
        (name, point.step) for name in names for point in client.get_metric_history(run_id, name)
    }


def experiment_of(run_id: str) -> str:
    """The name of the experiment that a run belongs to; "" for no run, or one that is gone."""
    if not run_id:
        return ""
    client = gateway.open_client()
    try:
        run = gateway.existing_run(client, run_id)
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
    gateway.send_params(client, run.info.run_id, params)
    return run


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
            name = there[0].removesuffix(".png")
            with TemporaryDirectory() as folder:
                small = Path(folder) / f"{Path(name).name}{name[-37]}compressed.webp"
                gateway.small_copy(image).save(small)
                client.log_artifact(run_id, str(small), "images")
    if check:
        client.set_tag(run_id, "mlflow.loggedImages", True)
