"""Run: what a script logs to.

Everything is first written to the output folder (metrics.jsonl, pictures/, tables/). Two threads
then pass it on to MLflow, metrics and status apart from uploads, so that a slow or dead server
neither stops nor slows a training.
"""

import contextlib
import json
import os
import shlex
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL.Image import Image

from utils import addresses, provenance
from utils.addresses import NOT_INSTALLED, OUTPUT_TAG, how_to_connect, store_errors
from utils.cli import Flags, Stopped, UserError, command_line, one_line
from utils.provenance import Lineage, Stage
from utils.tracking import opening, report, store, sync
from utils.tracking.opening import LINEAGE
from utils.tracking.store import TABLES
from utils.tracking.sync import AsyncQueue, Event

MAX_PARAMS, MAX_PARAM = 10, 250  # MLflow prints all of them on every image; characters of one
SYSTEM_SECONDS = 10  # between samples of the machine
END_SECONDS = 20  # that a server may be silent while a run ends
SILENT_SECONDS = 5  # until a line states that uploads are awaited
UPLOAD_SECONDS, LINK = 150, 1e6  # an upload may take this long, and longer at LINK bytes a second
RESERVED = "images"  # an artifact folder in which MLflow's UI expects pictures of log_image only


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
    """Open the run of `--run_id`, else the model's if this MLflow store has it, or MLFLOW_RUN_ID.

    `default_run_id` is the run of the model, or ""; `homes` are the stages whose runs are accepted,
    by default `store.PARENTS` of the stage. For the rest see `Run`.

    Raises:
        UserError: the run of `--run_id` does not exist, or is of another stage.
    """
    options: dict[str, Any] = {"stage": stage, "part": part, "inputs": inputs, "upstream": upstream}
    if run_id is not None:
        opening.check_stage(run_id, homes or opening.PARENTS.get(stage, ()))
    elif opening.experiment_of(default_run_id):
        run_id = default_run_id
    else:
        run_id = os.environ.get("MLFLOW_RUN_ID") or None
    if run_id is None or not addresses.is_installed():
        missing = "the model's run is not in this store; --run_id names another"
        print(f"not logged to MLflow: {missing if addresses.is_installed() else NOT_INSTALLED}")
        return Run(output_dir, enabled=False, **options)
    return Run(output_dir, run_id=run_id, **options)


def home_of(run_id: str) -> Path | None:
    """The output folder of a training's run; None if either is missing, or it was reused."""
    if not opening.experiment_of(run_id):
        return None
    home = addresses.output_dir_of(run_id)
    try:
        lineage = provenance.from_json((home / LINEAGE).read_text(encoding="utf-8"), str(home))
    except (OSError, ValueError, UserError):
        return None
    if not lineage or lineage[-1].run_id != run_id:  # of another training by now
        return None
    return home.relative_to(Path.cwd()) if home.is_relative_to(Path.cwd()) else home


