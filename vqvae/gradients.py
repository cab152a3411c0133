"""The gradients of one batch, for the tokenizer and for its adversary."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.adversary import Adversary
from vqvae.losses import ReconstructionLoss

Values = dict[str, Tensor]  # numbers to log, by name


def compile_model(model: nn.Module, adversary: Adversary | None) -> None:
    """Compile a `VQVAE` in place, for `add_gradients`."""
    if adversary is not None:
        # The adaptive weight goes backward through the graph before the loss does, when the
        # buffers that a first pass may give away would be gone.
        functorch_config.donated_buffer = False
    model.compile()


def add_gradients(
    forward: nn.Module,
    images: Tensor,
    losses: ReconstructionLoss,
    autocast: Callable[[], AbstractContextManager],
    *,
    accumulate: int = 1,
    adversary: Adversary | None = None,
    last: Tensor | None = None,
    step: int = 0,
) -> tuple[Values, Tensor]:
    """Add the gradients of one batch: of the tokenizer, of the discriminator, or of both.

    Which of them learns is for the adversary's autopilot to say. Who does not is left without
    gradients, so that a step of its optimiser does nothing.

    Args:
        forward: the `VQVAE`, perhaps wrapped.
        images: (B, C, H, W) in [-1, 1].
        losses: the reconstruction's terms.
        autocast: makes the context in which the network runs.
        accumulate: in how many parts the batch is cut.
        adversary: gets its gradients, too.
        last: the decoder's last weight, see `Adversary.generator_term`.
        step: of the training, from 0.

    Returns:
        Numbers to log, and the indices that the batch was encoded to.
    """
    phase = "before" if adversary is None else adversary.autopilot.phase(step)
    if phase == "both":
        adversary.autopilot.advance()
    values: Values = {}
    indices = []
    for part in images.chunk(accumulate):
        if phase == "alone":
            made, logged, chosen = _stand_still(forward, part, autocast)
        else:
            opponent = adversary if phase == "both" else None
            made, logged, chosen = _learn(
                forward, part, losses, autocast, accumulate, opponent, last
            )
        if phase != "before":
            logged |= _discriminate(adversary, part, made, autocast, accumulate)
        for name, value in logged.items():
            values[name] = values.get(name, 0.0) + value.detach() / accumulate
        indices.append(chosen)
    return values, torch.cat(indices)


def _learn(
    forward: nn.Module,
    images: Tensor,
    losses: ReconstructionLoss,
    autocast: Callable[[], AbstractContextManager],
    accumulate: int,
    adversary: Adversary | None,
    last: Tensor | None,
) -> tuple[Tensor, Values, Tensor]:
    """Reconstructions with the tokenizer's gradients added, numbers, indices."""
    with autocast():
        made, quantized = forward(images)
    made = made.float()
    terms = losses(made, images)
    reconstruction_loss = sum(terms.values())
    loss = reconstruction_loss + sum(quantized.losses.values())
    logged = {"mse": F.mse_loss(made.detach(), images) / 4}  # on the scale [0, 1]
    logged |= {f"{name}_loss": x for name, x in (terms | quantized.losses).items()}
    if adversary is not None:
        with autocast():
            term, more = adversary.generator_term(made, reconstruction_loss, last)
        loss, logged = loss + term, logged | more
    (loss / accumulate).backward()
    return made, logged, quantized.indices


def _stand_still(
    forward: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager]
) -> tuple[Tensor, Values, Tensor]:
    """Reconstructions, numbers and indices of a tokenizer that does not change, nor its codes."""
    forward.eval()
    with torch.no_grad(), autocast():
        made, quantized = forward(images)
    forward.train()
    made = made.float()
    return made, {"mse": F.mse_loss(made, images) / 4}, quantized.indices


def _discriminate(
    adversary: Adversary,
    images: Tensor,
    made: Tensor,
    autocast: Callable[[], AbstractContextManager],
    accumulate: int,
) -> Values:
    """The numbers of the discriminator, with its gradients added."""
    with autocast():
        loss, values = adversary.discriminator_term(images, made)
    (loss / accumulate).backward()
    return values | {"disc_strength": torch.tensor(adversary.autopilot.strength)}
