"""The optimisers of all trainings, and a step of them."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.cli import UserError
from utils.training import TrainingConfig


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


class Together(torch.optim.Optimizer):
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
    """AdamW (arXiv 1711.05101) that decays matrices, and no biases, gains or embeddings.

    Args:
        model: what to train.
        config: learning rate and weight decay.
        betas: of AdamW.
        for_muon: matrices of the model that Muon trains instead. Its steps are scaled to the
            size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate fits both.
    """
    apart = {id(parameter) for parameter in for_muon}
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed, kept = [], []
    for parameter in model.parameters():
        if id(parameter) not in apart:
            matrix = parameter.dim() > 1 and id(parameter) not in embeddings
            (decayed if matrix else kept).append(parameter)
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
    return Together(muon, adamw)


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
