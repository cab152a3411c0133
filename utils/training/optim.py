"""AdamW, Muon, a step of either, and the moving average of the weights."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.cli import flag
from utils.training.config import TrainingConfig

Model = TypeVar("Model", bound=nn.Module)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)  # whose weights decay


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimiser trains a transformer."""

    optimizer: str = flag(
        "adamw",
        "muon: Muon for the matrices of the blocks, AdamW for all else",
        choices=("adamw", "muon"),
    )


class CombinedOptimizer(Optimizer):
    """Optimisers of different parameters as one, for clipping, schedule and checkpoint.

    Its parameter groups are those of all parts in order, and the parts share its state.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share_state()

    def __setstate__(self, state: dict) -> None:
        """The end of `load_state_dict`, which replaces groups and state by new objects."""
        super().__setstate__(state)
        self._share_state()

    def _share_state(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def step(self, closure: Any = None) -> None:
        """Take a step of every part."""
        for part in self.parts:
            part.step()


def make_optimizer(
    model: nn.Module,
    config: TrainingConfig,
    betas: tuple[float, float],
    for_muon: Collection[nn.Parameter] = (),
) -> Optimizer:
    """AdamW (arXiv 1711.05101) with decay of layer weights, but not of biases, gains, embeddings.

    Args:
        model: what to train.
        config: learning rate and weight decay.
        betas: of AdamW.
        for_muon: matrices of the model that Muon trains instead. Its steps are scaled to the
            size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate fits both.
    """
    excluded = {id(parameter) for parameter in for_muon}
    weights = {id(module.weight) for module in model.modules() if isinstance(module, LAYERS)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if id(parameter) not in excluded:
            (decayed if id(parameter) in weights else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)
    if not for_muon:
        return adamw
    muon = torch.optim.Muon(
        for_muon,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return CombinedOptimizer(muon, adamw)


def optimizer_step(optimizer: Optimizer, learning_rate: float, max_grad_norm: float) -> Tensor:
    """Clip all gradients together, take a step, clear them. Returns the norm before clipping.

    The trainers' `loop.optimizer_step` does the same, unless a number is NaN or infinite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class EMA(Generic[Model]):
    """Exponential moving average of a model's trained parameters; all else is the latest.

    `model` has the averaged weights and is in eval mode; with decay 0 it is the trained model.
    """

    def __init__(self, model: Model, decay: float) -> None:
        """Start from the present weights of `model`; `decay` in [0, 1)."""
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False) if decay else model

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """ema <- d ema + (1 - d) weights after step number `step` (from 1).

        d = min(decay, step / (step + 9)), so that the average follows quickly at first.
        """
        decay = min(self.decay, step / (step + 9))
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        trained = [(own, other.detach()) for own, other in pairs if other.requires_grad]
        averaged, latest = (list(part) for part in zip(*trained, strict=True))
        torch._foreach_lerp_(averaged, latest, 1 - decay)
        # Weights that no gradient trains (codes of the `ema` quantizer) must keep agreeing with
        # the buffers that they are computed from: both are copied.
        copied: list[tuple[Tensor, Tensor]] = [pair for pair in pairs if not pair[1].requires_grad]
        copied += zip(self.model.buffers(), model.buffers(), strict=True)
        for own, other in copied:
            own.copy_(other)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, the averaged ones and the latest."""
        return self.model.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state_dict`; a RuntimeError if it is of another model."""
        self.model.load_state_dict(tensors)
