"""What a checkpoint holds beside the model folder: every part of a training, as files and back."""

import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.cli import UserError, one_line
from utils.data.sources import note
from utils.distributed import Distributed, shard_like
from utils.files import Files, read_json, read_tensors, typed
from utils.provenance import WEIGHTS

TENSORS, RECORDS = "training.safetensors", "training.json"
SHARDS = "training-*.safetensors"  # rows of tensors that are sharded, of each process
# Settings of which another value makes another training ...
REFUSED = ("data_sha256", "seed", "batch_size", "val_fraction")
# ... those that let a training go on which --patience ended ...
LONGER = {"max_steps", "max_epochs", "patience"}
# ... and those that leave the result as it is.
FREE = (
    *("output_dir", "run_name", "experiment", "device", "num_workers", "resume", "path_to_data"),
    *("model_dir", "checkpoint_every", "on_nonfinite", "nonfinite_limit", "allow_outside_paths"),
    *("register", "max_minutes", "dry_run", "checkpoint_activations"),
)
FORWARD_SECONDS = 5  # in which torchrun passes on a signal


class StopSignals(AbstractContextManager):
    """Records SIGINT, SIGTERM, SIGUSR1 and SIGHUP, so that the loop can end after its step.

    A second signal calls `end_at_once(exit code)` and ends the process, even while it waits for a
    server. SIGUSR1, which batch systems send before the time is up, and SIGHUP of a closed
    terminal count as SIGTERM. Under nohup, which ignores SIGHUP, the training continues. torchrun
    passes on each signal, which a terminal or Slurm also sends to this process: one signal, twice.
    """

    def __init__(self, end_at_once: Callable[[int], object]) -> None:
        self.number, self._time, self._end_at_once = 0, 0.0, end_at_once
        self._patience = FORWARD_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        number = number if number == signal.SIGINT else signal.SIGTERM
        if self.number and time.monotonic() < self._time + self._patience:
            return
        if self.number:
            try:
                self._end_at_once(128 + number)
            finally:
                os._exit(128 + number)  # an exception would wait for all that is left to send
        self.number, self._time = number, time.monotonic()


@dataclass
class Progress:
    """Where a training stands."""

    step: int = 0  # done
    epoch: int = 0  # done
    offset: int = 0  # batches of the current epoch done
    best: float = math.inf  # the best validation score so far (lower is better)
    best_halfway: float = math.inf  # in the first half
    evaluations_without_improvement: int = 0  # since then
    skipped: int = 0  # batches without an update, because a number was NaN or infinite
    loss_scale: float = 2.0**16  # of fp16: a power of two
    steps_without_overflow: int = 0  # since it last halved
    run_id: str = ""  # the MLflow run


