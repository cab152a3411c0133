"""Run: what a script logs to.

Everything goes first to the output folder (metrics.jsonl, pictures/, tables/). Two threads pass it
on to MLflow, metrics and status apart from uploads, so that no slow or dead server slows a script.
"""

import json
import os
import re
import shlex
import threading
import time
from collections import Counter
from contextlib import AbstractContextManager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL.Image import Image

from utils import addresses, provenance
from utils.addresses import NOT_INSTALLED, how_to_connect, store_errors
from utils.cli import Flags, Stopped, UserError, one_line
from utils.progress import warn
from utils.provenance import LINEAGE, Lineage, Stage
from utils.tracking import sync
from utils.tracking.sync import TABLES, Event, Sender

# The stages whose runs a later stage logs to.
PARENTS = {"indices": ("tokenizer",), "samples": ("gpt",), "images": ("gpt", "tokenizer")}
NOT_COMPARED = (  # flags of a training that do not make it another
    *("output_dir", "run_name", "experiment", "register", "resume", "debug", "profile", "device"),
    *("num_workers", "path_to_data", "model_dir", "checkpoint_every", "evaluate_every", "compile"),
    *("checkpoint_activations", "allow_outside_paths", "skip_bad_images", "lpips_weights"),
)
IN_NAME = ("quantizer", "codebook_size", "num_layers", "dim", "window_size", "init_from", "preset")
MAX_NAME = 40  # characters of a run's name: a longer one moves the pictures in MLflow out of view
MAX_PARAMS = 5  # MLflow prints all of them above each picture, and shows as much less of it
MAX_PARAM = 250  # characters of one
SYSTEM_SECONDS = 10  # between samples of the machine
END_SECONDS = 20  # that a server may be silent while a run ends
SILENT_SECONDS = 5  # until a line states that uploads are awaited
UPLOAD_SECONDS, LINK = 150, 1e6  # an upload may take this long, and longer at LINK bytes a second
NOT_LOGGED = "not logged to MLflow"
RESERVED = "images"  # an artifact folder in which MLflow's UI expects pictures of log_image only


def given_settings(flags: Flags) -> dict[str, Any]:
    """The settings on the command line by which trainings differ, without paths and the like."""
    names = sorted(flags.given - set(NOT_COMPARED))
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def name_of(flags: Flags, model: str) -> str:
    """`--run_name`, MLFLOW_RUN_NAME, or `model` and the flags that fit: bs64 for batch_size."""
    if name := flags.run_name or os.environ.get("MLFLOW_RUN_NAME"):
        return name
    for key, value in given_settings(flags).items():
        short = "".join(word[0] for word in key.split("_")) if "_" in key else key
        longer = re.sub(r"[^\w.-]+", "_", f"{model}-{short}{value}").rstrip("-_.")
        if key not in IN_NAME and len(longer) <= MAX_NAME:
            model = longer
    return model


def home_of(run_id: str) -> Path | None:
    """The output folder of a training's run; None if either is missing, or it was reused."""
    if not run_id:
        return None
    with suppress(OSError, ValueError, UserError):
        home = addresses.output_dir_of(run_id)
        lineage = provenance.from_json((home / LINEAGE).read_text(), str(home))
        if lineage and lineage[-1].run_id == run_id:  # else it is of another training by now
            return home.relative_to(Path.cwd()) if home.is_relative_to(Path.cwd()) else home
    return None


