"""AdamW, Muon, a step of either, and the moving average of the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.cli import flag
from utils.distributed import copy_model
from utils.training.config import TrainingConfig

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)  # whose weights decay


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimiser trains a transformer, and what its processes share."""

    optimizer: str = flag(
        "adamw", "muon: Muon for matrices of blocks, AdamW for the rest", choices=("adamw", "muon")
    )
    parallel: str = flag(
        "ddp",
        "ddp: each process of torchrun has the whole model; fsdp: a shard, for large models",
        choices=("ddp", "fsdp"),
    )

    def __post_init__(self) -> None:
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError(
                "--optimizer muon orthogonalizes whole matrices, of which --parallel fsdp gives "
                "each process some rows; omit one of them"
            )


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """U V^T, nearly, of each matrix U S V^T: its singular values move into about [0.7, 1.2].

    `matrices` are (n, rows, columns). Newton-Schulz iteration of degree 5 with Keller Jordan's
    coefficients (https://kellerjordan.github.io/posts/muon). It is made for bfloat16, which CPUs
    mostly lack or emulate: there it runs in float32.
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

    A parameter (rows, columns) that stacks several linear maps, as queries, keys and values, is
    orthogonalized map by map: `maps` has the rows of each. Steps are scaled to the size of
    AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate fits both. Maps of one shape
    are computed in one batch. An optimiser of the other parameters takes its steps as a part of
    this one, for clipping, schedule and checkpoint.
    """

    def __init__(
        self,
        maps: Mapping[nn.Parameter, Sequence[int]],
        lr: float,
        weight_decay: float,
        others: Optimizer | None = None,
    ) -> None:
        own = {"params": [*maps], "lr": lr, "weight_decay": weight_decay, "momentum": 0.95}
        super().__init__([own, *(others.param_groups if others else ())], {})
        self.rows, self.others = [list(rows) for rows in maps.values()], others

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step, if there are gradients."""
        group, *rest = self.param_groups
        if self.others is not None:  # `load_state_dict` replaces groups and state by new objects
            self.others.state, self.others.param_groups = self.state, rest
            self.others.step()
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


def make_optimizer(
    model: nn.Module,
    config: TrainingConfig,
    betas: tuple[float, float],
    for_muon: Mapping[nn.Parameter, Sequence[int]] | None = None,
) -> Optimizer:
    """AdamW (arXiv 1711.05101) with decay of layer weights, but not of biases, gains, embeddings.

    `Muon` trains the matrices `for_muon` of the model instead.
    """
    for_muon, decay = for_muon or {}, config.weight_decay
    weights = {module.weight for module in model.modules() if isinstance(module, LAYERS)}
    parameters = [x for x in model.parameters() if x not in for_muon]
    groups = [
        {"params": [x for x in parameters if x in weights], "weight_decay": decay},
        {"params": [x for x in parameters if x not in weights], "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)
    if not for_muon:
        return adamw
    return Muon(for_muon, config.learning_rate, decay, adamw)


class EMA:
    """Exponential moving average of a model's trained parameters; all else is the latest.

    `model` has the averaged weights and is in eval mode; with decay 0 it is the trained model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the present weights of `model`; `decay` in [0, 1)."""
        self.decay = decay
        self.model: Any = copy_model(model).eval().requires_grad_(False) if decay else model

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
        buffers = zip(self.model.buffers(), model.buffers(), strict=True)
        for own, other in (*pairs, *buffers):
            if not other.requires_grad:
                own.copy_(other)
