"""An average of a model's weights along its training, which often draws better than the last."""

import copy

import torch
from torch import Tensor, nn

from utils.cli import UserError


class WeightAverage:
    """Exponential moving average (EMA) of a model's trained parameters; all else is the latest.

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
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        trained = [(own, other.detach()) for own, other in pairs if other.requires_grad]
        torch._foreach_lerp_(*map(list, zip(*trained, strict=True)), 1 - decay)
        # Counters and the like have no average, nor weights that no gradient trains: they must
        # stay what the counters say of them.
        kept = [pair for pair in pairs if not pair[1].requires_grad]
        kept += zip(self.model.buffers(), model.buffers(), strict=True)
        for own, other in kept:
            own.copy_(other)

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
