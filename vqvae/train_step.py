"""Forward and backward pass of one batch, for the tokenizer and its discriminator."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.adversarial import AdversarialLoss
from vqvae.losses import ReconstructionLoss

Values = dict[str, Tensor]  # scalars to log, by name
Autocast = Callable[[], AbstractContextManager]


def compile_model(model: nn.Module) -> None:
    """Compile a `VQVAE` in place, for `forward_backward`."""
    for module in model.modules():
        for name in getattr(module, "uncompiled", ()):
            # Decorated where it is defined, each import of vqvae would load the compiler.
            setattr(module, name, torch.compiler.disable(getattr(module, name)))
    model.compile()


# The adaptive weight runs backward through the graph before the loss does. By default a compiled
# backward pass reuses the graph's buffers, which then are gone.
@functorch_config.patch(donated_buffer=False)
def forward_backward(
    model: nn.Module,
    images: Tensor,
    losses: ReconstructionLoss,
    autocast: Autocast,
    *,
    accumulate: int = 1,
    adversary: AdversarialLoss | None = None,
    step: int = 0,
    scale: float = 1.0,
) -> tuple[Values, Tensor]:
    """Accumulate `scale` times the gradients of a batch (B, C, H, W) in [-1, 1], in micro-batches.

    The adversary's schedule decides which of tokenizer and discriminator trains at this step, from
    0. The other is left without gradients, so that a step of its optimiser changes nothing. The
    `VQVAE` may be wrapped (DistributedDataParallel). Returns means to log, and the indices.
    """
    phase = "reconstruction only" if adversary is None else adversary.schedule.phase(step)
    if adversary is not None and phase == "joint":
        adversary.schedule.advance()
    frozen = phase == "discriminator only"  # the tokenizer, whose codes must not follow the batch
    tokenizer: Any = getattr(model, "module", model)
    micro_batches = images.chunk(accumulate)
    model.train(not frozen)
    if not frozen:
        with autocast():
            tokenizer.quantizer.begin_step(tokenizer.encoder, micro_batches)
    values: Values = {}
    indices = []
    for micro_batch in micro_batches:
        with torch.set_grad_enabled(not frozen), autocast():
            reconstructions, quantized = model(micro_batch)
        reconstructions = reconstructions.float()
        logged = {"mse": F.mse_loss(reconstructions.detach(), micro_batch) / 4}  # as if in [0, 1]
        if not frozen:
            with autocast():
                terms = losses(reconstructions, micro_batch)
            reconstruction_loss = sum(terms.values())
            loss = reconstruction_loss + sum(quantized.losses.values())
            logged |= {f"{name}_loss": x for name, x in (terms | quantized.losses).items()}
            if adversary is not None and phase == "joint":
                last_layer = tokenizer.decoder.conv_out.weight
                pair = reconstructions, reconstruction_loss
                with autocast():
                    term, more = adversary.generator_term(*pair, last_layer)
                loss, logged = loss + term, logged | more
            (loss / accumulate * scale).backward()
        if adversary is not None and phase != "reconstruction only":
            with autocast():
                loss, more = adversary.discriminator_term(micro_batch, reconstructions)
            (loss / accumulate * scale).backward()
            logged |= more | {"disc_strength": torch.tensor(adversary.schedule.strength)}
        for name, value in logged.items():
            values[name] = values.get(name, 0.0) + value.detach() / accumulate
        indices.append(quantized.indices)
    if adversary is not None:
        adversary.average_gradients()
    model.train()
    tokenizer.quantizer.end_step()
    return values, torch.cat(indices)
