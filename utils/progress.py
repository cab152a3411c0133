"""Warnings and progress: a bar on a terminal, else a line at least once a minute; profiles."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from tqdm import tqdm

SECONDS = 50  # between two lines


def warn(text: str) -> None:
    """Print what the user should know or check, to stderr."""
    print(f"warning: {text}", file=sys.stderr)


class ProgressBar(tqdm):
    """tqdm; where stderr is not a terminal, lines as `1,200 of 5,000 steps, 12.3/s, 05:17 left`."""

    monitor_interval = 0  # no thread that corrects guesses of the rate: `miniters` of 1 makes none

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._on_terminal, self._last = sys.stderr.isatty(), 0.0
        if not self._on_terminal:
            options["mininterval"] = SECONDS
        super().__init__(*arguments, miniters=1, **options)
        self.leave: bool = self._on_terminal and self.leave

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Draw the bar, or write a line if it is time for one."""
        if self._on_terminal:
            return super().display(msg, pos)
        now, done = self._time(), self.n - self.initial
        if msg is None and done and now - max(self._last, self.start_t) >= SECONDS:
            self._last, rate = now, done / (now - self.start_t)
            line = f"{self.n:,}{self.unit}, {rate:.3g}/s"
            if self.total:
                left = self.format_interval((self.total - self.n) / rate)
                line = f"{self.n:,} of {self.total:,}{self.unit}, {rate:.3g}/s, {left} left"
            print(f"{self.desc}: {line}" if self.desc else line, file=sys.stderr, flush=True)
        return False

    def clear(self, *arguments: Any, **options: Any) -> None:
        """Remove the bar; lines stay."""
        if self._on_terminal:
            super().clear(*arguments, **options)


@contextmanager
def silent_unless_main() -> Iterator[None]:
    """In all processes of torchrun but the first, nothing is printed."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def profiled(trace: str) -> Iterator[None]:
    """Profile what is done, if `trace` names a file: a trace there, and a table of operations."""
    if not trace:
        yield
        return
    from torch.profiler import profile

    def report(profiler: profile) -> None:
        profiler.export_chrome_trace(trace)
        events = profiler.key_averages()
        on_device = any(event.self_device_time_total for event in events)
        longest = f"self_{'device' if on_device else 'cpu'}_time_total"
        print(events.table(sort_by=longest, row_limit=10, max_name_column_width=40))
        print(f"trace for chrome://tracing or ui.perfetto.dev: {trace}")

    with profile(on_trace_ready=report):  # also where a signal ends a training
        yield
