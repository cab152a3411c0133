"""The flags of every training."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from utils.cli import DEVICES, Checked, UserError, flag

EPOCHS, MIN_STEPS = 20, 1000  # the default length of a training: whichever is longer


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """The flags of every training."""

    output_dir: str = flag("", "where to write; default: outputs/<run name>")
    run_name: str = flag("", "name of the run; default: derived from the model")
    experiment: str = flag("", "MLflow experiment", metavar="NAME")
    register: str = flag("", "registered model in MLflow; champion: the best", metavar="NAME")
    seed: int = flag(0, "seed of all random numbers")
    device: str = flag("auto", "where to compute", choices=DEVICES)
    precision: str = flag(
        "auto",
        "bf16: matrix products in bfloat16; auto: where that is faster; fp16: for GPUs without it",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = flag(False, "compile the model (torch.compile)")
    shuffle: str = flag(
        "auto",
        "order of an epoch: rows at random; or files at random and rows within four of them, which "
        "must not be sorted by class; auto: that for several files of images that exceed memory",
        choices=("auto", "rows", "shards"),
    )
    batch_size: int = flag(64, "images a step, over all processes and micro-batches", min=1)
    accumulate: int = flag(1, "cut each batch into this many micro-batches, to save memory", min=1)
    checkpoint_activations: bool = flag(False, "recompute activations: less memory, more time")
    learning_rate: float = flag(1e-3, "peak learning rate", above=0, below=math.inf)
    warmup_steps: int = flag(100, "steps of linear warm-up", min=0)
    weight_decay: float = flag(0.0, "AdamW's, on matrices only", min=0, below=math.inf)
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm", above=0)
    ema_decay: float = flag(0.0, "EMA of weights to evaluate and keep; 0: none", min=0, below=1)
    max_epochs: int = flag(0, f"epochs; 0: {EPOCHS}, but {MIN_STEPS:,} steps or more", min=0)
    max_steps: int = flag(0, "train for this many steps, not --max_epochs; 0: by epochs", min=0)
    max_minutes: float = flag(0.0, "end the training after this many minutes; 0: no limit", min=0)
    evaluate_every: int = flag(0, "steps between evaluations; 0: an epoch", min=0)
    best_metric: str = flag("mse", "validation metric by which the best model is chosen")
    patience: int = flag(0, "stop after this many evaluations without progress; 0: never", min=0)
    checkpoint_every: str = flag(
        "", "steps (500) or minutes (5m) between checkpoints beside evaluations", metavar="N|Nm"
    )
    dry_run: bool = flag(False, "take a few steps, print what the training would take, and stop")
    resume: str = flag(
        "",
        "output folder, checkpoint or MLflow run id to continue from; auto: --output_dir, or "
        "start there if it has no checkpoint",
        metavar="PATH",
    )
    on_nonfinite: str = flag(
        "stop", "what to do about a NaN or infinite loss or gradient", choices=("stop", "skip")
    )
    nonfinite_limit: int = flag(10, "batches that --on_nonfinite skip may leave out", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(sign in self.register for sign in "/:'\""):
            raise ValueError(f"register must be a name without / : and quotes, got {self.register}")
        every = self.checkpoint_every
        if not re.fullmatch(r"([1-9]\d*m?)?", every):
            raise ValueError(
                f"checkpoint_every must be steps as 500 or minutes as 5m, got {every!r}"
            )


def sign_of(metric: str, signs: Mapping[str, int]) -> int:
    """The sign of `--best_metric`: 1 where lower is better, -1 where higher is better."""
    if metric not in signs:
        others = ", ".join(signs)
        raise UserError(f"--best_metric {metric} is not measured here; use {others}")
    return signs[metric]
