"""Calls to a server that may be slow or dead, made by a thread of their own."""

import queue
import threading
from collections.abc import Callable

RETRY_SECONDS = 10  # between attempts after the server was lost


class Outbox:
    """Makes calls in order and in the background; what fails is tried again until it is closed.

    Attributes:
        troubled: whether a call failed, so that a later one may have been made in part.
    """

    def __init__(
        self, *, complain: Callable[[Exception], object], is_final: Callable[[Exception], bool]
    ) -> None:
        """Start the thread.

        Args:
            complain: told of the first failure, and of no other.
            is_final: whether trying again is pointless.
        """
        self._complain, self._is_final = complain, is_final
        self.troubled = False
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], object]) -> None:
        """Have a call made, soon."""
        self._calls.put(call)

    def close(self) -> None:
        """Wait until all calls are made; from now on one that fails ends it.

        Each call must have a time limit of its own.
        """
        self._calls.put(None)
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            while not self._attempt(call):
                if self._closing.is_set():
                    return
                self._closing.wait(RETRY_SECONDS)

    def _attempt(self, call: Callable[[], object]) -> bool:
        """Whether the call is done with: made, or refused for good."""
        try:
            call()
        except Exception as error:  # whatever the server, its database or the network come up with
            if not self.troubled:
                self.troubled = True
                self._complain(error)
            return self._is_final(error)
        return True
