"""Runs: what a script does with MLflow.

Everything is first written to the output folder (metrics.jsonl, pictures/, tables/). A thread of
its own then passes it on, so that a slow or dead MLflow server neither stops nor slows a training.
"""

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from utils import cli, journal, metrics_log, picture_table, replay, store
from utils.cli import Stopped, UserError, command_line
from utils.outbox import Outbox
from utils.store import experiment_of, fetch

__all__ = ["Run", "continue_run", "experiment_of", "fetch"]
OUTPUT_TAG = "output_dir"  # where a run's output folder was made
COLOURS = {"tokenizer": "#1f77b4", "gpt": "#ff7f0e"}


def continue_run(
    output_dir: Path, run_id: str | None, default_run_id: str, *, stages: tuple[str, ...] = ()
) -> "Run":
    """Open the run that the user names, else the default one if this MLflow store has it.

    Raises:
        UserError: the user named a run that does not exist, or one of none of the `stages`.
    """
    if run_id is not None:
        if stages:
            stage = store.existing_run(store.open_client(), run_id).data.tags.get("stage", "")
            if stage not in stages:
                raise UserError(
                    f"the MLflow run {run_id} is that of a {stage or 'stage that is not known'}, "
                    f"but this belongs to the run of a {' or '.join(stages)}; name that one as "
                    "--run_id, or leave it away"
                )
        return Run(output_dir, run_id=run_id)
    if default_run_id and experiment_of(default_run_id):
        return Run(output_dir, run_id=default_run_id)
    print("not logged to MLflow: the model's run is not in this store; --run_id names another")
    return Run(output_dir, enabled=False)


