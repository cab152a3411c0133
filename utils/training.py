"""What all trainings share: their flags, schedule and optimiser, the batches, stopping."""

import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor, nn

from utils.checkpoint import whole
from utils.cli import Stopped, UserError, unused
from utils.processes import Processes
from utils.resume import Progress
from utils.table import epoch_order

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingConfig:
    """Flags that all trainings share."""

    output_dir: str = field(
        default="", metadata={"help": "where to write; default: outputs/<run name>"}
    )
    run_name: str = field(default="", metadata={"help": "name of the run; default: made up"})
    experiment: str = field(default="", metadata={"help": "MLflow experiment"})
    register: str = field(
        default="",
        metadata={"help": "name in MLflow's model registry, whose champion is the best so far"},
    )
    seed: int = field(default=0, metadata={"help": "seed of everything that is drawn"})
    device: str = field(
        default="auto",
        metadata={"help": "where to compute", "choices": ("auto", "cpu", "cuda", "mps")},
    )
    precision: str = field(
        default="auto",
        metadata={
            "help": "bf16: matrix products in bfloat16; auto: where that is faster",
            "choices": ("auto", "fp32", "bf16"),
        },
    )
    compile: bool = field(default=False, metadata={"help": "compile the model (torch.compile)"})
    batch_size: int = field(
        default=64, metadata={"help": "images a step, over all processes and accumulations"}
    )
    accumulate: int = field(
        default=1, metadata={"help": "cut each batch into this many parts, to save memory"}
    )
    num_workers: int = field(
        default=-1, metadata={"help": "processes that decode images; -1: one a core"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, on matrices only"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the gradient to this norm"})
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "evaluate and keep a moving average of the weights, as 0.999; 0: none"},
    )
    max_epochs: int = field(default=20, metadata={"help": "passes over the training data"})
    max_steps: int = field(default=0, metadata={"help": "stop after this many steps; 0: no limit"})
    evaluate_every: int = field(
        default=0, metadata={"help": "steps between evaluations; 0: an epoch"}
    )
    patience: int = field(
        default=0,
        metadata={"help": "stop after this many evaluations without a better one; 0: never"},
    )
    resume: str = field(
        default="",
        metadata={"help": "output folder to go on in; auto: --output_dir, if it has a checkpoint"},
    )

    def __post_init__(self) -> None:
        if any(sign in self.register for sign in "/:'\""):
            raise ValueError(f"register must be a name without / : and quotes, got {self.register}")
        for name in ("batch_size", "accumulate", "max_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "max_steps", "evaluate_every", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


def make_optimizer(
    model: nn.Module, config: TrainingConfig, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) that decays matrices, and no biases, gains or embeddings."""
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed, kept = [], []
    for parameter in model.parameters():
        matrix = parameter.dim() > 1 and parameter not in embeddings
        (decayed if matrix else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


def optimizer_step(
    optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float
) -> Tensor:
    """Clip the gradients, step, and clear them. Returns the norm before clipping.

    Raises:
        UserError: a gradient is not finite; nothing was changed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm, error_if_nonfinite=True)
    except RuntimeError as error:
        raise UserError(
            f"the gradient is not finite at learning rate {learning_rate:.2g}; lower "
            "--learning_rate or use --precision fp32, then --resume"
        ) from error
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class StopRequest(AbstractContextManager):
    """Turns SIGINT and SIGTERM into a wish that the loop fulfils after its step.

    A second signal stops at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._number = 0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._take) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            sys.exit(128 + number)
        self._number = number

    def obeyed(self, group: Processes, save: Callable[[], None]) -> None:
        """If a signal came, to this process or another, save and leave.

        Raises:
            Stopped: it came.
        """
        number = group.largest(self._number)
        if number:
            save()
            raise Stopped(number)


def find_output_dir(config: TrainingConfig, resumed: Path | None, default_name: str) -> Path:
    """The output folder: that of the resumed checkpoint, `--output_dir`, or outputs/<run name>.

    Raises:
        UserError: `--output_dir` holds a training already.
    """
    if resumed is not None:
        return resumed.parent
    if config.output_dir:
        folder = Path(config.output_dir)
        if whole(folder / "last").exists():
            raise UserError(
                f"{folder} holds a training already; choose another --output_dir, or go on with "
                f"it by --resume {folder}"
            )
        return folder
    return unused(Path("outputs") / (config.run_name or default_name))


class Schedule:
    """When what happens in a training: batches, learning rate, logs, evaluations, the end.

    Attributes:
        steps_per_epoch: full batches in one pass over the rows.
        total_steps: optimiser steps of the whole training.
        evaluate_every: steps between evaluations.
    """

    LOG_EVERY = 50  # steps

    def __init__(
        self, config: TrainingConfig, num_train: int, num_val: int, processes: int = 1
    ) -> None:
        """Plan a training on `num_train` rows, evaluated on `num_val`.

        Raises:
            UserError: there are too few rows, or the batch does not divide.
        """
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
        if config.batch_size % (config.accumulate * processes):
            raise UserError(
                f"--batch_size {config.batch_size} does not divide into {processes} processes x "
                f"{config.accumulate} parts (--accumulate)"
            )
        self.steps_per_epoch = num_train // config.batch_size
        self.total_steps = self.steps_per_epoch * config.max_epochs
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.evaluate_every = config.evaluate_every or self.steps_per_epoch
        self._config = config

    def __str__(self) -> str:
        return (
            f"{self.total_steps:,} steps of {self._config.batch_size} images, evaluated every "
            f"{self.evaluate_every:,}"
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to 0 at the end (arXiv 1608.03983)."""
        peak, warmup = self._config.learning_rate, self._config.warmup_steps
        warmup = min(warmup, self.total_steps // 10)
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

    def batches(
        self,
        rows: Tensor,
        progress: Progress,
        group: Processes,
        load: Callable[[list[Tensor], int], Iterator[T]],
    ) -> Iterator[T]:
        """What `load` makes of every batch of rows, from where `progress` stands to the end.

        The order of an epoch follows from seed and epoch alone, so that a resumed training goes
        on with the very rows that come next. Rows that fill no batch wait for another epoch.

        Args:
            rows: row numbers of the training data.
            progress: its epoch and offset are moved on; its step is the caller's to count.
            group: each process gets its share of every batch.
            load: (batches of row numbers, epoch) -> the batches.
        """
        with group.bar(self.total_steps, progress.step) as bar:
            while progress.step < self.total_steps:
                order = epoch_order(rows, self._config.seed, progress.epoch)
                batches = order.split(self._config.batch_size)[: self.steps_per_epoch]
                shares = [group.share(batch) for batch in batches[progress.offset :]]
                for batch in load(shares, progress.epoch):
                    progress.offset += 1
                    yield batch
                    bar.update()
                    if progress.step >= self.total_steps:
                        return
                progress.epoch, progress.offset = progress.epoch + 1, 0
