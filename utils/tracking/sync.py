"""From the output folder to MLflow: a log on disk, and a thread that sends it.

metrics.jsonl holds metrics, a JSON object per line: `step`, `time` (seconds since 1970), `run_id`,
and values by name. mlflow.jsonl, the event log, holds everything else, and which of it was sent.
"""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from utils.cli import UserError
from utils.files import typed
from utils.progress import warn
from utils.provenance import Stage

METRICS, EVENTS = "metrics.jsonl", "mlflow.jsonl"
TABLES = "tables"  # a folder of the output folder and of the artifacts
RETRY_SECONDS = 10  # after a failure
GIVE_UP_SECONDS = 10  # of failures alone, once a sender is closed
MAX_LINES = 100  # of metrics that are sent at once
FIELDS = {  # kind of an event: the fields that it must have
    "metric": (),
    "picture": ("path", "name"),  # name: its key
    "table": ("name",),
    "folder": ("path", "name"),  # name: the artifact folder
    "file": ("path",),
    "lineage": ("name", "lineage"),  # name: the run that is linked with the others
    "model": ("path", "values"),  # name: of the registered model, if any
    "status": ("name",),  # RUNNING when a training opened the run, then how it ended
    "sent": ("name",),  # MLflow has the event of this time, whose kind is the name
}


@dataclass(frozen=True)
class Event:
    """A line of mlflow.jsonl, or of metrics.jsonl; see `FIELDS`."""

    time: float  # seconds since 1970
    run_id: str
    kind: str = "metric"
    name: str = ""
    path: str = ""  # relative to the folder of the log
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    lower_is_better: bool = True  # for the first of `values`
    lineage: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        if missing := [name for name in FIELDS[self.kind] if not getattr(self, name)]:
            raise ValueError(f"a {self.kind} without {missing[0]}")

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


def end_line(path: Path) -> None:
    """End the last line of a log, which a crash may have cut off."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with path.open("a") as file:
            file.write("\n")


def read_metrics(folder: Path) -> list[Event]:
    """All lines of metrics.jsonl but damaged ones; none before anything was logged."""
    return _read(folder / METRICS)


def read_events(folder: Path) -> list[Event]:
    """The events of all logs in a folder, in the order of time."""
    events = [event for path in sorted(folder.glob(f"*{EVENTS}")) for event in _read(path)]
    return sorted(events, key=lambda event: event.time)


def _read(path: Path) -> list[Event]:
    """The events of a log; damaged lines, as a crash leaves, are counted and skipped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for line in lines:
        with suppress(ValueError, LookupError, TypeError, AttributeError, UserError):
            fields = json.loads(line)
            if path.name == METRICS:
                known = {x: fields.pop(x) for x in ("step", "time", "run_id") if x in fields}
                fields = known | {"values": fields}
            found.append(typed(Event, fields))
    if damaged := len(lines) - len(found):
        warn(f"{path}: {damaged} damaged lines are skipped")
    return found


def write_table(folder: Path, name: str, columns: dict[str, list[Any]]) -> None:
    """Write `name`.csv, the same as MLflow's JSON, and the images among its values to `name`/."""
    import pandas

    (folder / name).mkdir(parents=True, exist_ok=True)
    rows, entries = dict(columns), dict(columns)
    for key, values in columns.items():
        if isinstance(values[0], Image.Image):
            rows[key] = [f"{name}/{key}-{number:05}.png" for number in range(len(values))]
            for path, image in zip(rows[key], values, strict=True):
                image.save(folder / path)
            # MLflow's type; its lists show the second path, which may be a thumbnail.
            paths = [f"{TABLES}/{path}" for path in rows[key]]  # among the artifacts
            kinds = ("filepath", "compressed_filepath")
            entries[key] = [{"type": "image", **dict.fromkeys(kinds, path)} for path in paths]
    pandas.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    pandas.DataFrame(entries).to_json(folder / f"{name}.json", orient="split", index=False)