def continue_run(
    output_dir: Path,
    run_id: str | None,
    default_run_id: str,
    *,
    stage: str = "",
    homes: tuple[str, ...] = (),
    **options: Any,
) -> "Run":
    """Open the run of `--run_id`, else the model's if this MLflow store has it, or MLFLOW_RUN_ID.

    `default_run_id`: the model's run, or ""; `homes`: stages whose runs are accepted, by default
    `PARENTS`; `options`: see `Run`. A UserError if --run_id names no run or another stage's.
    """
    homes, missing = homes or PARENTS.get(stage, ()), ""
    if stage:  # it writes a folder of its own, and its logs are beside that
        output_dir, options["part"] = output_dir.parent, output_dir.name
    if not options.pop("enabled", True):
        return Run(output_dir, stage=stage, enabled=False, **options)
    if run_id is not None:
        found = addresses.find_run(run_id).data.tags.get("stage", "")
        if homes and found not in homes:
            raise UserError(
                f"the MLflow run {run_id} is that of a {found or 'stage that is not known'}, but "
                f"this belongs to the run of a {' or '.join(homes)}; change or omit --run_id"
            )
    elif not addresses.is_installed():
        missing = NOT_INSTALLED
    else:
        run_id = default_run_id if addresses.has_run(default_run_id) else None
        run_id = run_id or os.environ.get("MLFLOW_RUN_ID")
        missing = "" if run_id else "the model's run is not in this store; --run_id names another"
    if missing:
        print(f"{NOT_LOGGED}: {missing}")
    return Run(output_dir, stage=stage, run_id=run_id, enabled=not missing, **options)


