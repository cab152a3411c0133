"""The training loop in parts: schedule, batches, one guarded step, and the tail of every step."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from utils.cli import Stopped, UserError, first_few
from utils.data.sources import epoch_order
from utils.distributed import Distributed
from utils.training.checkpoint import Checkpointer
from utils.training.config import TrainingConfig, checkpoint_interval
from utils.training.optim import EMA
from utils.training.state import CheckpointState, Progress

T = TypeVar("T")
ROWS_SHOWN = 64  # of a batch with NaN or infinite numbers


class Schedule:
    """When things happen in a training: learning rate, logs, evaluations, checkpoints, the end.

    Attributes:
        steps_per_epoch: full batches in one pass over the rows.
        total_steps: optimiser steps of the whole training.
        evaluate_every: steps between evaluations.
        save_every, save_seconds: steps (0: none) or seconds (inf) between further checkpoints.
    """

    LOG_EVERY = 50  # steps

    def __init__(
        self, config: TrainingConfig, num_train: int, num_val: int, world_size: int = 1
    ) -> None:
        """Plan a training; a UserError for too few rows, or a batch that does not divide."""
        if num_train < config.batch_size:
            raise UserError(
                f"{num_train} training images are too few for one batch of {config.batch_size}; "
                f"use --batch_size {max(num_train, 1)} or less, or more images"
            )
        if num_val == 0:
            raise UserError(
                "no validation images; mark some rows as val in the split column, or raise "
                "--val_fraction"
            )
        if config.batch_size % (config.accumulate * world_size):
            raise UserError(
                f"--batch_size {config.batch_size} does not divide into {world_size} processes x "
                f"{config.accumulate} micro-batches (--accumulate)"
            )
        self.steps_per_epoch = num_train // config.batch_size
        self.total_steps = self.steps_per_epoch * config.max_epochs
        if config.max_steps:
            self.total_steps = config.max_steps
        self.evaluate_every = config.evaluate_every or self.steps_per_epoch
        self.save_every, self.save_seconds = checkpoint_interval(config.checkpoint_every)
        self._config = config

    def __str__(self) -> str:
        return (
            f"{self.total_steps:,} steps of {self._config.batch_size} images, evaluated every "
            f"{self.evaluate_every:,}"
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to 0 at the end (arXiv 1608.03983)."""
        peak = self._config.learning_rate
        warmup = min(self._config.warmup_steps, self.total_steps // 10)
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        progress = (step - warmup) / (self.total_steps - warmup)
        return peak * (1 + math.cos(math.pi * progress)) / 2

    def logs(self, step: int) -> bool:
        """Whether the averages since the last log are due after this step."""
        return step % self.LOG_EVERY == 0 or self.evaluates(step)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after this step."""
        return step % self.evaluate_every == 0 or step == self.total_steps


class Averages:
    """Means of named numbers since the last log; the sums stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}  # not every step has every number
        self._steps = 0
        self.restart()

    def restart(self) -> None:
        """Measure time from now on, without what came between two steps."""
        self._since = time.perf_counter()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add the values of one step."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means and `steps_per_second`; then start over."""
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
        """Continue from `state_dict`; a KeyError if it is of something else."""
        self._steps = int(state["steps"])
        self._since = time.perf_counter() - float(state["seconds"])
        names = [key.removeprefix("sum.") for key in state if key.startswith("sum.")]
        self._sums = {name: state[f"sum.{name}"] for name in names}
        self._counts = {name: int(state[f"count.{name}"]) for name in names}


