"""From the output folder to MLflow: two logs on disk, an async queue, and replay.

metrics.jsonl holds the metrics, a JSON object per line: `step`, `time` (seconds since 1970),
`run_id`, and values by name. mlflow.jsonl, the event log, holds everything else: see `Event`.
"""

import json
import os
import queue
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from utils.addresses import find_run
from utils.cli import UserError
from utils.files import TABLE_BYTES, check_size, typed
from utils.provenance import Stage
from utils.tracking import store
from utils.tracking.store import Point

METRICS, EVENTS, PICTURES = "metrics.jsonl", "mlflow.jsonl", "pictures"
TRAINING = ("train/", "val/")  # prefixes of the metrics that a resumed training logs again
STATUSES = ("", "RUNNING", "FINISHED", "FAILED", "KILLED")
MAX_TIME = 1e11  # seconds since 1970
RETRY_SECONDS = 10  # between attempts after a call failed
Read = TypeVar("Read")


@dataclass(frozen=True)
class Entry:
    """What the lines of both logs have in common: seconds since 1970, and the MLflow run."""

    time: float
    run_id: str

    def __post_init__(self) -> None:
        if not 0 <= self.time < MAX_TIME or not re.fullmatch(r"[\w-]{1,80}", self.run_id, re.ASCII):
            raise ValueError(f"time or run_id out of range: {self.time}, {self.run_id!r:.80}")

    @property
    def milliseconds(self) -> int:
        return int(self.time * 1000)


