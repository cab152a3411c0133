"""Runs: what a script does with MLflow.

Everything is first written to the output folder (metrics.jsonl, pictures/, tables/). A thread of
its own then passes it on, so that a slow or dead MLflow server neither stops nor slows a training.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from utils import provenance
from utils.addresses import OUTPUT_TAG, START_OR_UNSET, store_errors
from utils.cli import Stopped, UserError, one_line
from utils.provenance import Lineage, Stage
from utils.tracking import (
    gateway,
    journal,
    links,
    metrics_log,
    picture_table,
    registry,
    report,
    store,
)
from utils.tracking.gateway import Point
from utils.tracking.journal import Journal
from utils.tracking.outbox import Outbox
from utils.tracking.store import experiment_of
from utils.tracking.system_metrics import SystemMetrics


def continue_run(
    output_dir: Path,
    run_id: str | None,
    default_run_id: str,
    *,
    stage: str = "",
    part: str = "",
    homes: tuple[str, ...] = (),
    inputs: dict[str, str] | None = None,
    upstream: Lineage = (),
) -> "Run":
    """Open the run that the user names, else the default one if this MLflow store has it.

    Args:
        output_dir: where pictures and numbers go.
        run_id: given by `--run_id`, or None.
        default_run_id: of the model that is used, or "".
        stage: indices, samples or images; "" for what no later stage reads.
        part: what the stage writes in `output_dir`, see `Run`.
        homes: stages to whose runs it belongs; default: `store.HOMES`.
        inputs, upstream: of that stage, see `Run`.

    Raises:
        UserError: the user named a run that does not exist, or one of another stage.
    """
    what = {"stage": stage, "part": part, "inputs": inputs, "upstream": upstream}
    if run_id is not None:
        store.check_home(run_id, homes or store.HOMES.get(stage, ()))
    elif not experiment_of(default_run_id):
        print("not logged to MLflow: the model's run is not in this store; --run_id names another")
        return Run(output_dir, enabled=False, **what)
    return Run(output_dir, run_id=default_run_id if run_id is None else run_id, **what)


def home_of(run_id: str) -> Path | None:
    """The output folder of a training, by its run; None where either is not to be found here."""
    if not experiment_of(run_id):
        return None
    home = Path(store.tag_of(run_id, OUTPUT_TAG))
    try:
        lineage = provenance.of_json((home / links.FILE).read_text(encoding="utf-8"), str(home))
    except (OSError, ValueError, UserError):
        return None
    if not lineage or lineage[-1].run_id != run_id:  # another training is in the folder now
        return None
    here = Path.cwd()
    return home.relative_to(here) if home.is_relative_to(here) else home


class Run:
    """One MLflow run and its output folder; a context manager that also says how it ended.

    Attributes:
        run_id: the MLflow run's id.
        output_dir: where everything is written first.
        lineage: the commands up to this one; () for what no later stage reads.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        stage: str = "",
        part: str = "",
        run_id: str | None = None,
        experiment: str = "",
        run_name: str = "",
        config: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        inputs: dict[str, str] | None = None,
        upstream: Lineage = (),
        continued: bool = False,
        logged: int | None = None,
        enabled: bool = True,
    ) -> None:
        """Open a new run, or with `run_id` an existing one.

        Args:
            output_dir: is made where it is missing.
            stage: tokenizer or gpt, or what is logged to a run of them, see `store.HOMES`.
            part: the folder in `output_dir` that the stage writes, if it is not all of it: journal
                and pictures lie beside it, by its name.
            run_id: of an existing run.
            experiment, run_name: of a new run; the experiment is by default named after the data.
            config: all settings, for config.json.
            params: at most 10 of them, since MLflow prints all of them on every picture.
            tags: further tags of a new run.
            inputs: the SHA-256 of what the stage reads, by path as given; its data first.
            upstream: the lineage of what it reads.
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
        self._system_metrics: SystemMetrics | None = None
        self._model_id = ""
        inputs = inputs or {}
        if not enabled:
            self.lineage = self._describe(stage, inputs, upstream)
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        self._client = gateway.open_client()
        with store_errors("cannot open a run in MLflow", START_OR_UNSET):
            if run_id is not None and not (continued and self._gone(run_id)):
                run = gateway.existing_run(self._client, run_id)
                if continued:
                    self._client.update_run(run_id, status="RUNNING")
                else:
                    self._model_id = registry.newest_model(run)
            else:
                first = {links.NOTE: links.first_note(output_dir)}
                run = store.create_run(
                    self._client,
                    stage,
                    experiment or provenance.data_set_name(next(iter(inputs), "images")),
                    run_name or output_dir.name,
                    params or {},
                    {**first, OUTPUT_TAG: str(output_dir.resolve()), **(tags or {})},
                )
        self.run_id = run.info.run_id
        self._start = run.info.start_time / 1000  # of the machine's figures, also when it goes on
        if config is not None:
            (output_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self._journal = Journal(output_dir, self.run_id, part)
        self._journal.note(**({"status": "RUNNING"} if self._owned else {}))
        self._experiment_id = run.info.experiment_id
        self._outbox = Outbox(complain=self._complain, is_final=gateway.is_refusal)
        self._points: set[tuple[str, int]] = set()  # numbers that MLflow has from before a crash
        if logged is not None:
            metrics_log.rewind(output_dir, logged)
        if continued:
            self._catch_up(metrics_log.read(output_dir))
        self.lineage = self._describe(stage, inputs, upstream)
        if config is not None:
            self.file(output_dir / "config.json")
        if self._owned:
            self._open_training()

    def _describe(self, stage: str, inputs: dict[str, str], upstream: Lineage) -> Lineage:
        return (*upstream, Stage.now(stage, inputs, self.run_id)) if stage else ()

    def _open_training(self) -> None:
        """What only the run of a training has: a lineage of its own, and figures of the machine."""
        if self.lineage:
            text = json.dumps(provenance.content(self.lineage), indent=2) + "\n"
            staging = self.output_dir / f"{links.FILE}.tmp"  # a crash leaves no half of it
            staging.write_text(text)
            staging.replace(self.output_dir / links.FILE)
            self._link()
        self._system_metrics = SystemMetrics(
            lambda values: self.metrics("system", values, round(time.time() - self._start))
        )

    def _link(self) -> None:
        """Say what the stage read, and link it with those before."""
        self._note(lineage=provenance.content(self.lineage))
        if self._owned:
            self._put(lambda: registry.log_inputs(self._client, self.lineage))
        self._put(lambda: links.link(self._client, self.lineage))

    def _gone(self, run_id: str) -> bool:
        """Whether a run that is to go on is not in this store, which is said."""
        try:
            gateway.existing_run(self._client, run_id)
        except UserError as error:
            print(f"warning: {error}; a new run takes its place", file=sys.stderr)
            return True
        return False

    @property
    def ui_hint(self) -> str:
        """The lines that tell the user how to see the run."""
        if self._experiment_id is None:
            return "not logged to MLflow"
        return links.ui_hint(self._experiment_id, self.run_id)

    how_to_look = ui_hint  # the former name, until its last caller is gone

    def metrics(self, section: str, values: dict[str, float], step: int) -> None:
        """Log numbers as section/name: to metrics.jsonl at once, to MLflow soon."""
        if self._outbox is None:
            return
        line = self._keep({f"{section}/{name}": value for name, value in values.items()}, step)
        self._put(partial(self._send, line))

    def _keep(self, values: dict[str, float], step: int) -> dict[str, Any]:
        """Write numbers to metrics.jsonl; the line of it."""
        line = {"step": step, "time": time.time(), "run_id": self.run_id, **values}
        metrics_log.append(self.output_dir, line)
        return line

    def _send(self, line: dict[str, Any]) -> None:
        """Send what MLflow lacks of a line of metrics.jsonl."""
        step, seconds = line["step"], line["time"]
        values = {
            name: value
            for name, value in metrics_log.numbers(line).items()
            if (name, step) not in self._points
        }
        if values:
            when, model_id = int(seconds * 1000), self._model_id or None
            points = [Point(name, x, when, step, model_id) for name, x in values.items()]
            gateway.send_points(self._client, self.run_id, points)

    def _catch_up(self, lines: list[dict[str, Any]]) -> None:
        """Send what a crash kept from MLflow."""

        def ask() -> None:
            self._points = store.logged_points(self._client, self.run_id)

        self._put(ask)
        for line in lines:
            self._put(partial(self._send, line))

    def picture(self, key: str, image: Image.Image, step: int) -> Path:
        """Log a picture: a PNG file under pictures/ at once, to MLflow soon."""
        name = f"{key.replace('/', '-')}-{step:08}.png"
        if self._outbox is None:
            return self.output_dir / journal.PICTURES / name
        path = self._journal.pictures / name
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        now, outbox = time.time(), self._outbox
        self._journal.note(now, picture=self._journal.place(path), key=key, step=step)
        where = self._client, self.run_id, path, key, step, int(now * 1000)
        self._put(lambda: store.send_picture(*where, check=outbox.troubled))
        return path

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        """Log a table, whose columns may hold pictures: under tables/ at once, to MLflow soon.

        It takes the place of a table of that name.
        """
        if self._outbox is not None:
            picture_table.write(self.output_dir, name, columns)
            self._note(table=name)
            self._put(lambda: store.send_table(self._client, self.run_id, self.output_dir, name))

    def folder(self, path: Path, name: str) -> None:
        """Log all files of a folder as artifacts under `name`."""
        if self._outbox is None:
            return
        self._note(folder=self._journal.place(path), name=name)
        self._put(lambda: self._client.log_artifacts(self.run_id, str(path), name))

    def file(self, path: Path, name: str = "") -> None:
        """Log one file as an artifact in the folder `name`."""
        if self._outbox is None:
            return
        self._note(file=self._journal.place(path), name=name)
        self._put(lambda: self._client.log_artifact(self.run_id, str(path), name or None))

    def model(
        self,
        folder: Path,
        values: dict[str, float],
        step: int,
        *,
        register: str = "",
        lower_is_better: bool = True,
    ) -> None:
        """Log the model folder that a training ends with, as artifacts and as a logged model.

        Args:
            folder: the model folder.
            values: figures of its quality, by full name.
            step: of the training.
            register: also a name in the registry, whose champion it becomes if its first figure
                beats that of the champion so far.
            lower_is_better: for that figure.
        """
        if self._outbox is None:
            return
        self.folder(folder, f"checkpoints/{folder.name}")
        where, now = (self._client, self.run_id), self._keep(values, step)["time"]
        entry = {"values": values, "step": step, "register": register, "lower": lower_is_better}
        self._note(model=self._journal.place(folder), **entry)
        self._put(lambda: registry.log_model(*where, folder, values, now, step))
        if register:
            criterion = registry.Criterion(next(iter(values)), lower_is_better)
            self._put(lambda: print(registry.register(*where, register, criterion)))

    def _note(self, **entry: object) -> None:
        if self._outbox is not None:
            self._journal.note(**entry)

    def _put(self, call: Callable[[], object]) -> None:
        if self._outbox is not None:
            self._outbox.put(call)

    def _complain(self, error: Exception) -> None:
        print(
            f"warning: MLflow does not take what is logged ({one_line(error)}); all of it "
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
        if self._system_metrics is not None:
            self._system_metrics.close()
        try:
            if self.lineage and not self._owned and status == "FINISHED":
                self._link()
            self._report()
            if self._owned:
                self.note_status(status)
        finally:  # also on a full disk MLflow gets what it can
            if self._owned:
                self._put(lambda: self._client.set_terminated(self.run_id, status))
            self._outbox.close()
            self._outbox = None

    def note_status(self, status: str) -> None:
        """Keep how the run ended, for a replay to tell MLflow."""
        self._note(status=status)

    def _report(self) -> None:
        """Write report.html anew: of this training, or of the one whose folder this stage is in."""
        folders = [self.output_dir, *self.output_dir.parents[:2]]  # as evaluation/<name>
        home = next((one for one in folders if (one / links.FILE).is_file()), None)
        if home is None:
            return
        try:
            self.file(report.write(home))
        except Exception as error:  # of whatever is in that folder: what was computed counts more
            print(f"warning: no report of {home}: {one_line(error)}", file=sys.stderr)
