"""The flags of every training."""

import math
import re
from dataclasses import dataclass

from utils.cli import flag


def checkpoint_interval(text: str) -> tuple[int, float]:
    """`500` -> (500, inf) steps, `5m` -> (0, 300) seconds, "" -> (0, inf): neither.

    Raises:
        ValueError: the text is something else.
    """
    match = re.fullmatch(r"([1-9]\d*)(m?)", text)
    if text and not match:
        raise ValueError(f"checkpoint_every must be steps as 500 or minutes as 5m, got {text!r}")
    if not match:
        return 0, math.inf
    number = int(match[1])
    return (0, 60.0 * number) if match[2] else (number, math.inf)


@dataclass(frozen=True)
class TrainingConfig:
    """The flags of every training."""

    output_dir: str = flag("", "where to write; default: outputs/<run name>")
    run_name: str = flag("", "name of the run; default: derived from the model")
    experiment: str = flag("", "MLflow experiment", metavar="NAME")
    register: str = flag(
        "", "name in MLflow's model registry, whose champion is the best so far", metavar="NAME"
    )
    seed: int = flag(0, "seed of all random numbers")
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = flag(
        "auto",
        "bf16: matrix products in bfloat16; auto: where that is faster",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = flag(False, "compile the model (torch.compile)")
    batch_size: int = flag(64, "images a step, over all processes and micro-batches")
    accumulate: int = flag(1, "cut each batch into this many micro-batches, to save memory")
    learning_rate: float = flag(1e-3, "peak learning rate")
    warmup_steps: int = flag(100, "steps of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm")
    ema_decay: float = flag(
        0.0, "evaluate and keep a moving average of the weights, as 0.999; 0: none"
    )
    max_epochs: int = flag(20, "passes over the training data")
    max_steps: int = flag(0, "train for this many steps instead of --max_epochs; 0: by epochs")
    evaluate_every: int = flag(0, "steps between evaluations; 0: an epoch")
    best_metric: str = flag("mse", "validation metric by which the best model is chosen")
    patience: int = flag(0, "stop after this many evaluations without a better one; 0: never")
    checkpoint_every: str = flag(
        "", "steps (500) or minutes (5m) between checkpoints beside evaluations", metavar="N|Nm"
    )
    resume: str = flag(
        "",
        "output folder, checkpoint or MLflow run id to continue from; auto: --output_dir, or "
        "start there if it has no checkpoint",
        metavar="PATH",
    )
    on_nonfinite: str = flag(
        "stop", "what to do about a NaN or infinite loss or gradient", choices=("stop", "skip")
    )
    nonfinite_limit: int = flag(10, "batches that --on_nonfinite skip may leave out")

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
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        checkpoint_interval(self.checkpoint_every)
