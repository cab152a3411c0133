"""An average of a model's weights along its training, which often draws better than the last."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoint import read_tensors
from utils.cli import UserError

FILE = "average.safetensors"


class WeightAverage:
    """Exponential moving average (EMA) of a model's parameters.

    Attributes:
        model: with the averaged weights, in eval mode; with decay 0 the trained model itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the weights that `model` has now.

        Raises:
            UserError: decay outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise UserError(f"ema_decay must be in [0, 1), got {decay}")
        self._decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False) if decay else model

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after training step number `step` (from 1); young averages move."""
        if not self._decay:
            return
        decay = min(self._decay, step / (step + 9))
        mine, theirs = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(mine, [p.detach() for p in theirs], 1 - decay)

    def files(self) -> dict[str, dict[str, Any]]:
        """The file of a checkpoint that a resumed training needs."""
        return {FILE: self.model.state_dict()} if self._decay else {}

    def restore(self, folder: Path | None) -> None:
        """Go on with the average of a checkpoint; nothing without one.

        Raises:
            UserError: the checkpoint was trained without an average, or another model.
        """
        if folder is None or not self._decay:
            return
        tensors: dict[str, Tensor] = read_tensors(folder / FILE)
        try:
            self.model.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"{folder / FILE} does not fit the model: {error}") from error