class Run:
    """One MLflow run and its output folder; a context manager that also says how it ended.

    Attributes:
        run_id: the MLflow run's id.
        output_dir: where everything is written first.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        stage: str = "",
        run_id: str | None = None,
        experiment: str = "",
        run_name: str = "",
        config: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        continued: bool = False,
        logged: int | None = None,
        enabled: bool = True,
    ) -> None:
        """Open a new run, or with `run_id` an existing one.

        Args:
            output_dir: is made where it is missing.
            stage: tokenizer or gpt, of a new run.
            run_id: of an existing run.
            experiment, run_name: of a new run.
            config: all settings, for config.json.
            params: at most 10 of them, since MLflow prints all of them on every picture.
            tags: further tags of a new run.
            continued: the existing run goes on training: it counts as running until closed. If it
                is gone, a new one takes its place.
            logged: bytes of metrics.jsonl behind which a training goes on; what came after them
                will come again, and MLflow gets no number twice. None: all of them.
            enabled: False in all processes but the first, where nothing is written.

        Raises:
            UserError: no such run, or a tracking server that does not answer.
        """
        self.output_dir = output_dir
        self.run_id = run_id or ""
        self._outbox: Outbox | None = None
        self._experiment_id: str | None = None
        self._owned = continued or run_id is None
        if not enabled:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        self._client = store.open_client()
        with store.opening_a_run():
            if run_id is not None and not (continued and self._gone(run_id)):
                run = store.existing_run(self._client, run_id)
                if continued:
                    self._client.update_run(run_id, status="RUNNING")
            else:
                run = self._create(stage, experiment, run_name, params or {}, tags or {})
        self.run_id = run.info.run_id
        if config is not None:
            (output_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        journal.note(output_dir, run_id=self.run_id)
        self._experiment_id = run.info.experiment_id
        self._outbox = Outbox(complain=self._complain, is_final=store.is_refusal)
        self._points: set[tuple[str, int]] = set()  # numbers that MLflow has from before a crash
        if logged is not None:
            metrics_log.rewind(output_dir, logged)
        if continued:
            self._catch_up(metrics_log.read(output_dir))
        if config is not None:
            self.file(output_dir / "config.json")

    def _gone(self, run_id: str) -> bool:
        """Whether a run that is to go on is not in this store, which is said."""
        try:
            store.existing_run(self._client, run_id)
        except UserError as error:
            print(f"warning: {error}; a new run takes its place", file=sys.stderr)
            return True
        return False

    def _create(
        self, stage: str, experiment: str, name: str, params: dict[str, Any], tags: dict[str, str]
    ) -> Any:
        if len(params) > 10:
            raise ValueError(f"at most 10 params, got {len(params)}; the rest is in config.json")
        command = command_line()
        return store.create_run(
            self._client,
            experiment,
            name or self.output_dir.name,
            params,
            {
                "stage": stage,
                OUTPUT_TAG: str(self.output_dir.resolve()),
                "mlflow.source.name": Path(sys.argv[0]).name,
                "mlflow.source.type": "LOCAL",
                "mlflow.runColor": COLOURS[stage],
                "mlflow.note.content": f"```\n{command}\n```\n\nOutput folder: `{self.output_dir}`",
                **tags,
            },
        )

    @property
    def link(self) -> str:
        """Where `mlflow ui` shows the run's curves and pictures."""
        server = os.environ["MLFLOW_TRACKING_URI"]
        server = server.rstrip("/") if server.startswith("http") else "http://127.0.0.1:5000"
        return (
            f"{server}/#/experiments/{self._experiment_id}/runs/{self.run_id}/model-metrics"
            "?workflowType=machine_learning"
        )

    @property
    def how_to_look(self) -> str:
        """The lines that tell the user how to see the run."""
        if self._experiment_id is None:
            return "not logged to MLflow"
        address = os.environ["MLFLOW_TRACKING_URI"]
        start = "" if address.startswith("http") else f"\n  mlflow ui --backend-store-uri {address}"
        return f"\nbrowse:{start}\n  {self.link}"

    def metrics(self, section: str, values: dict[str, float], step: int) -> None:
        """Log numbers as section/name: to metrics.jsonl at once, to MLflow soon."""
        if self._outbox is None:
            return
        line = {"step": step, "time": time.time()}
        line |= {f"{section}/{name}": value for name, value in values.items()}
        metrics_log.append(self.output_dir, line)
        self._outbox.put(lambda: self._send(line))

    def _send(self, line: dict[str, Any]) -> None:
        """Send what MLflow lacks of a line of metrics.jsonl."""
        step, seconds = line["step"], line["time"]
        values = {
            name: value
            for name, value in line.items()
            if name not in ("step", "time") and (name, step) not in self._points
        }
        if values:
            store.send_metrics(self._client, self.run_id, values, seconds, step)

    def _catch_up(self, lines: list[dict[str, Any]]) -> None:
        """Send what a crash kept from MLflow."""

        def ask() -> None:
            self._points = store.logged_points(self._client, self.run_id)

        self._outbox.put(ask)
        for line in lines:
            self._outbox.put(partial(self._send, line))

    def picture(self, key: str, image: Image.Image, step: int) -> Path:
        """Log a picture: a PNG file under pictures/ at once, to MLflow soon."""
        path = self.output_dir / "pictures" / f"{key.replace('/', '-')}-{step:08}.png"
        if self._outbox is None:
            return path
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        now, outbox = time.time(), self._outbox
        journal.note(self.output_dir, now, picture=path.name, key=key, step=step)
        where = self._client, self.run_id, path, key, step, int(now * 1000)
        outbox.put(lambda: store.send_picture(*where, check=outbox.troubled))
        return path

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        """Log a table, whose columns may hold pictures: under tables/ at once, to MLflow soon."""
        if self._outbox is None:
            return
        picture_table.write(self.output_dir, name, columns)
        journal.note(self.output_dir, table=name)
        self._outbox.put(lambda: store.send_table(self._client, self.run_id, self.output_dir, name))

    def tag(self, key: str, value: str) -> None:
        """Tag the run, as with the id of a run that it builds on."""
        if self._outbox is not None:
            journal.note(self.output_dir, tag=key, value=value)
            self._outbox.put(lambda: self._client.set_tag(self.run_id, key, value))

    def folder(self, path: Path, name: str) -> None:
        """Log all files of a folder as artifacts under `name`."""
        if self._outbox is not None:
            place = journal.place(path, self.output_dir)
            journal.note(self.output_dir, folder=place, name=name)
            self._outbox.put(lambda: self._client.log_artifacts(self.run_id, str(path), name))

    def file(self, path: Path, name: str = "") -> None:
        """Log one file as an artifact in the folder `name`."""
        if self._outbox is not None:
            place = journal.place(path, self.output_dir)
            journal.note(self.output_dir, file=place, name=name)
            self._outbox.put(
                lambda: self._client.log_artifact(self.run_id, str(path), name or None)
            )

    def _complain(self, error: Exception) -> None:
        print(
            f"warning: MLflow does not take what is logged ({store.one_line(error)}); all of it "
            f"is in {self.output_dir}, and MLflow gets what it can take if it comes back before "
            f"the end; python -m utils.tracking --replay {self.output_dir} sends the rest later",
            file=sys.stderr,
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status = "FINISHED"
        if error is not None:
            stopped = isinstance(error, Stopped | KeyboardInterrupt | SystemExit)
            status = "KILLED" if stopped else "FAILED"
        self.close(status)

    def close(self, status: str = "FINISHED") -> None:
        """Send what is left, and tell MLflow how a run that was opened here ended."""
        if self._outbox is None:
            return
        if self._owned:
            journal.note(self.output_dir, status=status)
            self._outbox.put(lambda: self._client.set_terminated(self.run_id, status))
        self._outbox.close()
        self._outbox = None


def main(arguments: argparse.Namespace) -> None:
    sent = replay.replay(store.open_client(), Path(arguments.replay))
    print(f"sent: {', '.join(f'{count:,} {kind}' for kind, count in sent.items())}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("Send MLflow what it missed of a training while it was away.")
    parser.add_argument(
        "--replay",
        required=True,
        metavar="OUTPUT_DIR",
        help="output folder whose runs MLflow is to have in full; what it has is not sent again",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
