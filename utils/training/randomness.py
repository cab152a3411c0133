"""The states of all random number generators that a training may draw from."""

import random

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of Python, NumPy, torch and `device`, as tensors of numbers."""
    _, numbers, spare = random.getstate()
    _, keys, *position, cached = np.random.get_state()
    state = {
        "python": torch.tensor(numbers),
        "numpy": torch.tensor([*map(int, keys), *position]),
        "spare": torch.tensor([spare is not None, spare or 0.0, cached], dtype=torch.double),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Go on drawing where `random_state` was taken.

    Raises:
        KeyError, ValueError, RuntimeError, TypeError: it is no such state.
    """
    has_spare, spare, cached = state["spare"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), spare if has_spare else None))
    *keys, position, has_cached = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_cached, cached))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])