class CheckpointState:
    """The parts of a training: modules, optimisers, tensors of counts, or what has a `state_dict`.

    Tensors are summed over the processes, random states are kept for each process; of all other
    parts those of the main process are saved. Checkpoints are taken between two steps, so there
    are no accumulated gradients to keep.
    """

    def __init__(
        self,
        group: Distributed,
        model: nn.Module,
        settings: dict[str, Any],
        progress: Progress,
        **parts: Any,
    ) -> None:
        """`settings`: plain values that a resumed training must share; parts by name, or None."""
        self.model, self.progress, self.group = model, progress, group
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._settings = settings | {
            "precision_of_matmul": torch.get_float32_matmul_precision(),
            "device": group.device.type,
            "processes": group.world_size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def files(self) -> Files:
        """The files of a checkpoint beside its model folder's; all processes call this."""
        device, states = self.group.device, {"torch": torch.get_rng_state()}
        if device.type != "cpu":
            states["device"] = torch.get_device_module(device).get_rng_state()
        tensors: dict[str, Tensor] = {}
        for name, state in states.items():
            for rank, one in enumerate(self.group.all_gather(state)):
                tensors[f"random.{rank}.{name}"] = one
        for name, part in self._parts.items():
            if isinstance(part, Tensor):
                tensors[name] = self.group.all_reduce_sum(part.clone())
                continue
            own = part.state_dict()
            if isinstance(part, Optimizer):
                moments = own["state"].items()
                own = {f"{n}.{key}": value for n, one in moments for key, value in one.items()}
            tensors |= {f"{name}.{key}": value for key, value in own.items()}
        records = {"settings": self._settings, "progress": vars(self.progress)}
        return {TENSORS: tensors, RECORDS: records}

    def restore(self, folder: Path | None) -> None:
        """Load all parts from a checkpoint, if there is one. A UserError if it does not fit."""
        if folder is None:
            return
        records, tensors = read_json(folder / RECORDS), read_tensors(folder / TENSORS)
        shards = [read_tensors(path) for path in sorted(folder.glob(SHARDS))]
        tensors |= {name: torch.cat([x[name] for x in shards]) for name in (*shards, {})[0]}
        changes = self._compare_settings(records.get("settings", {}), folder)
        try:
            vars(self.progress).update(vars(typed(Progress, records["progress"])))
            if changes.keys() & LONGER:
                self.progress.evaluations_without_improvement = 0
            _load(self.model, read_tensors(folder / WEIGHTS))
            for name, part in self._parts.items():
                if isinstance(part, Tensor):  # the main process takes the counts of all
                    part.copy_(tensors[name] if self.group.is_main else torch.zeros_like(part))
                elif isinstance(part, Optimizer):
                    _load_optimizer(part, _with_prefix(f"{name}.", tensors))
                else:
                    _load(part, _with_prefix(f"{name}.", tensors))
            random = _with_prefix(f"random.{self.group.rank}.", tensors)
            if random:  # more processes than before: the new ones use seeds of their own
                torch.set_rng_state(random["torch"])
            if "device" in random and self.group.device.type != "cpu":
                torch.get_device_module(self.group.device).set_rng_state(random["device"])
        except (KeyError, TypeError, ValueError, RuntimeError, UserError) as error:
            raise UserError(
                f"{folder} does not fit this training: {one_line(error)}; resume with the flags "
                f"it began with ({', '.join(changes.values()) or 'which do not differ'})"
            ) from error

    def _compare_settings(self, before: dict[str, Any], folder: Path) -> dict[str, str]:
        """Which settings differ from the checkpoint's: warn, or a UserError for `REFUSED` ones."""
        now = json.loads(json.dumps(self._settings))
        changes = {
            name: f"{name} {before.get(name)!r:.40} -> {now.get(name)!r:.40}"
            for name in sorted(before.keys() | now.keys())
            if name not in FREE and before.get(name) != now.get(name)
        }
        if "data_sha256" in changes:
            digests = (str(one.get("data_sha256"))[:12] for one in (before, now))
            path = now.get("path_to_data", "the data")
            changes["data_sha256"] = f"the rows of {path} (SHA-256 {' -> '.join(digests)})"
        if refused := [changes[name] for name in REFUSED if name in changes]:
            raise UserError(
                f"{folder} is of another training: {', '.join(refused)}; resume with the data and "
                "flags it began with (--accumulate N saves memory at the same --batch_size), or "
                "begin a new training from its weights by --init_from"
            )
        if changes and self.group.rank == 0:
            print(
                "warning: resuming with changed settings; the result will differ from an "
                f"uninterrupted run: {', '.join(changes.values())}",
                file=sys.stderr,
            )
        return changes


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}


def _load(part: Any, tensors: dict[str, Tensor]) -> None:
    """`part.load_state_dict` of whole tensors, where those of the part may be sharded."""
    own = part.state_dict()
    sharded = {name for name in own.keys() & tensors.keys() if hasattr(own[name], "full_tensor")}
    part.load_state_dict(tensors | {name: shard_like(tensors[name], own[name]) for name in sharded})


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        parameter = parameters[int(number)]
        # Files hold row-major tensors, but a fused optimiser pairs numbers by their position in
        # memory: its state must have the memory format of its parameter (such as channels-last).
        if value.shape == parameter.shape:
            if hasattr(parameter, "full_tensor"):
                value = shard_like(value, parameter)
            else:
                value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class RowDigests:
    """The rows that a training began with: on resume some may be missing, but none may be new.

    Of images that cannot be read, so that they can be left out of a training that has begun.
    """

    def __init__(self, rows: Iterable[tuple]) -> None:
        digests = (hashlib.sha256(json.dumps(row).encode()).digest()[:8] for row in rows)
        self.digests = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)

    def state_dict(self) -> dict[str, Tensor]:
        return {"digests": self.digests}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        before, now = state["digests"], self.digests
        if not torch.equal(before[torch.isin(before, now)], now):
            raise ValueError("rows of the data are new, or in another order")
        if missing := len(before) - len(now):
            note(f"warning: {missing:,} of the {len(before):,} rows of the data are missing now")


def fingerprint(rows: Iterable[tuple], *arrays: np.ndarray) -> str:
    """The SHA-256 of a data set: its rows, and arrays that are in memory anyway."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
