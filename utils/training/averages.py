"""Means of what each training step measures, between two lines of the log."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor


class Averages:
    """Means of named numbers since the last look; they stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}  # not every step has every number
        self._steps = 0
        self.restart()

    def restart(self) -> None:
        """Count time from now on; what happened since the last step was no training."""
        self._since = time.perf_counter()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Take in the values of one step."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means and `steps_per_second`, after which everything starts anew."""
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        means["steps_per_second"] = self._steps / (time.perf_counter() - self._since)
        self._sums, self._counts, self._steps = {}, {}, 0
        self.restart()
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed training needs to log the same means."""
        state = {"steps": torch.tensor(self._steps)}
        state["seconds"] = torch.tensor(time.perf_counter() - self._since, dtype=torch.double)
        for name, value in self._sums.items():
            exact = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.double)
            state |= {f"sum.{name}": exact, f"count.{name}": torch.tensor(self._counts[name])}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            KeyError: it was taken of something else.
        """
        self._steps = int(state["steps"])
        self._since = time.perf_counter() - float(state["seconds"])
        names = [key.removeprefix("sum.") for key in state if key.startswith("sum.")]
        self._sums = {name: state[f"sum.{name}"] for name in names}
        self._counts = {name: int(state[f"count.{name}"]) for name in names}
