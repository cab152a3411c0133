"""Signals that ask a training to stop."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType

from utils.cli import Stopped
from utils.distributed import Distributed


class StopRequest(AbstractContextManager):
    """Turns SIGINT, SIGTERM and SIGUSR1 into a wish that the loop fulfils after its step.

    A second signal ends the process at once, also while it waits for a server. SIGUSR1, which
    batch systems send before the time is up, counts as SIGTERM.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, leave: Callable[[int], object]) -> None:
        """Set what is still done after a second signal: `leave(exit code)`, which must be quick."""
        self._number, self._leave = 0, leave

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._take) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGUSR1 else number
        if self._number:
            try:
                self._leave(128 + number)
            finally:
                os._exit(128 + number)  # an exception would wait for all that is left to send
        self._number = number

    def obeyed(self, group: Distributed, save: Callable[[], None]) -> None:
        """If a signal came, to this process or another, save and leave.

        Raises:
            Stopped: it came.
        """
        number = group.all_reduce_max(self._number)
        if number:
            save()
            group.shutdown()
            raise Stopped(number)