class Run:
    """One MLflow run and its output folder; a context manager that also records how it ended.

    Attributes:
        run_id: the id of the MLflow run.
        output_dir: the folder that everything is written to first.
        lineage: the commands up to this one; () for output that no later stage reads.
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
        flags: Flags | None = None,
        tags: dict[str, str] | None = None,
        inputs: dict[str, str] | None = None,
        upstream: Lineage = (),
        continued: bool = False,
        logged: int | None = None,
        enabled: bool = True,
    ) -> None:
        """Open a new run, or with `run_id` an existing one.

        Args:
            output_dir: is created if it does not exist.
            stage: tokenizer or gpt, or a stage that logs to the run of one, see `store.PARENTS`.
            part: the folder in `output_dir` that the stage writes, if that is not all of it.
            run_id: of an existing run.
            experiment, run_name, tags: of a new run; the experiment is by default that of its data.
            config: all settings, for config.json.
            params: at most 10 settings to compare runs by, with those of `flags` that were given
                as one of them.
            inputs: the SHA-256 of what the stage reads, by path as given; its data first.
            upstream: the lineage of what the stage reads.
            continued: the existing run goes on training and counts as running until it is closed.
                If it does not exist any more, a new one takes its place.
            logged: bytes of metrics.jsonl at the checkpoint from which a training resumes: what it
                logged later will be logged again, and MLflow gets no value twice.
            enabled: False in all processes but the first, where nothing is written.

        Raises:
            UserError: there is no such run, or MLflow cannot be used.
        """
        inputs, params = inputs or {}, params or {}
        if flags is not None:
            words = [f"{key}={value}" for key, value in opening.given_settings(flags).items()]
            params["flags"] = " ".join(words)[:MAX_PARAM] or "none"
        if len(params) > MAX_PARAMS:
            raise ValueError(f"at most {MAX_PARAMS} params, got {len(params)}: see config.json")
        self.output_dir, self.run_id = output_dir, run_id or ""
        self._is_training = continued or run_id is None
        self._log_file = output_dir / f"{part}.{sync.EVENTS}".lstrip(".")
        self._pictures = output_dir / f"{part}.{sync.PICTURES}".lstrip(".")
        self._is_open = enabled
        self._queues: list[AsyncQueue] = []  # of metrics and the status, and of uploads
        self._system: threading.Thread | None = None  # logs metrics of the machine
        self._closing = threading.Event()
        self._sent: set[tuple[str, int]] = set()  # values that MLflow has from before a crash
        self._warned = threading.Lock()  # taken by the first failure
        self._run: Any = None
        if enabled:
            output_dir.mkdir(parents=True, exist_ok=True)
        if enabled and addresses.is_installed():
            self._client = addresses.open_client()
            tags = {"stage": stage, OUTPUT_TAG: str(output_dir.resolve()), **(tags or {})}
            command = addresses.without_credentials(command_line())
            note = f"```\n{command}\n```\n\nOutput folder: `{output_dir}`"
            data_set = provenance.data_set_name(next(iter(inputs), "images"))
            with store_errors("cannot open a run in MLflow", how_to_connect):
                if run_id is not None:
                    self._run = opening.reopen(self._client, run_id, continued, output_dir)
                if self._run is None:
                    name = run_name or os.environ.get("MLFLOW_RUN_NAME") or output_dir.name
                    about = name, {opening.NOTE: note} | tags, params
                    self._run = opening.create_run(self._client, experiment, data_set, *about)
            opening.warn_if_moved(self._run)
            self.run_id = self._run.info.run_id
        elif enabled:
            print(f"not logged to MLflow: {NOT_INSTALLED}; everything is in {output_dir}")
        self.lineage = (*upstream, Stage.now(stage, inputs, self.run_id)) if stage else ()
        if enabled:
            self._start(config, logged, continued)

    def _start(self, config: dict[str, Any] | None, logged: int | None, continued: bool) -> None:
        """Start to send; write what only a training has: a lineage and metrics of the machine."""
        self._model_id = None if self._is_training else store.newest_model(self._run) or None
        if self._run:
            make = partial(AsyncQueue, on_error=self._warn_once, is_final=store.is_refusal)
            self._queues = [make(in_order=True), make(in_order=False)]
        if logged is not None:
            sync.rewind_metrics(self.output_dir, logged)
        if continued and self._queues:
            lines = sync.read_metrics(self.output_dir)
            self._queues[0].put("metric", partial(self._catch_up, lines))
        if config is not None:
            (self.output_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            self.file(self.output_dir / "config.json")
        if not self._is_training:
            return
        self.note_status("RUNNING")
        if self.lineage:
            staging = self.output_dir / f"{LINEAGE}.tmp"  # a crash leaves no half of the file
            staging.write_text(provenance.to_json(self.lineage, indent=2) + "\n")
            staging.replace(self.output_dir / LINEAGE)
            self._log(lineage=self.lineage)
        self._system = threading.Thread(target=self._log_system, daemon=True)
        self._system.start()

    def _log_system(self) -> None:
        """Log samples of the machine, by seconds since the run was created, until it is closed."""
        start = self._run.info.start_time / 1000 if self._run else time.time()
        sample = SystemSampler()
        with contextlib.suppress(OSError, psutil.Error):  # a machine that does not provide them
            while not self._closing.wait(SYSTEM_SECONDS):
                self.metrics("system", sample(), round(time.time() - start))

    def _catch_up(self, lines: list[Event]) -> None:
        """Send the metrics that a crash kept from MLflow."""
        run = self._client.get_run(self.run_id)
        self._sent = {(key, step) for key, _, step in store.logged_values(self._client, run)}
        for line in lines:
            self._send_metrics(line)

    @property
    def ui_hint(self) -> str:
        """The lines for the terminal that state how to open the run in MLflow's UI."""
        return opening.ui_hint(self._run) if self._run else "not logged to MLflow"

    def metrics(self, section: str, values: dict[str, float], step: int) -> None:
        """Log metrics as section/name: to metrics.jsonl at once, to MLflow soon."""
        if self._is_open:
            values = {f"{section}/{name}": value for name, value in values.items()}
            line = Event(time.time(), self.run_id, step=step, values=values)
            sync.append(self.output_dir / sync.METRICS, line)
            for queue in self._queues[:1]:
                queue.put("metric", partial(self._send_metrics, line))

    def _send_metrics(self, line: Event) -> None:
        points = [
            (name, value, line.milliseconds, line.step, self._model_id)
            for name, value in line.values.items()
            if (name, line.step) not in self._sent
        ]
        store.log_points(self._client, self.run_id, points)

    def _log(self, **fields: Any) -> Event:
        """Write an event to the event log at once, and send it to MLflow soon."""
        event = Event(time.time(), self.run_id, **fields)
        if event.name.split("/")[0] == RESERVED:
            raise ValueError(f"{event.name}: MLflow's UI reserves the artifact folder {RESERVED}/")
        if self._is_open:
            sync.append(self._log_file, event)
        for queue in self._queues[1:]:
            call = partial(sync.send, self._client, self.output_dir, event)
            queue.put(event.kind, call, sync.size_of(self.output_dir, event))
        return event

    def _relative(self, path: Path) -> str:
        """A path as the log holds it: relative, thus valid after the output folder is moved."""
        inside, home = Path(os.path.abspath(path)), Path(os.path.abspath(self.output_dir))
        return str(inside.relative_to(home) if inside.is_relative_to(home) else inside)

    def picture(self, key: str, image: Image, step: int) -> Path:
        """Log an image: a PNG file under pictures/ at once, to MLflow soon."""
        path = self._pictures / f"{key.replace('/', '-')}-{step:08}.png"
        if self._is_open:
            path.parent.mkdir(exist_ok=True)
            image.save(path)
            self._log(picture=self._relative(path), key=key, step=step)
        return path

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        """Log a table, whose values may be images; it replaces an earlier table of that name."""
        if self._is_open:
            store.write_table(self.output_dir / TABLES, name, columns)
            self._log(table=name)

    def folder(self, path: Path, name: str) -> None:
        """Log all files of a folder as artifacts under `name`."""
        self._log(folder=self._relative(path), name=name)

    def file(self, path: Path, name: str = "") -> None:
        """Log one file as an artifact in the folder `name`."""
        self._log(file=self._relative(path), name=name)

    def model(
        self,
        folder: Path,
        values: dict[str, float],
        step: int,
        *,
        register: str = "",
        lower_is_better: bool = True,
    ) -> None:
        """Log the final model of a training with its metrics, as artifacts and as a logged model.

        It also becomes a version of the registered model `register`, if given, and its champion if
        the first of `values` is the best so far.
        """
        self.folder(folder, f"checkpoints/{folder.name}")
        options = {"values": values, "step": step, "register": register, "lower": lower_is_better}
        event = self._log(model=self._relative(folder), **options)
        if self._is_open:
            sync.append(self.output_dir / sync.METRICS, event)

    def _warn_once(self, error: Exception) -> None:
        if self._warned.acquire(blocking=False):
            text = addresses.without_credentials(one_line(error))
            print(
                f"warning: MLflow does not accept what is logged ({text}); everything is in "
                f"{self.output_dir}, and is sent again until the end",
                file=sys.stderr,
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        stopped = isinstance(error, Stopped | KeyboardInterrupt | SystemExit)
        self.close("FINISHED" if error is None else "KILLED" if stopped else "FAILED")

    def close(self, status: str = "FINISHED") -> None:
        """Send what is left, and set the status of a training's run."""
        if not self._is_open:
            return
        self._closing.set()
        if self._system is not None:
            self._system.join()
        try:
            if self.lineage and not self._is_training and status == "FINISHED":
                self._log(lineage=self.lineage)
            self._write_report()
            if self._is_training:
                self.note_status(status)
        finally:  # MLflow gets what it can on a full disk as well
            self._is_open = False
            if self._queues:
                self._send_rest(status)

    def _send_rest(self, status: str) -> None:
        """Wait until MLflow has everything, or does not answer; state what is missing."""
        metrics, uploads = self._queues
        if self._is_training:
            metrics.put("status", partial(self._client.set_terminated, self.run_id, status))
        for queue in self._queues:
            queue.close()
        self._queues = []
        if metrics.join(END_SECONDS) and not uploads.join(SILENT_SECONDS):
            size = sum(size for _, size in uploads.left())
            patience = UPLOAD_SECONDS + max((x for _, x in uploads.left()), default=0) / LINK
            print(f"sending {size / 1e6:,.0f} MB to MLflow; Ctrl-C leaves the rest to --replay")
            uploads.join(patience)
        for queue in (metrics, uploads):
            queue.stop()
        kinds = [kind for queue in (metrics, uploads) for kind, _ in queue.left()]
        if missing := Counter(kinds + metrics.refused + uploads.refused):
            folder = shlex.quote(str(self.output_dir))
            print(
                f"warning: not in MLflow: {sync.in_words(missing)}; "
                f"python -m utils.tracking --replay {folder} sends what is missing",
                file=sys.stderr,
            )

    def note_status(self, status: str) -> None:
        """Write to the event log how the run ended, for a replay."""
        if self._is_open:
            sync.append(self._log_file, Event(time.time(), self.run_id, status=status))

    def _write_report(self) -> None:
        """Write report.html of this training, or of the one that `output_dir` lies in."""
        folders = [self.output_dir, *self.output_dir.parents[:2]]  # as in evaluation/<name>
        home = next((one for one in folders if (one / LINEAGE).is_file()), None)
        try:
            if home is not None:
                self.file(report.write(home))
        except Exception as error:  # the results count more than whatever is in that folder
            print(f"warning: no report of {home}: {one_line(error)}", file=sys.stderr)


class SystemSampler:
    """Load and memory of CPU and GPUs, disk, and network since it was made, by MLflow's names."""

    def __init__(self) -> None:
        self._network = psutil.net_io_counters()  # None on a machine without a network

    def __call__(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),  # since the previous sample
            "system_memory_usage_percentage": memory.percent,
            "system_memory_usage_megabytes": memory.used / 1e6,
            "process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if self._network and (now := psutil.net_io_counters()):
            received, sent = now.bytes_recv, now.bytes_sent
            values["network_receive_megabytes"] = (received - self._network.bytes_recv) / 1e6
            values["network_transmit_megabytes"] = (sent - self._network.bytes_sent) / 1e6
        for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            used = torch.cuda.memory_reserved(gpu)
            with contextlib.suppress(ImportError, RuntimeError):  # without nvidia-ml-py
                values[f"gpu_{gpu}_utilization_percentage"] = torch.cuda.utilization(gpu)
                used = torch.cuda.device_memory_used(gpu)
            values[f"gpu_{gpu}_memory_usage_megabytes"] = used / 1e6
        return values
