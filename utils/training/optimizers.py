"""The optimisers of all trainings, and a step of them."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.training.schedule import TrainingConfig

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)  # whose weights decay


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimiser trains a transformer."""

    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "muon: Muon for the matrices of the blocks, AdamW for all else",
            "choices": ("adamw", "muon"),
        },
    )


class CombinedOptimizer(torch.optim.Optimizer):
    """Optimisers of different parameters as one, for clipping, schedule and checkpoint.

    Parameter groups are those of all parts in order, and the state is common to them.

    Attributes:
        parts: the optimisers.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict) -> None:
        """What loading a state ends with, after which groups and state are new objects."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def step(self) -> None:
        """Let every part take its step."""
        for part in self.parts:
            part.step()


def make_optimizer(
    model: nn.Module,
    config: TrainingConfig,
    betas: tuple[float, float],
    for_muon: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) that decays the weights of layers, no biases, gains or embeddings.

    Args:
        model: what to train.
        config: learning rate and weight decay.
        betas: of AdamW.
        for_muon: matrices of the model that Muon trains instead. Its steps are scaled to the
            size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate fits both.
    """
    apart = {id(parameter) for parameter in for_muon}
    weights = {id(module.weight) for module in model.modules() if isinstance(module, LAYERS)}
    decayed, kept = [], []
    for parameter in model.parameters():
        if id(parameter) not in apart:
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


def clip(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
    """Clip the gradients of all parameters together. Returns their norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, max_grad_norm)


def step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Take a step with this learning rate, and clear the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_step(
    optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float
) -> Tensor:
    """`clip` and `step`, for those who have no guard. Returns the norm before clipping."""
    norm = clip(optimizer, max_grad_norm)
    step(optimizer, learning_rate)
    return norm