class Run(AbstractContextManager):
    """One MLflow run and its output folder; a context manager that also records how it ended.

    `lineage` are the commands up to this one, () for output that no later stage reads; `ui_hint`
    states how to open the run in MLflow's UI.
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
        enabled: bool = True,
    ) -> None:
        """Open a new run, or with `run_id` an existing one; a UserError if that is impossible.

        Args:
            stage: tokenizer or gpt, or a stage that logs to the run of one, see `PARENTS`.
            part: the folder in `output_dir` that the stage writes, if that is not all of it.
            experiment, run_name, tags: of a new run; the experiment is by default that of its data.
            config: all settings, for config.json.
            params: at most 5 settings to compare runs by; the other given `flags` are one of them.
            inputs: the SHA-256 of what the stage reads, by path as given; its data first.
            upstream: the lineage of what the stage reads.
            continued: an existing run goes on training. If it is gone, a new one takes its place.
                What it logs again of the steps after its checkpoint is left out.
            enabled: False in all processes but the first: they only log that a training failed.
        """
        self.output_dir, self.run_id, self.ui_hint = output_dir, run_id or "", NOT_LOGGED
        self._is_training, self._is_open = continued or run_id is None, enabled
        self._metrics = output_dir / sync.METRICS
        self._events = output_dir / f"{part}.{sync.EVENTS}".lstrip(".")
        self._pictures = output_dir / f"{part}.pictures".lstrip(".")
        self._senders: list[Sender] = []  # of metrics and the status, and of uploads
        self._system: threading.Thread | None = None  # logs metrics of the machine
        self._start_time, self._closing = time.time(), threading.Event()
        self._logged: set[tuple[str, int]] = set()  # metrics and their steps before a crash
        self._warned = threading.Lock()  # taken by the first failure
        inputs, params = inputs or {}, params or {}
        if flags is not None:
            given = given_settings(flags)
            words = [f"{key}={value}" for key, value in given.items() if key not in params]
            params["flags"] = " ".join(words)[:MAX_PARAM] or "none"
        if len(params) > MAX_PARAMS:
            raise ValueError(f"at most {MAX_PARAMS} params, got {len(params)}: see config.json")
        if enabled:
            output_dir.mkdir(parents=True, exist_ok=True)
            name = run_name or os.environ.get("MLFLOW_RUN_NAME") or output_dir.name
            tags = {"stage": stage, **(tags or {})}
            self._connect(continued, experiment, next(iter(inputs), "images"), name, tags, params)
        self.lineage = (*upstream, Stage.now(stage, inputs, self.run_id)) if stage else ()
        if enabled:
            self._start(config, continued)

    def _connect(self, continued: bool, *new: Any) -> None:
        """Open the run in MLflow, and start to send to it; `new` describes a new one."""
        if not addresses.is_installed():
            print(f"{NOT_LOGGED}: {NOT_INSTALLED}; everything is in {self.output_dir}")
            return
        from utils.tracking import store

        client, run = addresses.open_client(), None
        with store_errors("cannot open a run in MLflow", how_to_connect):
            if self.run_id:
                run = store.reopen(client, self.run_id, continued, self.output_dir)
            run = run or store.create_run(client, self.output_dir, *new)
        store.warn_if_moved(run)
        self.run_id, self.ui_hint = run.info.run_id, store.ui_hint(run)
        self._start_time = run.info.start_time / 1000
        logged = cache(partial(store.logged_metrics, client, self.run_id))

        def send(events: list[Event]) -> None:
            if events[0].kind == "metric":
                store.log_metrics(client, run, events, logged() if continued else set())
            else:
                store.send(client, self.output_dir, events[0])
                with suppress(OSError):  # a full disk
                    sync.append(self._events, sync.sent(events[0]))

        self._senders = [Sender(send, self._warn_once) for _ in range(2)]

    def _start(self, config: dict[str, Any] | None, continued: bool) -> None:
        """Send what a crash left; write what only a training has, and measure the machine."""
        sync.end_line(self._metrics)
        sync.end_line(self._events)
        if self._is_training:
            self.note_status("RUNNING")
        if continued:
            lines, events = sync.read_metrics(self.output_dir), sync.read_events(self.output_dir)
            self._logged = {(name, line.step) for line in lines for name in line.values}
            left = lines, sync.unsent(events, self.run_id)
            for sender, own in zip(self._senders, left, strict=False):
                sender.put(*own)
        if config is not None:
            (self.output_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            self.file(self.output_dir / "config.json")
        if not self._is_training:
            return
        if self.lineage:
            staging = self.output_dir / f"{LINEAGE}.tmp"  # a crash leaves no half of the file
            staging.write_text(provenance.to_json(self.lineage, indent=2) + "\n")
            staging.replace(self.output_dir / LINEAGE)
            self._log_lineage()
        self._system = threading.Thread(target=self._log_system, daemon=True)
        self._system.start()

    def _log_system(self) -> None:
        """Log samples of the machine, by seconds since the run was created, until it is closed."""
        with suppress(OSError, psutil.Error):  # a machine that does not provide them
            before = psutil.net_io_counters()
            while not self._closing.wait(SYSTEM_SECONDS):
                seconds = round(time.time() - self._start_time)
                self.metrics("system", sample_system(before), seconds)

    def metrics(self, section: str, values: dict[str, float], step: int) -> None:
        """Log metrics as section/name: to metrics.jsonl at once, to MLflow soon."""
        named = {f"{section}/{name}": value for name, value in values.items()}
        new = {name: value for name, value in named.items() if (name, step) not in self._logged}
        if new:
            self._log("metric", step=step, values=new)

    def _log(self, kind: str, name: str = "", path: Path | None = None, **fields: Any) -> None:
        """Write an event to its log at once, and send it to MLflow soon; see `Event`."""
        if name.split("/")[0] == RESERVED:
            raise ValueError(f"{name}: MLflow's UI reserves the artifact folder {RESERVED}/")
        if not self._is_open:
            return
        if path is not None:  # valid where the folder is moved
            fields["path"] = os.path.relpath(path, self.output_dir)
        fields = {"time": time.time(), **fields}
        event = Event(run_id=self.run_id, kind=kind, name=name, **fields)
        try:
            sync.append(self._metrics if kind == "metric" else self._events, event)
        finally:  # MLflow gets what it can on a full disk as well
            if self._senders:
                self._senders[kind not in ("metric", "status")].put(event)

    def _log_lineage(self) -> None:
        for run_id in sorted({stage.run_id for stage in self.lineage} - {""}):
            self._log("lineage", run_id, lineage=self.lineage)

    def picture(self, key: str, image: Image, step: int) -> Path:
        """Log an image: a PNG file under pictures/ at once, to MLflow soon."""
        path = self._pictures / f"{key.replace('/', '-')}-{step:08}.png"
        if self._is_open:
            self._pictures.mkdir(exist_ok=True)
            image.save(path)
            self._log("picture", key, path, step=step)
        return path

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        """Log a table, whose values may be images; it replaces an earlier table of that name."""
        if self._is_open:
            sync.write_table(self.output_dir / TABLES, name, columns)
            self._log("table", name)

    def folder(self, path: Path, name: str) -> None:
        """Log all files of a folder as artifacts under `name`."""
        self._log("folder", name, path)

    def file(self, path: Path, name: str = "") -> None:
        """Log one file as an artifact in the folder `name`."""
        self._log("file", name, path)

    def model(
        self, folder: Path, values: dict[str, float], step: int, register: str = "", **fields: bool
    ) -> None:
        """Log the final model of a training with its metrics, as artifacts and as a logged model.

        It also becomes a version of the registered model `register`, if given, and its champion if
        the first of `values` is the best so far; see `lower_is_better` in `Event`.
        """
        self.folder(folder, f"checkpoints/{folder.name}")
        now = time.time()
        self._log("model", register, folder, time=now, step=step, values=values, **fields)
        if (next(iter(values)), step) not in self._logged:
            self._log("metric", time=now, step=step, values=values)

    def _warn_once(self, error: Exception) -> None:
        if self._warned.acquire(blocking=False):
            text = addresses.without_credentials(one_line(error))
            warn(
                f"MLflow does not accept what is logged ({text}); everything is in "
                f"{self.output_dir}, and is sent again until the end"
            )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        stopped = isinstance(error, Stopped | KeyboardInterrupt | SystemExit)
        status = "FINISHED" if error is None else "KILLED" if stopped else "FAILED"
        if status == "FAILED" and self.run_id and not self._is_open:
            with suppress(Exception):  # this process speaks for the main one, which may be killed
                from utils.tracking import store

                store.fail_if_running(addresses.open_client(), self.run_id)
        self.close(status)

    def note_status(self, status: str) -> None:
        self._log("status", status)

    def close(self, status: str = "FINISHED") -> None:
        """Send what is left, and set the status of a training's run."""
        if not self._is_open:
            return
        self._closing.set()
        if self._system is not None:
            self._system.join()
        try:
            if self.lineage and not self._is_training and status == "FINISHED":
                self._log_lineage()
        finally:
            with suppress(OSError):  # a full disk
                if self._is_training:
                    self.note_status(status)
            self._is_open = False
            if self._senders:
                self._send_rest()

    def _send_rest(self) -> None:
        """Wait until MLflow has everything, or does not answer; state what is missing."""
        metrics, uploads = self._senders
        for sender in self._senders:
            sender.close()
        if metrics.wait(END_SECONDS) and not uploads.wait(SILENT_SECONDS):
            sizes = [sync.size_of(self.output_dir, event) for event in uploads.left()]
            print(f"sending {sum(sizes) // 10**6:,} MB to MLflow; Ctrl-C leaves them to --replay")
            uploads.wait(UPLOAD_SECONDS + max(sizes, default=0) / LINK)
        missing: Counter[str] = Counter()
        for sender in self._senders:
            sender.stop()
            missing += sender.refused + Counter(event.kind for event in sender.left())
        if missing:
            warn(
                f"not in MLflow: {sync.in_words(missing)}; python -m utils.tracking "
                f"--replay {shlex.quote(str(self.output_dir))} sends what is missing"
            )


def sample_system(before: Any) -> dict[str, float]:
    """Load and memory of CPU and GPUs, disk, and network since `before`, by MLflow's names."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),  # since the previous sample
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_megabytes": memory.used / 1e6,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
    }
    if before and (now := psutil.net_io_counters()):  # None without a network
        values["network_receive_megabytes"] = (now.bytes_recv - before.bytes_recv) / 1e6
        values["network_transmit_megabytes"] = (now.bytes_sent - before.bytes_sent) / 1e6
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        used = torch.cuda.memory_reserved(gpu)
        with suppress(ImportError, RuntimeError):  # without nvidia-ml-py
            values[f"gpu_{gpu}_utilization_percentage"] = torch.cuda.utilization(gpu)
            used = torch.cuda.device_memory_used(gpu)
        values[f"gpu_{gpu}_memory_usage_megabytes"] = used / 1e6
    return values
