"""Runs that belong together name each other, in tags and in notes with links."""

import json
from pathlib import Path
from typing import Any

from utils import provenance
from utils.addresses import tracking_uri
from utils.cli import command_line
from utils.provenance import Lineage
from utils.tracking import gateway

NOTE = "mlflow.note.content"
FILE = "lineage.json"


def page(experiment_id: str, run_id: str) -> str:
    """Where a run is in MLflow, after the address of its server."""
    return f"#/experiments/{experiment_id}/runs/{run_id}"


def first_note(output_dir: Path) -> str:
    """What the note of a new run says."""
    return f"```\n{command_line()}\n```\n\nOutput folder: `{output_dir}`"


def ui_hint(experiment_id: str, run_id: str) -> str:
    """How to see the curves and pictures of a run, in lines for the terminal."""
    address = tracking_uri()
    server, start = address.rstrip("/"), ""
    if not address.startswith("http"):
        server = "http://127.0.0.1:5000"
        start = f"\n  mlflow ui --backend-store-uri {address}"
    where = f"{page(experiment_id, run_id)}/model-metrics?workflowType=machine_learning"
    return f"\nbrowse:{start}\n  {server}/{where}"


def link(client: Any, lineage: Lineage) -> None:
    """Tell the runs of a lineage of its last stage, and the run of that stage of them.

    Notes list all of them; a tag `gpt_run_id` or `tokenizer_run_id` names the newest run of that
    stage. Each run gets the lineage as an artifact. Runs that this store does not have are passed
    over.
    """
    runs = {stage.run_id: gateway.find_run(client, stage.run_id) for stage in lineage}
    runs = {run_id: run for run_id, run in runs.items() if run is not None}
    last = lineage[-1]
    own = runs.get(last.run_id)
    for run_id, other in runs.items():
        if own is not None and run_id != last.run_id:
            stage = other.data.tags.get("stage", "upstream")
            # Samples and images are logged to the run of a GPT: it is that which is downstream.
            if (own_stage := own.data.tags.get("stage", last.name)) != stage:
                client.set_tag(run_id, f"{own_stage}_run_id", last.run_id)
            client.set_tag(last.run_id, f"{stage}_run_id", run_id)
            _note(client, other, f"Downstream: {last.name}, {_named(own)}")
            _note(client, own, f"Upstream: {stage}, {_named(other)}")
    if own is not None and own.data.tags.get("stage") != last.name:
        # It is logged to the run of an earlier stage, whose note has another command.
        _note(client, own, f"{last.name.capitalize()}:\n```\n{last.command}\n```")
    text = json.dumps(provenance.content(lineage), indent=2) + "\n"
    for run_id in runs:
        client.log_text(run_id, text, FILE)


def linked(client: Any, lineage: Lineage) -> bool:
    """Whether `link` has been here already, or has nothing to do."""
    own = gateway.find_run(client, lineage[-1].run_id)
    if own is None:
        return True
    files = {file.path for file in client.list_artifacts(own.info.run_id)}
    return FILE in files and lineage[-1].command in own.data.tags.get(NOTE, "")


def _named(run: Any) -> str:
    return f"[{run.info.run_name}]({page(run.info.experiment_id, run.info.run_id)})"


def _note(client: Any, run: Any, line: str) -> None:
    """Add a paragraph to the note of a run, once."""
    note = client.get_run(run.info.run_id).data.tags.get(NOTE, "")
    if line not in note:
        client.set_tag(run.info.run_id, NOTE, f"{note}\n\n{line}")
