"""The training loop in parts: schedule, batches, one guarded step, and the tail of every step."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from utils.cli import Stopped, UserError, first_few
from utils.data.sources import epoch_order
from utils.distributed import Distributed, full_tensor
from utils.progress import ProgressBar
from utils.training.checkpoint import Checkpointer
from utils.training.config import EPOCHS, MIN_STEPS, TrainingConfig
from utils.training.optim import EMA
from utils.training.state import CheckpointState, Progress, StopSignals

T = TypeVar("T")
FAST = 0.1  # relative improvement in the second half of a training that was too short
ROWS_SHOWN = 64  # of a batch with NaN or infinite numbers
GROWTH_STEPS = 2000  # without an overflow, until the loss scale doubles


class Schedule:
    """When things happen in a training: learning rate, logs, evaluations, checkpoints, the end."""

    LOG_EVERY = 50  # steps

    def __init__(
        self, config: TrainingConfig, num_train: int, num_val: int, world_size: int = 1
    ) -> None:
        """Plan a training; a UserError for too few rows, or a batch that does not divide."""
        size = config.batch_size
        if num_train < size:
            raise UserError(
                f"{num_train} training images are too few for one batch of {size}; use "
                f"--batch_size {max(num_train, 1)} or less, or more images"
            )
        if num_val == 0:
            raise UserError(
                "no validation images; mark some rows as val in the split column, or raise "
                "--val_fraction"
            )
        if size % (config.accumulate * world_size):
            raise UserError(
                f"--batch_size {size} does not divide into {world_size} processes x "
                f"{config.accumulate} micro-batches (--accumulate)"
            )
        self.steps_per_epoch = num_train // size  # full batches in one pass over the rows
        self.total_steps = config.max_steps or self.steps_per_epoch * config.max_epochs
        self.evaluate_every = config.evaluate_every or self.steps_per_epoch
        if not self.total_steps:
            self.total_steps = max(self.steps_per_epoch * EPOCHS, MIN_STEPS)
            self.evaluate_every = config.evaluate_every or self.total_steps // EPOCHS
        self._config = config

    def __str__(self) -> str:
        steps = f"{self.total_steps:,} steps of {self._config.batch_size} images"
        return f"{steps}, evaluated every {self.evaluate_every:,}"

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
        return step % self.LOG_EVERY == 0

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after this step."""
        return step % self.evaluate_every == 0 or step == self.total_steps


