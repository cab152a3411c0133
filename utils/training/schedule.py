"""What all trainings share: their flags, schedule, and the batches."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from utils.cli import UserError, unused
from utils.data.table import epoch_order
from utils.distributed import Distributed
from utils.training.checkpoints import checkpoints_in, home_of
from utils.training.resume import Progress
from utils.training.saving import interval

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingConfig:
    """Flags that all trainings share."""

    output_dir: str = field(
        default="", metadata={"help": "where to write; default: outputs/<run name>"}
    )
    run_name: str = field(default="", metadata={"help": "name of the run; default: made up"})
    experiment: str = field(default="", metadata={"help": "MLflow experiment", "metavar": "NAME"})
    register: str = field(
        default="",
        metadata={
            "help": "name in MLflow's model registry, whose champion is the best so far",
            "metavar": "NAME",
        },
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
    best_metric: str = field(
        default="mse", metadata={"help": "validation figure by which the best model is chosen"}
    )
    patience: int = field(
        default=0,
        metadata={"help": "stop after this many evaluations without a better one; 0: never"},
    )
    checkpoint_every: str = field(
        default="",
        metadata={
            "help": "steps (500) or minutes (5m) between checkpoints beside evaluations",
            "metavar": "N|Nm",
        },
    )
    resume: str = field(
        default="",
        metadata={
            "help": "output folder, checkpoint or MLflow run id to go on from; auto: --output_dir, "
            "or start there if it has no checkpoint",
            "metavar": "PATH",
        },
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "what to do about a loss or gradient that is not finite",
            "choices": ("stop", "skip"),
        },
    )
    nonfinite_limit: int = field(
        default=10, metadata={"help": "batches that --on_nonfinite skip may leave out"}
    )

    def __post_init__(self) -> None:
        if any(sign in self.register for sign in "/:'\""):
            raise ValueError(f"register must be a name without / : and quotes, got {self.register}")
        for name in ("batch_size", "accumulate", "max_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        not_negative = ("warmup_steps", "weight_decay", "max_steps", "evaluate_every", "patience")
        for name in (*not_negative, "nonfinite_limit"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of 0 or more, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a number above 0, got {self.learning_rate}")
        if not self.max_grad_norm > 0:  # inf: does not clip
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        interval(self.checkpoint_every)


def saved_if_it_fails(
    batches: Iterator[T], group: Distributed, save: Callable[[], None]
) -> Iterator[T]:
    """The batches; a training that cannot read the next one is saved before it ends.

    Not one of several processes, which would wait for the others.
    """
    try:
        yield from batches
    except UserError:
        if group.world_size == 1:
            save()
        raise


def find_output_dir(config: TrainingConfig, resumed: Path | None, default_name: str) -> Path:
    """The output folder: that of the resumed checkpoint, `--output_dir`, or outputs/<run name>.

    Raises:
        UserError: `--output_dir` holds a training already.
    """
    if resumed is not None:
        return home_of(resumed)
    if config.output_dir:
        folder = Path(config.output_dir)
        if checkpoints_in(folder):
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
        rows: the numbers of the rows of the current batch, in all processes.
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
        self.rows = torch.empty(0, dtype=torch.long)
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
        group: Distributed,
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
        with tqdm(
            total=self.total_steps,
            initial=progress.step,
            unit=" steps",
            disable=None if group.is_main else True,  # None: unless on a terminal
            leave=False,
        ) as bar:
            while progress.step < self.total_steps:
                order = epoch_order(rows, self._config.seed, progress.epoch)
                batches = order.split(self._config.batch_size)[: self.steps_per_epoch]
                batches = batches[progress.offset :]
                shares = [group.shard(rows) for rows in batches]
                loaded = load(shares, progress.epoch)
                for self.rows, batch in zip(batches, loaded, strict=True):
                    progress.offset += 1
                    yield batch
                    bar.update()
                    if progress.step >= self.total_steps:
                        return
                progress.epoch, progress.offset = progress.epoch + 1, 0
