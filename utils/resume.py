"""Where a training is, beside its weights: saved with each checkpoint, restored from it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoint import WEIGHTS, read_json, read_tensors, whole
from utils.cli import UserError


@dataclass
class Progress:
    """Where a training is: what a resumed one must know besides weights and optimiser.

    Attributes:
        step: optimiser steps done.
        epoch: epochs done.
        offset: batches of the current epoch done.
        best: the best validation figure so far (lower is better).
        bad_evaluations: evaluations since then.
        run_id: the MLflow run.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    best: float = math.inf
    bad_evaluations: int = 0
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


STATE, PROGRESS = "training.safetensors", "training.json"


def training_files(
    optimizer: torch.optim.Optimizer, progress: Progress
) -> dict[str, dict[str, Any]]:
    """The files that a checkpoint has beyond its model: optimiser, random numbers, progress."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    values = vars(progress) | {"optimizer": type(optimizer).__name__}
    return {STATE: tensors | _optimizer_tensors(optimizer), PROGRESS: values}


def part_files(
    name: str, module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """The file of what is trained beside the model: `name`.safetensors."""
    tensors = {f"module.{key}": value for key, value in module.state_dict().items()}
    tensors |= _optimizer_tensors(optimizer)
    return {f"{name}.safetensors": tensors}


def restore_part(
    folder: Path | None,
    name: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Fill in what `part_files` wrote; nothing without a folder.

    Raises:
        UserError: the checkpoint has no such part.
    """
    if folder is None:
        return
    tensors = read_tensors(folder / f"{name}.safetensors")
    try:
        prefix = "module."
        module.load_state_dict(
            {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
        )
        _load_optimizer(optimizer, tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} does not fit this training: {line}; resume with the flags it began with"
        ) from error


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".")
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


def find_checkpoint(resume: str, output_dir: str) -> Path | None:
    """The checkpoint that `--resume` names, or None where a new training is to start.

    Raises:
        UserError: there is none where one was named.
    """
    if not resume:
        return None
    if resume == "auto":
        if not output_dir:
            raise UserError("--resume auto needs --output_dir, to know where to go on")
        folder = whole(Path(output_dir) / "last")
        return folder if folder.exists() else None
    for folder in (whole(Path(resume) / "last"), Path(resume)):
        if (folder / STATE).is_file():
            return folder
    raise UserError(f"--resume {resume}: no checkpoint there; give the output folder of a training")


def restore_training(
    folder: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Fill in weights, optimiser and random numbers from a checkpoint; nothing without one.

    Raises:
        UserError: the folder is no checkpoint of such a training.
    """
    if folder is None:
        return Progress()
    tensors = read_tensors(folder / STATE)
    try:
        model.load_state_dict(read_tensors(folder / WEIGHTS))
        torch.set_rng_state(tensors.pop("random.cpu"))
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        values = read_json(folder / PROGRESS)
        before, now = values.pop("optimizer", "AdamW"), type(optimizer).__name__
        if before != now:
            raise ValueError(f"its optimizer was {before}, not {now}")
        _load_optimizer(optimizer, tensors)
        return Progress(**values)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} does not fit this training: {line}; resume with the flags it began with"
        ) from error