@dataclass
class TrainState:
    """All that the steps of a training read and change; `checkpoint` saves and restores it.

    `ema.model` is what is evaluated and kept. The gradient norm of an optimiser is logged under
    its name, with gradient_norm for optimizer. `settings` and `parts`: see `CheckpointState`.
    `changed_by_forward` are modules that a forward pass changes already, such as a codebook of
    moving averages; they are restored when a batch is skipped.
    """

    config: TrainingConfig
    schedule: Schedule
    group: Distributed
    model: nn.Module
    optimizers: dict[str, Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    changed_by_forward: Sequence[nn.Module] = ()
    progress: Progress = field(default_factory=Progress)
    averages: Averages = field(default_factory=Averages)

    def __post_init__(self) -> None:
        self.saved_at = time.monotonic()  # when the last checkpoint was written
        self.ema: EMA[Any] = EMA(self.model, self.config.ema_decay)
        self.settings = asdict(self.config) | self.settings
        parts = {"averages": self.averages, **self.optimizers, **self.parts}
        if self.config.ema_decay:
            parts["average"] = self.ema
        self.checkpoint = CheckpointState(
            self.group, self.model, self.settings, progress=self.progress, **parts
        )
        self.snapshot: list[dict[str, Tensor]] = []  # of `changed_by_forward`, before this batch


def batches(
    state: TrainState,
    checkpoints: Checkpointer,
    rows: Tensor,
    load: Callable[[list[Tensor], int], Iterator[T]],
) -> Iterator[tuple[Tensor, T]]:
    """Row numbers in all processes, and data of this one, of every batch up to the end.

    The order of an epoch is a function of seed and epoch, so a resumed training continues with
    the rows that come next. Rows that fill no batch are left out of this epoch. If the data cannot
    be read, a training in one process is saved before it ends. `load` turns the row numbers of
    this process for each batch, and the epoch, into the batches.
    """
    config, progress, schedule, group = state.config, state.progress, state.schedule, state.group

    def saved_on_error(loaded: Iterator[T]) -> Iterator[T]:
        try:
            yield from loaded
        except UserError:
            if group.world_size == 1:  # others would wait for the processes that go on
                checkpoints.save()
            raise

    with tqdm(
        total=schedule.total_steps,
        initial=progress.step,
        unit=" steps",
        disable=None if group.is_main else True,  # None: unless on a terminal
        leave=False,
    ) as bar:
        while progress.step < schedule.total_steps:
            order = epoch_order(rows, config.seed, progress.epoch)
            epoch = order.split(config.batch_size)[progress.offset : schedule.steps_per_epoch]
            loaded = saved_on_error(load([group.shard(x) for x in epoch], progress.epoch))
            for batch_rows, batch in zip(epoch, loaded, strict=True):
                progress.offset += 1
                if config.on_nonfinite == "skip":
                    states = [module.state_dict() for module in state.changed_by_forward]
                    state.snapshot = [{k: x.clone() for k, x in one.items()} for one in states]
                yield batch_rows, batch
                bar.update()
                if progress.step >= schedule.total_steps:
                    return
            progress.epoch, progress.offset = progress.epoch + 1, 0


def optimizer_step(
    state: TrainState,
    rows: Tensor,
    values: Mapping[str, Tensor],
    row_name: Callable[[int], str] = str,
) -> bool:
    """Clip the gradients and take a step, unless a number is NaN or infinite in any process.

    The losses in `values`, gradient norms and learning rate go into the averages; a message names
    `rows`, the row numbers in all processes, by `row_name`. Returns False if the batch was
    skipped (--on_nonfinite skip). A UserError if no (further) batch may be skipped.
    """
    group, progress = state.group, state.progress
    learning_rate = state.schedule.learning_rate(progress.step)
    values = dict(values)
    for name, optimizer in state.optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, state.config.max_grad_norm)
        values[name.replace("optimizer", "gradient_norm")] = norm
    progress.step += 1
    numbers = torch.stack([x.to(group.device, torch.float32) for x in values.values()])
    if group.all_reduce_max(int(not numbers.isfinite().all())):
        everywhere = torch.stack(group.all_gather(numbers)).T.tolist()
        odd = [
            f"{name} {next(x for x in of_all if not math.isfinite(x))}"
            for name, of_all in zip(values, everywhere, strict=True)
            if not all(map(math.isfinite, of_all))
        ]
        names = first_few([row_name(row) for row in rows.tolist()], limit=ROWS_SHOWN)
        where = f"at learning rate {learning_rate:.2g}, in {names}"
        _skip_batch(state, f"step {progress.step}: {', '.join(odd)} {where}")
        return False
    for optimizer in state.optimizers.values():
        for param_group in optimizer.param_groups:
            if param_group.get("scheduled", True):
                param_group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if state.config.ema_decay:
        state.ema.update(state.model, progress.step)
    state.averages.add({**values, "learning_rate": learning_rate})
    return True


