"""From the output folder to MLflow: two logs on disk, an async queue, and replay.

metrics.jsonl holds the metrics, a JSON object per line: `step`, `time` (seconds since 1970),
`run_id`, and values by name. mlflow.jsonl, the event log, holds everything else: see `Event`.
"""

import json
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from utils.addresses import find_run
from utils.cli import UserError
from utils.files import typed
from utils.provenance import Stage
from utils.tracking import store

METRICS, EVENTS, PICTURES = "metrics.jsonl", "mlflow.jsonl", "pictures"
TRAINING = ("train/", "val/")  # prefixes of the metrics that a resumed training logs again
KINDS = ("picture", "table", "folder", "file", "lineage", "model", "status")  # of events
RETRY_SECONDS = 10  # between attempts after a call failed
GIVE_UP_SECONDS = 10  # without a success, once a queue is closed


@dataclass(frozen=True)
class Event:
    """A line of mlflow.jsonl, where one of the fields in `KINDS` is set, or of metrics.jsonl.

    Paths are relative to the folder of the log if they are inside.
    """

    time: float  # seconds since 1970
    run_id: str
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

    @property
    def kind(self) -> str:
        return next((kind for kind in KINDS if getattr(self, kind)), "metric")

    @property
    def milliseconds(self) -> int:
        return int(self.time * 1000)


def append(path: Path, event: Event) -> None:
    """Write an event to the end of its log."""
    line: dict[str, Any] = {"time": event.time, "run_id": event.run_id}
    if path.name == METRICS:
        line |= {"step": event.step, **event.values}
    else:
        default = asdict(Event(event.time, event.run_id))
        line |= {key: value for key, value in asdict(event).items() if value != default[key]}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[Event]:
    """All lines of metrics.jsonl but damaged ones; none before anything was logged."""

    def parse(line: dict[str, Any]) -> Event:
        known: dict[str, Any] = {
            key: line.pop(key) for key in ("step", "time", "run_id") if key in line
        }
        return typed(Event, {**known, "values": line})

    path = folder / METRICS
    return _read_lines(path, parse) if path.is_file() else []


def read_events(folder: Path) -> list[Event]:
    """The events of all logs in a folder, in the order of time.

    Raises:
        UserError: there is no event log.
    """
    paths = sorted(folder.glob(f"*{EVENTS}")) or [folder / EVENTS]
    events = [event for path in paths for event in _read_lines(path, partial(typed, Event))]
    return sorted(events, key=lambda event: event.time)