class Averages:
    """Means of named numbers since the last log; the sums stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,): sum, and the number of steps that have it
        self.restart()

    def restart(self) -> None:
        """Measure time from now on, without what came between two steps."""
        self._since = time.perf_counter()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add the values of one step."""
        for name, value in {**values, "steps": 1.0}.items():
            if not isinstance(value, Tensor):
                value = torch.tensor(value, dtype=torch.double)
            pair = torch.stack([value, torch.ones_like(value)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self) -> dict[str, float]:
        """The means and `steps_per_second`; then start over."""
        steps = float(self._sums.pop("steps", torch.zeros(1))[0])
        pairs = {name: pair.tolist() for name, pair in self._sums.items()}
        means = {name: total / count for name, (total, count) in pairs.items()}
        means["steps_per_second"] = steps / (time.perf_counter() - self._since)
        self._sums = {}
        self.restart()
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed training needs to log the same means."""
        seconds = torch.tensor(time.perf_counter() - self._since, dtype=torch.double)
        return {**self._sums, "seconds": seconds}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`; a KeyError if it is of something else."""
        self._sums = dict(state)
        self._since = time.perf_counter() - float(self._sums.pop("seconds"))


@dataclass
class TrainState:
    """All that the steps of a training read and change; `checkpoint` saves and restores it.

    `ema.model` is what is evaluated and kept. The gradient norm of an optimiser is logged under
    its name, with gradient_norm for optimizer. `settings` and `parts`: see `CheckpointState`.
    `sign` is -1 where the best model is that with the highest metric, else 1.
    `starts` are the first rows of the shards of the data, for --shuffle.
    `changed_by_forward` are modules that a forward pass changes already, such as a codebook of
    moving averages; they are restored when a batch is skipped.
    """

    config: TrainingConfig
    schedule: Schedule
    group: Distributed
    model: nn.Module
    optimizers: dict[str, Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    sign: int = 1
    parts: dict[str, Any] = field(default_factory=dict)
    starts: Sequence[int] = ()
    changed_by_forward: Sequence[nn.Module] = ()
    progress: Progress = field(default_factory=Progress)
    averages: Averages = field(default_factory=Averages)

    def __post_init__(self) -> None:
        self.started_at = self.saved_at = time.monotonic()  # of the last checkpoint
        self.time_is_up = False  # --max_minutes
        if self.config.checkpoint_activations:
            checkpoint_activations(self.model)
        self.ema = EMA(self.model, self.config.ema_decay)
        self.settings = asdict(self.config) | self.settings
        if self.settings["shuffle"] == "auto":
            self.settings["shuffle"] = "shards" if len(self.starts) > 1 else "rows"
        parts = {"averages": self.averages, **self.optimizers, **self.parts}
        parts["average"] = self.ema.model if self.config.ema_decay else None
        self.checkpoint = CheckpointState(
            self.group, self.model, self.settings, progress=self.progress, **parts
        )
        self.snapshot: list[dict[str, Tensor]] = []  # of `changed_by_forward`, before this batch

    @property
    def loss_scale(self) -> float:
        """The factor of losses against gradients that vanish in fp16 (arXiv 1710.03740); else 1."""
        return self.progress.loss_scale if self.settings["precision"] == "fp16" else 1.0


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the inputs of modules that are `checkpointed` (arXiv 1604.06174)."""
    for module in model.modules():
        if getattr(module, "checkpointed", False):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def batches(
    state: TrainState,
    checkpoints: Checkpointer,
    rows: Tensor,
    load: Callable[[list[Tensor], int], Iterator[T]],
) -> Iterator[tuple[Tensor, T]]:
    """Row numbers in all processes, and data of this one, of every batch up to the end.

    The order of an epoch is a function of seed and epoch, so a resumed training continues with
    the rows that come next; after an early stop there are none. Rows that fill no batch are left
    out of this epoch. If the data cannot be read, a training in one process is saved before it
    ends. `load` makes the batches from row numbers of this process for each, and the epoch.
    """
    config, progress, schedule, group = state.config, state.progress, state.schedule, state.group
    starts = state.starts if state.settings["shuffle"] == "shards" else ()
    start: dict[str, Any] = {"total": schedule.total_steps, "initial": progress.step}
    with ProgressBar(**start, unit=" steps", leave=False, disable=not group.is_main) as bar:
        while progress.step < schedule.total_steps and not out_of_patience(state):
            order = epoch_order(rows, config.seed, progress.epoch, starts)
            epoch = order.split(config.batch_size)[progress.offset : schedule.steps_per_epoch]
            loaded = load([group.shard(x) for x in epoch], progress.epoch)
            for batch_rows in epoch:
                try:
                    batch = next(loaded)
                except UserError:
                    if group.world_size == 1:  # others would wait for the processes that go on
                        checkpoints.save()
                    raise
                progress.offset += 1
                if config.on_nonfinite == "skip" or config.precision == "fp16":
                    states = [module.state_dict() for module in state.changed_by_forward]
                    state.snapshot = [{k: x.clone() for k, x in one.items()} for one in states]
                yield batch_rows, batch
                bar.update()
                if progress.step >= schedule.total_steps:
                    return
            progress.epoch, progress.offset = progress.epoch + 1, 0


def clip_gradients(optimizer: Optimizer, max_norm: float, scale: float = 1.0) -> Tensor:
    """Clip the gradients, over a scale, of all parameters together; returns their norm before."""
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    if scale != 1:
        torch._foreach_mul_([x.grad for x in parameters if x.grad is not None], 1 / scale)
    return full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))


def update_weights(optimizer: Optimizer, learning_rate: float) -> None:
    """Take a step and clear the gradients."""
    for group in optimizer.param_groups:
        if group.get("scheduled", True):
            group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_step(
    state: TrainState,
    rows: Tensor,
    values: Mapping[str, Tensor],
    row_name: Callable[[int], str] = str,
) -> bool:
    """Clip the gradients and take a step, unless a number is NaN or infinite in any process.

    The losses in `values`, gradient norms and learning rate go into the averages; a message names
    `rows`, the row numbers in all processes, by `row_name`. Returns False if the batch was
    skipped (--on_nonfinite skip, or an overflow in fp16). A UserError if none may be (any more).
    """
    group, progress = state.group, state.progress
    learning_rate = state.schedule.learning_rate(progress.step)
    values = dict(values)
    for name, optimizer in state.optimizers.items():
        norm = clip_gradients(optimizer, state.config.max_grad_norm, state.loss_scale)
        values[name.replace("optimizer", "gradient_norm")] = norm
    progress.step += 1
    numbers = torch.stack([x.to(group.device, torch.float32) for x in values.values()])
    if group.all_reduce_max(int(not numbers.isfinite().all())):
        if state.loss_scale > 1:  # the gradients overflowed
            progress.loss_scale, progress.steps_without_overflow = state.loss_scale / 2, 0
        else:
            odd = {
                f"{name} {x}"
                for process in group.all_gather(numbers.tolist())
                for name, x in zip(values, process, strict=True)
                if not math.isfinite(x)
            }
            names = first_few([row_name(row) for row in rows.tolist()], limit=ROWS_SHOWN)
            where = f"at learning rate {learning_rate:.2g}, in {names}"
            _count_skipped(state, f"step {progress.step}: {', '.join(sorted(odd))} {where}")
        for optimizer in state.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for module, before in zip(state.changed_by_forward, state.snapshot, strict=True):
            module.load_state_dict(before)
        return False
    for optimizer in state.optimizers.values():
        update_weights(optimizer, learning_rate)
    if state.config.ema_decay:
        state.ema.update(state.model, progress.step)
    progress.steps_without_overflow += 1
    if state.loss_scale > 1 and progress.steps_without_overflow % GROWTH_STEPS == 0:
        progress.loss_scale *= 2
    state.averages.add({**values, "learning_rate": learning_rate})
    return True


def _count_skipped(state: TrainState, why: str) -> None:
    """Count a batch that is left out, or end the training."""
    progress, limit = state.progress, state.config.nonfinite_limit
    advice = "lower --learning_rate or use --precision fp32, then --resume"
    if state.config.on_nonfinite != "skip":
        raise UserError(f"{why}; {advice}, or leave out such batches by --on_nonfinite skip")
    progress.skipped += 1
    if progress.skipped > limit:
        raise UserError(f"{why}; {limit} batches were skipped before (--nonfinite_limit): {advice}")
    state.group.print(f"warning: {why}; skipped, {progress.skipped} of {limit}")


def out_of_patience(state: TrainState) -> bool:
    """Whether --patience ends the training, now or already before it was resumed."""
    return 0 < state.config.patience <= state.progress.evaluations_without_improvement


def evaluation_is_due(state: TrainState) -> bool:
    """Whether to evaluate after this step: by the schedule, and when --max_minutes are over."""
    if minutes := state.config.max_minutes:
        late = time.monotonic() - state.started_at >= 60 * minutes
        state.time_is_up = bool(state.group.all_reduce_max(int(late)))
    return state.time_is_up or state.schedule.evaluates(state.progress.step)


def keep_best(
    state: TrainState, checkpoints: Checkpointer, score: float, *, always: bool = False
) -> None:
    """Record a validation score (lower is better); save the model if it is the best so far.

    With `always` the latest model counts as the best.
    """
    progress = state.progress
    progress.evaluations_without_improvement += 1
    if score < progress.best or always:  # NaN is never better
        progress.evaluations_without_improvement = 0
        progress.best = min(progress.best, score)
        checkpoints.save_model(state.ema.model)
    if 2 * progress.step <= state.schedule.total_steps:
        progress.best_halfway = progress.best


def end_step(
    state: TrainState, checkpoints: Checkpointer, stop: StopSignals, *, evaluated: bool
) -> bool:
    """The tail of a step: save if it is time, and raise `Stopped` if a signal came.

    Returns whether to end the training early (--patience).
    """
    group, config, progress, schedule = state.group, state.config, state.progress, state.schedule
    every, due = config.checkpoint_every, False
    if every.endswith("m"):
        late = time.monotonic() - state.saved_at >= 60 * int(every[:-1])
        due = bool(group.all_reduce_max(int(late)))
    elif every:
        due = progress.step % int(every) == 0
    if evaluated or due:
        checkpoints.save()
        state.saved_at = time.monotonic()
    if evaluated:
        state.averages.restart()
    if number := group.all_reduce_max(stop.number):  # of this process or another
        checkpoints.save()
        group.shutdown()
        raise Stopped(number)
    if out_of_patience(state):
        metric, patience = config.best_metric, config.patience
        group.print(f"no better {metric} in {patience} evaluations: stopping")
        return True
    step, total = progress.step, schedule.total_steps
    if step == total and progress.best < progress.best_halfway < math.inf:
        gain = (progress.best_halfway - progress.best) / abs(progress.best_halfway)
        if gain > FAST:
            group.print(
                f"hint: {config.best_metric} improved by {gain:.0%} in the second half of the "
                f"training; it may gain from more steps: --max_steps {2 * total}"
            )
    if state.time_is_up and step < total:
        group.print(f"--max_minutes {config.max_minutes:g} are over: step {step:,} of {total:,}")
    return state.time_is_up
