"""The gradients of one batch, for the tokenizer and for its adversary."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.adversary import Adversary
from vqvae.losses import ReconstructionLoss

Values = dict[str, Tensor]  # numbers to log, by name


def add_gradients(
    forward: nn.Module,
    images: Tensor,
    losses: ReconstructionLoss,
    autocast: Callable[[], AbstractContextManager],
    *,
    accumulate: int = 1,
    adversary: Adversary | None = None,
    last: Tensor | None = None,
    strength: float = 0.0,
) -> tuple[Values, Tensor]:
    """Add the gradients of one batch; its losses, and the indices that it was encoded to.

    Args:
        forward: the `VQVAE`, perhaps wrapped.
        images: (B, C, H, W) in [-1, 1].
        losses: the reconstruction's terms.
        autocast: makes the context in which the network runs.
        accumulate: in how many parts the batch is cut.
        adversary, last, strength: see `Adversary.generator_term`; its discriminator gets its
            gradients, too.
    """
    values: Values = {}
    indices = []
    for part in images.chunk(accumulate):
        with autocast():
            made, quantized = forward(part)
        made = made.float()
        terms = losses(made, part)
        reconstruction_loss = sum(terms.values())
        loss = reconstruction_loss + sum(quantized.losses.values())
        logged = {"mse": F.mse_loss(made.detach(), part) / 4}  # on the scale [0, 1]
        logged |= {f"{name}_loss": x for name, x in (terms | quantized.losses).items()}
        if adversary is not None:
            with autocast():
                term, more = adversary.generator_term(made, reconstruction_loss, last, strength)
            loss, logged = loss + term, logged | more
        (loss / accumulate).backward()
        if adversary is not None:
            logged |= _discriminate(adversary, part, made, autocast, accumulate)
        _add(values, logged, accumulate)
        indices.append(quantized.indices)
    return values, torch.cat(indices)


def add_discriminator_gradients(
    model: nn.Module,
    images: Tensor,
    autocast: Callable[[], AbstractContextManager],
    *,
    accumulate: int = 1,
    adversary: Adversary,
) -> tuple[Values, Tensor]:
    """`add_gradients` for the discriminator alone, while the tokenizer stands still."""
    values: Values = {}
    indices = []
    model.eval()
    for part in images.chunk(accumulate):
        with torch.no_grad(), autocast():
            made, quantized = model(part)
        logged = {"mse": F.mse_loss(made.float(), part) / 4}
        logged |= _discriminate(adversary, part, made.float(), autocast, accumulate)
        _add(values, logged, accumulate)
        indices.append(quantized.indices)
    model.train()
    return values, torch.cat(indices)


def _discriminate(
    adversary: Adversary,
    images: Tensor,
    made: Tensor,
    autocast: Callable[[], AbstractContextManager],
    accumulate: int,
) -> Values:
    with autocast():
        loss, values = adversary.discriminator_term(images, made)
    (loss / accumulate).backward()
    return values


def _add(values: Values, more: Values, accumulate: int) -> None:
    for name, value in more.items():
        values[name] = values.get(name, 0.0) + value.detach() / accumulate