def _skip_batch(state: TrainState, problem: str) -> None:
    """Undo what a batch has changed, or end the training."""
    config, progress, group = state.config, state.progress, state.group
    if config.on_nonfinite != "skip":
        group.fail(
            f"{problem}; lower --learning_rate, use --precision fp32 or --on_nonfinite skip, then "
            "--resume"
        )
    progress.skipped += 1
    limit = config.nonfinite_limit
    if progress.skipped > limit:
        group.fail(
            f"{problem}; {limit} batches were skipped before (--nonfinite_limit): lower "
            "--learning_rate or use --precision fp32, then --resume"
        )
    group.print(f"warning: {problem}; skipped, {progress.skipped} of {limit}")
    for optimizer in state.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    for module, before in zip(state.changed_by_forward, state.snapshot, strict=True):
        module.load_state_dict(before)


class StopSignals(AbstractContextManager):
    """Records SIGINT, SIGTERM, SIGUSR1 and SIGHUP, so that the loop can end after its step.

    A second signal ends the process at once, even while it waits for a server. SIGUSR1, which
    batch systems send before the time is up, and SIGHUP of a closed terminal count as SIGTERM.
    Under nohup, which ignores SIGHUP, the training continues.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, end_at_once: Callable[[int], object]) -> None:
        """`end_at_once(exit code)` is called after a second signal; it must be quick."""
        self.number, self._end_at_once = 0, end_at_once

    def __enter__(self) -> "StopSignals":
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._before = {
            number: signal.signal(number, self._receive)
            for number in self.SIGNALS
            if not (nohup and number == signal.SIGHUP)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        number = number if number == signal.SIGINT else signal.SIGTERM
        if self.number:
            try:
                self._end_at_once(128 + number)
            finally:
                os._exit(128 + number)  # an exception would wait for all that is left to send
        self.number = number

    def stop_if_requested(self, group: Distributed, checkpoints: Checkpointer) -> None:
        """If this process or another received a signal, save and raise `Stopped`."""
        number = group.all_reduce_max(self.number)
        if number:
            checkpoints.save()
            group.shutdown()
            raise Stopped(number)


def keep_best(
    state: TrainState, checkpoints: Checkpointer, score: float, *, always: bool = False
) -> None:
    """Record a validation score (lower is better); save the model if it is the best so far.

    With `always` the latest model counts as the best.
    """
    improved = state.progress.improved(score)
    if always:
        state.progress.evaluations_without_improvement = 0
    if improved or always:
        checkpoints.save_best(state.ema.model)


def end_step(
    state: TrainState, checkpoints: Checkpointer, stop: StopSignals, *, evaluated: bool
) -> bool:
    """The tail of a step: save if it is time, and raise `Stopped` if a signal came.

    Returns whether to end the training early (--patience).
    """
    group, config, progress, schedule = state.group, state.config, state.progress, state.schedule
    due = bool(schedule.save_every) and progress.step % schedule.save_every == 0
    if schedule.save_seconds < math.inf:
        late = time.monotonic() - state.saved_at >= schedule.save_seconds
        due = bool(group.all_reduce_max(int(late)))
    if evaluated or due:
        checkpoints.save()
        state.saved_at = time.monotonic()
    if evaluated:
        state.averages.restart()
    stop.stop_if_requested(group, checkpoints)
    if 0 < config.patience <= progress.evaluations_without_improvement:
        metric, patience = config.best_metric, config.patience
        group.print(f"no better {metric} in {patience} evaluations: stopping")
        return True
    return False
