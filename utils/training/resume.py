"""Everything that a training must know to go on as if it had never stopped."""

import hashlib
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.cli import UserError, one_line
from utils.distributed import Distributed
from utils.files import read_json, read_tensors, typed
from utils.training.checkpoint import WEIGHTS
from utils.training.randomness import random_state, set_random_state

STATE, RECORDS = "training.safetensors", "training.json"
# Another value of these makes it another training ...
REFUSED = ("data_sha256", "seed", "batch_size", "val_fraction")
# ... and of these nothing that counts.
FREE = ("output_dir", "run_name", "experiment", "device", "num_workers", "resume", "path_to_data")
FREE += ("model_dir", "checkpoint_every", "on_nonfinite", "nonfinite_limit", "allow_outside_paths")
FREE += ("register",)


@dataclass
class Progress:
    """Where a training is: what a resumed one must know besides weights and optimiser.

    Attributes:
        step: optimiser steps done.
        epoch: epochs done.
        offset: batches of the current epoch done.
        best: the best validation figure so far (lower is better).
        bad_evaluations: evaluations since then.
        skipped: steps without an update, since their numbers were not finite.
        logged: bytes of metrics.jsonl.
        run_id: the MLflow run.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    best: float = math.inf
    bad_evaluations: int = 0
    skipped: int = 0
    logged: int = 0
    run_id: str = ""

    def improved(self, value: float) -> bool:
        """Take in an evaluation. Is it the best so far?"""
        better = value < self.best
        self.best = value if better else self.best  # which a value that is no number is not
        self.bad_evaluations = 0 if better else self.bad_evaluations + 1
        return better

    def exhausted(self, patience: int) -> bool:
        """Whether `patience` evaluations (0: any number) went by without a better one."""
        return 0 < patience <= self.bad_evaluations


def fingerprint(rows: Iterable[tuple], *arrays: np.ndarray) -> str:
    """The SHA-256 of a data set: its rows, and arrays that are in memory anyway."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


class State:
    """The parts of a training, as files and back.

    A part is a module, an optimizer, a tensor of counts, a dataclass of plain values, or whatever
    else has `state_dict` and `load_state_dict`. A checkpoint is taken between two steps, so that
    there is no accumulated gradient to keep; bfloat16 needs no scaler.
    """

    def __init__(
        self,
        group: Distributed,
        model: nn.Module,
        settings: dict[str, Any],
        *,
        progress: Progress,
        **parts: Any,
    ) -> None:
        """Name the parts.

        Args:
            group: the processes that train; counts are summed over them, random numbers are kept
                for each, and of all else the first one's is everybody's.
            model: in a file of its own, which makes a checkpoint a model folder as well.
            settings: what the training was started with, plain values; the same is expected of
                one that goes on.
            progress: a part that is always present.
            parts: the others by name; None is no part.
        """
        self.progress = progress
        self._group, self._model = group, model
        self._settings = settings | {
            "precision_of_matmul": torch.get_float32_matmul_precision(),
            "device": group.device.type,
            "processes": group.world_size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._parts["progress"] = progress

    def files(self) -> dict[str, dict[str, Any]]:
        """The files of a checkpoint beside its model folder's; all processes must call it."""
        tensors = {
            f"random.{rank}.{name}": value
            for name, values in self._random_states().items()
            for rank, value in enumerate(values)
        }
        records = {"settings": self._settings}
        for name, part in self._parts.items():
            if is_dataclass(part):
                records[name] = vars(part)
            elif isinstance(part, Tensor):
                tensors[name] = self._group.all_reduce_sum(part.clone())
            else:
                found = _optimizer_tensors(part) if _is_optimizer(part) else part.state_dict()
                tensors |= {f"{name}.{key}": value for key, value in found.items()}
        return {STATE: tensors, RECORDS: records}

    def restore(self, folder: Path | None) -> None:
        """Fill in what a checkpoint holds; nothing without one.

        Raises:
            UserError: the folder is no checkpoint of such a training.
        """
        if folder is None:
            return
        records = read_json(folder / RECORDS)
        changes = self._compare(records.get("settings", {}), folder)
        tensors = read_tensors(folder / STATE)
        try:
            self._model.load_state_dict(read_tensors(folder / WEIGHTS))
            for name, part in self._parts.items():
                self._restore_part(name, part, tensors, records)
            self._restore_random(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, UserError) as error:
            raise UserError(
                f"{folder} does not fit this training: {one_line(error)}; resume with the flags "
                f"it began with ({', '.join(changes) or 'which do not differ'})"
            ) from error

    def _restore_part(
        self, name: str, part: Any, tensors: dict[str, Tensor], records: dict[str, Any]
    ) -> None:
        prefix = f"{name}."
        mine = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
        if is_dataclass(part):
            vars(part).update(vars(typed(type(part), records[name])))
        elif isinstance(part, Tensor):
            part.copy_(tensors[name] if self._group.is_main else torch.zeros_like(part))
        elif _is_optimizer(part):
            _load_optimizer(part, mine)
        else:
            part.load_state_dict(mine)

    def _random_states(self) -> dict[str, list[Tensor]]:
        device = self._group.device
        return {name: self._group.all_gather(x) for name, x in random_state(device).items()}

    def _restore_random(self, tensors: dict[str, Tensor]) -> None:
        prefix = f"random.{self._group.rank}."
        state = {key.removeprefix(prefix): x for key, x in tensors.items() if prefix in key}
        if state:  # with more processes than before the new ones draw from their own seeds
            set_random_state(self._group.device, state)

    def _compare(self, before: dict[str, Any], folder: Path) -> list[str]:
        """What differs from the settings that the training began with: refused, or warned of."""
        now = json.loads(json.dumps(self._settings))
        changes = {
            name: f"{name} {_short(before.get(name))} -> {_short(now.get(name))}"
            for name in sorted(before.keys() | now.keys())
            if name not in FREE and before.get(name) != now.get(name)
        }
        if "data_sha256" in changes:
            digests = (str(one.get("data_sha256"))[:12] for one in (before, now))
            path = now.get("path_to_data", "the data")
            changes["data_sha256"] = f"the rows of {path} (SHA-256 {' -> '.join(digests)})"
        refused = [changes[name] for name in REFUSED if name in changes]
        if refused:
            raise UserError(
                f"{folder} is of another training: {', '.join(refused)}; resume with the data and "
                "the flags it began with"
            )
        if changes and self._group.is_main:
            print(
                "warning: resuming with changed settings; the result will differ from an "
                f"uninterrupted run: {', '.join(changes.values())}",
                file=sys.stderr,
            )
        return list(changes.values())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _is_optimizer(part: object) -> bool:
    return isinstance(part, torch.optim.Optimizer)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    # Files hold row-major tensors; a fused optimiser pairs numbers by their place in memory, so
    # that its state must lie in memory as its parameter does (channels-last, for one).
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in state.get(number, {}).items():
            if value.shape == parameter.shape:
                state[number][name] = torch.empty_like(parameter).copy_(value)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