@dataclass(frozen=True)
class Metrics(Entry):
    """A line of metrics.jsonl."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Event(Entry):
    """A line of mlflow.jsonl; exactly one of the fields that start a row is set, or none.

    Paths are relative to the folder of the log if they are inside.
    """

    picture: str = ""  # a PNG file, logged as `key` at `step`
    key: str = ""
    step: int = 0
    table: str = ""  # its name
    folder: str = ""  # or a file: logged below the artifact folder `name`
    file: str = ""
    name: str = ""
    lineage: tuple[Stage, ...] = ()
    model: str = ""  # a model folder with its metrics at `step`; perhaps a name to `register`
    values: dict[str, float] = field(default_factory=dict)
    register: str = ""
    lower: bool = True  # is better, for the first of `values`
    status: str = ""  # RUNNING when a training opened the run, then how it ended

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.status not in STATUSES or (self.model and not self.values):
            raise ValueError(f"status {self.status!r:.80}, values {self.values!r:.80}")


class EventLog:
    """The event log of one run.

    Attributes:
        pictures: the folder of its pictures.
    """

    def __init__(self, folder: Path, run_id: str, part: str = "") -> None:
        """Name the files; those of a run that writes only a `part` of the folder have a prefix."""
        prefix = f"{part}." if part else ""
        self._folder, self._run_id = folder, run_id
        self._file, self.pictures = folder / f"{prefix}{EVENTS}", folder / f"{prefix}{PICTURES}"

    def append(self, **fields: Any) -> Event:
        """Write an event to disk."""
        event = Event(time.time(), self._run_id, **fields)
        line = {"time": event.time, "run_id": event.run_id, **fields}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=asdict) + "\n")
        return event

    def relative(self, path: Path) -> str:
        """A path as the log holds it: relative, thus valid after the output folder is moved."""
        inside, home = Path(os.path.abspath(path)), Path(os.path.abspath(self._folder))
        return str(inside.relative_to(home) if inside.is_relative_to(home) else inside)


def append_metrics(folder: Path, line: Metrics) -> None:
    content = {"step": line.step, "time": line.time, "run_id": line.run_id, **line.values}
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def read_metrics(folder: Path) -> list[Metrics]:
    """All lines of metrics.jsonl but damaged ones; none before anything was logged."""

    def parse(line: dict[str, Any]) -> Metrics:
        known: dict[str, Any] = {
            key: line.pop(key) for key in ("step", "time", "run_id") if key in line
        }
        return typed(Metrics, {**known, "values": line})

    path = folder / METRICS
    return _read_lines(path, parse) if path.is_file() else []


def read_events(folder: Path) -> list[Event]:
    """The events of all logs in a folder, in the order of time.

    Raises:
        UserError: there is no event log.
    """
    paths = sorted(folder.glob(f"*{EVENTS}")) or [folder / EVENTS]
    events = [event for path in paths for event in _read_lines(path, lambda x: typed(Event, x))]
    return sorted(events, key=lambda event: event.time)


def _read_lines(path: Path, parse: Callable[[Any], Read]) -> list[Read]:
    """The lines of a JSON Lines file; damaged ones, as a crash leaves, are counted and skipped."""
    try:
        check_size(path, TABLE_BYTES)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; give the output folder of a run") from error
    found = []
    for line in lines:
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, TypeError, AttributeError, RecursionError, UserError):
            continue
    if len(found) < len(lines):
        count = len(lines) - len(found)
        print(f"warning: {path}: {count} damaged lines are skipped", file=sys.stderr)
    return found


def rewind_metrics(folder: Path, size: int) -> None:
    """Remove what a training logged behind the first `size` bytes: it is logged again.

    Lines of other stages, such as an evaluation, remain.
    """
    path = folder / METRICS
    if not path.is_file():
        return
    content = path.read_bytes()
    kept = [content[:size]]
    for line in content[size:].splitlines(keepends=True):
        try:
            names = json.loads(line).keys()
        except (ValueError, AttributeError):
            continue  # cut off by a crash
        if not any(name.startswith(TRAINING) for name in names):
            kept.append(line)
    staging = path.with_name(METRICS + ".tmp")
    staging.write_bytes(b"".join(kept))
    staging.replace(path)


class AsyncQueue:
    """Makes calls in order in a thread; a call that fails is repeated until the queue closes."""

    def __init__(
        self, *, on_error: Callable[[Exception], object], is_final: Callable[[Exception], bool]
    ) -> None:
        """Start; `on_error` gets each failure, `is_final` decides which calls are given up."""
        self._on_error, self._is_final = on_error, is_final
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], object]) -> None:
        """Have a call made soon. It must end by itself if the server does not answer."""
        self._calls.put(call)

    def close(self) -> None:
        """Take no more calls; from now on the first failure ends the thread."""
        self._calls.put(None)
        self._closing.set()

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            while not self._attempt(call):
                if self._closing.is_set():
                    return
                self._closing.wait(RETRY_SECONDS)

    def _attempt(self, call: Callable[[], object]) -> bool:
        """Whether the call is done: it was made, or refused for good."""
        try:
            call()
        except Exception as error:  # of the server, its database, its artifact store or the network
            self._on_error(error)
            return self._is_final(error)
        return True


def send(client: Any, home: Path, event: Event) -> None:
    """Send an event to MLflow; sending it again changes nothing."""
    run_id, time = event.run_id, event.milliseconds
    if event.picture:
        store.log_image(client, run_id, home / event.picture, event.key, event.step, time)
    elif event.table:
        store.log_table(client, run_id, home, event.table)
    elif event.folder:
        client.log_artifacts(run_id, str(home / event.folder), event.name or None)
    elif event.file:
        client.log_artifact(run_id, str(home / event.file), event.name or None)
    elif event.lineage:
        store.link(client, event.lineage)
    elif event.model:
        store.log_model(client, run_id, home / event.model, event.values, time, event.step)
        if event.register:
            metric = next(iter(event.values))
            print(store.register(client, run_id, event.register, metric, event.lower))


def replay(client: Any, home: Path) -> Counter[str]:
    """Send what the runs of an output folder logged and MLflow does not have; count it by kind.

    The training of the folder must have ended.

    Raises:
        UserError: there is no such folder, or its run is not in this MLflow store.
    """
    sent: Counter[str] = Counter()
    events, lines = read_events(home), read_metrics(home)
    for run_id in dict.fromkeys(one.run_id for one in (*events, *lines)):
        run = find_run(run_id, client)
        own = [event for event in events if event.run_id == run_id]
        sizes = cache(lambda folder, run_id=run_id: _artifacts(client, run_id, folder))
        for event in own:
            sent.update(_send_missing(client, run, home, event, sizes))
        own_lines = [line for line in lines if line.run_id == run_id]
        sent["metrics"] += _send_missing_metrics(client, run_id, own_lines)
        ended = next((event for event in reversed(own) if event.status), None)
        if ended and ended.status not in ("RUNNING", run.info.status):
            client.set_terminated(run_id, ended.status, ended.milliseconds)
            sent["status"] += 1
    return sent


def _artifacts(client: Any, run_id: str, folder: str) -> dict[str, int]:
    """Name and bytes of the artifacts in a folder."""
    return {Path(x.path).name: x.file_size for x in client.list_artifacts(run_id, folder or None)}


def _send_missing(
    client: Any, run: Any, home: Path, event: Event, sizes: Callable[[str], dict[str, int]]
) -> Counter[str]:
    """Send an event, or the files of it, that MLflow does not have; count them by kind.

    Files outside of the output folder are not sent: the log may be a stranger's.
    """
    if event.file or event.folder or event.table:
        count = 0
        for file, folder in _files(home, event):
            size = file.stat().st_size
            if sizes(folder).get(file.name) != size and _is_inside(file, home):
                client.log_artifact(event.run_id, str(file), folder or None)
                sizes(folder)[file.name] = size  # as MLflow lists it from now on
                count += 1
        if event.table and count:
            store.list_table(client, event.run_id, event.table)
        return Counter(tables=min(count, 1)) if event.table else Counter(files=count)
    kind, missing = "", False
    if event.picture:
        names = store.image_names(event.key, event.step, event.milliseconds)
        missing = not set(names) <= sizes("images").keys()
        kind, missing = "pictures", missing and _is_inside(home / event.picture, home)
    elif event.lineage:
        kind, missing = "links", not store.is_linked(client, event.lineage)
    elif event.model:
        missing = not store.newest_model(run) and _is_inside(home / event.model, home)
        kind = "models"
    if missing:
        send(client, home, event)
    return Counter({kind: int(missing)}) if kind else Counter()


def _files(home: Path, event: Event) -> Iterator[tuple[Path, str]]:
    """Each existing file of a file, folder or table, and its folder among the artifacts."""
    table = f"{store.TABLES}/{event.table}"
    tops = [(home / table, table), (home / f"{table}.json", store.TABLES)]
    for top, name in tops if event.table else [(home / (event.file or event.folder), event.name)]:
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if file.is_file():
                folder = file.parent.relative_to(top) if top.is_dir() else Path()
                yield file, (Path(name) / folder).as_posix().removeprefix(".")


def _is_inside(path: Path, home: Path) -> bool:
    """Whether a file or folder exists and, links followed, it and its content are in `home`."""
    found = [one.resolve() for one in (path, *path.rglob("*"))]
    return path.exists() and all(one.is_relative_to(home.resolve()) for one in found)


def _send_missing_metrics(client: Any, run_id: str, lines: list[Metrics]) -> int:
    model_id = store.newest_model(client.get_run(run_id)) or None
    points = [
        Point(key, value, line.milliseconds, line.step)
        for line in lines
        for key, value in line.values.items()
    ]
    there = {
        (key, one.timestamp, one.step)
        for key in sorted({one.key for one in points})
        for one in client.get_metric_history(run_id, key)
    }
    # A training resumed after a crash logs the metrics of some steps again, at another time.
    repeated = {(key, step) for key, _, step in there if key.startswith(TRAINING)}
    missing = [
        # What a later stage measured belongs to the model.
        one if one.key.startswith((*TRAINING, "system/")) else one._replace(model_id=model_id)
        for one in points
        if (one.key, one.time, one.step) not in there and (one.key, one.step) not in repeated
    ]
    store.log_points(client, run_id, missing)
    return len(missing)
