"""AdamW, Muon, a step of either, and the moving average of the weights."""

import copy
from collections.abc import Mapping, Sequence
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


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """U V^T, nearly, of each matrix U S V^T: its singular values move into about [0.7, 1.2].

    Newton-Schulz iteration of degree 5 with Keller Jordan's coefficients
    (https://kellerjordan.github.io/posts/muon). It is made for bfloat16, which CPUs mostly lack or
    emulate: there it runs in float32.

    Args:
        matrices: (n, rows, columns).
        steps: iterations.

    Returns:
        (n, rows, columns), of the type of `matrices`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).type_as(matrices)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalized: every direction of a matrix gets a step of equal size.

    A parameter that stacks several linear maps, as queries, keys and values, is orthogonalized map
    by map. Steps are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one
    learning rate fits both. Maps of one shape are computed in one batch.
    """

    def __init__(
        self,
        maps: Mapping[nn.Parameter, Sequence[int]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """Take the parameters, each (rows, columns) with the rows of the maps that it stacks."""
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": [*maps]}], defaults)
        self.rows = [list(rows) for rows in maps.values()]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step, if there are gradients."""
        group = self.param_groups[0]
        lr, momentum = group["lr"], group["momentum"]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for parameter, rows in zip(group["params"], self.rows, strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            update = parameter.grad.lerp(average, momentum)
            parameter.mul_(1 - lr * group["weight_decay"])
            for weight, part in zip(parameter.split(rows), update.split(rows), strict=True):
                by_shape.setdefault(part.shape, []).append((weight, part))
        for shape, pairs in by_shape.items():
            updates = orthogonalize(torch.stack([part for _, part in pairs]))
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)


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
    for_muon: Mapping[nn.Parameter, Sequence[int]] | None = None,
) -> Optimizer:
    """AdamW (arXiv 1711.05101) with decay of layer weights, but not of biases, gains, embeddings.

    Args:
        model: what to train.
        config: learning rate and weight decay.
        betas: of AdamW.
        for_muon: matrices of the model that `Muon` trains instead.
    """
    excluded = {id(parameter) for parameter in for_muon or ()}
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
    return CombinedOptimizer(Muon(for_muon, config.learning_rate, config.weight_decay), adamw)


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
