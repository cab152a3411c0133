"""An average of a model's weights along its training, which often draws better than the last."""

import copy

import torch
from torch import Tensor, nn

from utils.cli import UserError


class WeightAverage:
    """Exponential moving average (EMA) of a model's parameters; its buffers are the latest.

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
        """Take in the weights after training step number `step` (from 1).

        Early on the decay is smaller, so that the average follows quickly.
        """
        if not self._decay:
            return
        decay = min(self._decay, step / (step + 9))
        trained = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(list(self.model.parameters()), trained, 1 - decay)
        for own, other in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(other)  # counters and the like: these have no average

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed training needs: nothing without an average."""
        return self.model.state_dict() if self._decay else {}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go on with the average of a checkpoint.

        Raises:
            RuntimeError: it is of another model, or there is none.
        """
        if self._decay:
            self.model.load_state_dict(tensors)