def unsent(events: list[Event], run_id: str) -> list[Event]:
    """The events of a run that MLflow has not got; of its statuses only the last counts."""
    done = {(event.time, event.name) for event in events if event.kind == "sent"}
    own = [event for event in events if event.run_id == run_id and event.kind != "sent"]
    ended = [event for event in own if event.kind == "status"][-1:]
    own = [event for event in own if event.kind != "status"]
    own += [event for event in ended if event.name != "RUNNING"]
    return [event for event in own if (event.time, event.kind) not in done]


def sent(event: Event) -> Event:
    """What the event log notes once MLflow has an event."""
    return Event(event.time, event.run_id, "sent", event.kind)


def size_of(home: Path, event: Event) -> int:
    """Bytes of the files that an event sends."""
    path = home / (event.path or "nothing")
    return sum(one.stat().st_size for one in (path, *path.rglob("*")) if one.is_file())


def in_words(kinds: Counter[str]) -> str:
    """`1 model, 2 pictures`."""
    return ", ".join(f"{n:,} {kind}{'s' * (n > 1)}" for kind, n in kinds.items() if n)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow refuses a call for good, as after the run was deleted."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    status = getattr(getattr(error, "response", None), "status_code", status)  # of an upload
    return 400 <= status < 500 and status not in (401, 408, 429)  # those mean: try again


class Sender(threading.Thread):
    """Sends events in the background. What fails is sent again after the others.

    Metrics that wait are sent together. If some of them are refused, the others still arrive.
    """

    def __init__(
        self, send: Callable[[list[Event]], object], on_error: Callable[[Exception], object]
    ) -> None:
        """Start; `send` gets metrics, or one other event, and `on_error` each of its failures."""
        super().__init__(daemon=True)
        self._send, self._on_error = send, on_error
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._is_closing, self._is_stopped, self._success = False, False, time.monotonic()
        self.refused: Counter[str] = Counter()  # the kinds of events that MLflow refused for good
        self.start()

    def put(self, *events: Event) -> None:
        with self._changed:
            self._events.extend(events)
            self._changed.notify()

    def left(self) -> list[Event]:
        """The events that are not sent."""
        with self._changed:
            return list(self._events)

    def close(self) -> None:
        """End once all events are sent, or none of those that are left succeeds."""
        with self._changed:
            self._is_closing, self._success = True, time.monotonic()
            self._changed.notify()

    def wait(self, patience: float) -> bool:
        """Wait while an event is sent at least this often, in seconds; whether all are."""
        while self.is_alive() and time.monotonic() < self._success + patience:
            self.join(0.05)
        return not self.left()

    def stop(self) -> None:
        """Send nothing after the current event."""
        self._is_stopped = True
        self.join(0.5)

    def run(self) -> None:
        failures, size = 0, MAX_LINES  # events that failed in a row
        while not self._is_stopped:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._is_closing)
                late = time.monotonic() > self._success + GIVE_UP_SECONDS
                failed = failures > len(self._events) or (failures and late)
                if not self._events or (self._is_closing and failed):
                    return
                # They count as left while they are sent.
                batch = list(takewhile(lambda x: x.kind == "metric", islice(self._events, size)))
                batch = batch or [self._events[0]]
            try:
                self._send(batch)
            except Exception as error:  # of the server, its stores, the network or the disk
                self._on_error(error)
                if not is_refusal(error):
                    failures += len(batch)
                    with self._changed:
                        self._events.rotate(-len(batch))
                        self._changed.wait_for(lambda: self._is_closing, RETRY_SECONDS)
                    continue
                if len(batch) > 1:  # find out which of them
                    size = len(batch) // 2
                    continue
                self.refused[batch[0].kind] += 1
            failures, size, self._success = 0, min(2 * size, MAX_LINES), time.monotonic()
            with self._changed:
                for _ in batch:
                    self._events.popleft()