def _read_lines(path: Path, parse: Callable[[Any], Event]) -> list[Event]:
    """The events of a log; damaged lines, as a crash leaves, are counted and skipped."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; give the output folder of a run") from error
    found = []
    for line in lines:
        with suppress(ValueError, TypeError, AttributeError, UserError):
            found.append(parse(json.loads(line)))
    if damaged := len(lines) - len(found):
        print(f"warning: {path}: {damaged} damaged lines are skipped", file=sys.stderr)
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
    """Makes calls in a thread. One that fails is made again: before the others, or after them.

    Attributes:
        refused: the kinds of the calls that are given up.
    """

    def __init__(
        self,
        *,
        in_order: bool,
        on_error: Callable[[Exception], object],
        is_final: Callable[[Exception], bool],
    ) -> None:
        """Start; `on_error` gets each failure, `is_final` decides which calls are given up."""
        self._in_order, self._on_error, self._is_final = in_order, on_error, is_final
        self._calls: deque[tuple[str, int, Callable[[], object]]] = deque()
        self._changed = threading.Condition()
        self._is_open, self._is_stopped, self._success = True, False, time.monotonic()
        self.refused: list[str] = []
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, kind: str, call: Callable[[], object], size: int = 0) -> None:
        """Have a call made soon that sends `size` bytes."""
        with self._changed:
            self._calls.append((kind, size, call))
            self._changed.notify()

    def left(self) -> list[tuple[str, int]]:
        """Kind and bytes of the calls that are not done."""
        with self._changed:
            return [(kind, size) for kind, size, _ in self._calls]

    def close(self) -> None:
        """Take no more calls, and end when all are done or nothing succeeds any more."""
        with self._changed:
            self._is_open, self._success = False, time.monotonic()
            self._changed.notify()

    def join(self, patience: float) -> bool:
        """Wait while calls succeed at least this often, in seconds; whether all are done."""
        while self._thread.is_alive() and time.monotonic() < self._success + patience:
            self._thread.join(0.05)
        return not self.left()

    def stop(self) -> None:
        """Make no call after the current one."""
        self._is_stopped = True
        self._thread.join(0.5)

    def _work(self) -> None:
        failures = 0  # in a row
        while not self._is_stopped:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or not self._is_open)
                if not self._calls:
                    return
                kind, _, call = self._calls[0]  # it counts as left while it is made
            done = self._attempt(kind, call)
            with self._changed:
                if done:
                    self._calls.popleft()
                elif not self._in_order:
                    self._calls.rotate(-1)
                failures = 0 if done else failures + 1
                late = time.monotonic() > self._success + GIVE_UP_SECONDS
                if not self._is_open and (late or failures > len(self._calls)):
                    return
                if not done:
                    self._changed.wait_for(lambda: not self._is_open, RETRY_SECONDS)

    def _attempt(self, kind: str, call: Callable[[], object]) -> bool:
        """Whether the call is done: it was made, or refused for good."""
        try:
            call()
        except Exception as error:  # of the server, its database, its artifact store or the network
            self._on_error(error)
            if not self._is_final(error):
                return False
            self.refused.append(kind)
        self._success = time.monotonic()
        return True


def send(client: Any, home: Path, event: Event) -> None:
    """Send an event to MLflow; sending it again changes nothing."""
    run_id, at = event.run_id, event.milliseconds
    if event.picture:
        store.log_image(client, run_id, home / event.picture, event.key, event.step, at)
    elif event.table:
        store.log_table(client, run_id, home, event.table)
    elif event.folder:
        client.log_artifacts(run_id, str(home / event.folder), event.name or None)
    elif event.file:
        client.log_artifact(run_id, str(home / event.file), event.name or None)
    elif event.lineage:
        store.link(client, event.lineage)
    elif event.model:
        store.log_model(client, run_id, home / event.model, event.values, at, event.step)
        if event.register:
            metric = next(iter(event.values))
            print(store.register(client, run_id, event.register, metric, event.lower))


def in_words(counts: Counter[str]) -> str:
    """`1 model, 2 pictures`."""
    return ", ".join(f"{n:,} {kind}{'s' * (n > 1)}" for kind, n in counts.items() if n)


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
        listed = cache(partial(store.artifacts, client, run_id))
        for event in own:
            if _is_missing(client, run, home, event, listed):
                send(client, home, event)
                listed.cache_clear()
                sent[event.kind] += 1
        sent["metric"] += _send_metrics(client, run, [x for x in lines if x.run_id == run_id])
        ended = next((event for event in reversed(own) if event.status), None)
        if ended and ended.status not in ("RUNNING", run.info.status):
            client.set_terminated(run_id, ended.status, ended.milliseconds)
            sent["status"] += 1
    return sent


def _is_missing(
    client: Any, run: Any, home: Path, event: Event, listed: Callable[[str], dict[str, int]]
) -> bool:
    """Whether MLflow lacks what an event sends.

    Files outside of the output folder are not sent: the log may be a stranger's.
    """
    if event.lineage:
        return not store.is_linked(client, event.lineage)
    if event.model:
        return not store.newest_model(run) and _is_inside(home / event.model, home)
    missing = False
    for artifact, path in _files(home, event):
        if not _is_inside(path, home):
            return False
        there = listed(str(Path(artifact).parent)).get(artifact)
        missing |= there != path.stat().st_size and (there is None or not event.picture)
    return missing


def _files(home: Path, event: Event) -> Iterator[tuple[str, Path]]:
    """Each artifact of an event, and the existing file that it is made of."""
    if event.picture:
        names = store.image_names(event.key, event.step, event.milliseconds)
        tops = [(f"images/{name}", home / event.picture) for name in names]
    elif event.table:
        table = f"{store.TABLES}/{event.table}"
        tops = [(name, home / name) for name in (table, f"{table}.json")]
    else:
        path = home / (event.folder or event.file)
        tops = [(event.name if event.folder else f"{event.name}/{path.name}".lstrip("/"), path)]
    for name, top in tops if event.kind not in ("status", "") else ():
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if file.is_file():
                yield (Path(name) / file.relative_to(top)).as_posix(), file


def size_of(home: Path, event: Event) -> int:
    """Bytes that an event sends."""
    path = home / (event.model or event.folder or event.file or event.picture or "nothing")
    return sum(x.stat().st_size for x in (path, *path.rglob("*")) if x.is_file())


def _is_inside(path: Path, home: Path) -> bool:
    """Whether a file or folder exists and, links followed, it and its content are in `home`."""
    found = [one.resolve() for one in (path, *path.rglob("*"))]
    return path.exists() and all(one.is_relative_to(home.resolve()) for one in found)


def _send_metrics(client: Any, run: Any, lines: list[Event]) -> int:
    """Send the values of a run that MLflow does not have; how many these are."""
    there = store.logged_values(client, run)
    # A training resumed after a crash logs the metrics of some steps again, at another time.
    there |= {(key, None, step) for key, _, step in there if key.startswith(TRAINING)}
    model = store.newest_model(client.get_run(run.info.run_id)) or None
    missing = [
        # What a later stage measured belongs to the model.
        (*point, None if key.startswith((*TRAINING, "system/")) else model)
        for line in lines
        for key, value in line.values.items()
        for point in [(key, value, line.milliseconds, line.step)]
        if not there & {(key, line.milliseconds, line.step), (key, None, line.step)}
    ]
    store.log_points(client, run.info.run_id, missing)
    return len(missing)
