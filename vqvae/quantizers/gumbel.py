"""`gumbel`: the encoder scores all codes; training samples one of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqvae.quantizers import base
from vqvae.quantizers.base import Encode, Quantized, option
from vqvae.quantizers.codebook import CodebookOptions, CodebookQuantizer, nearest_codes


@dataclass(frozen=True)
class GumbelOptions(CodebookOptions):
    """Options of `gumbel`."""

    entropy_weight: float = base.entropy_weight(5e-4)
    temperature: float = option(
        1.0, "of the softmax whose gradient the logits get", min=1e-3, training_only=True
    )
    final_temperature: float = option(
        1.0, "temperature after temperature_steps", min=1e-3, training_only=True
    )
    temperature_steps: int = option(
        0, "steps of the exponential fall; 0: none", min=0, training_only=True
    )


class GumbelQuantizer(CodebookQuantizer):
    """Logits of all codes for each vector, in training with Gumbel noise (arXiv 1611.01144).

    The decoder gets one whole code. The gradient is that of the softmax of logits and noise
    (straight-through Gumbel-softmax, section 2.2). The entropy term is the divergence of the
    softmax from uniform, in nats (arXiv 2102.12092, section 2.1). Training computes N x K logits.

    A code is set to a vector c by the logit (|v|^2 - |v - c|^2) / e, where |v|^2 is the same for
    all codes and e is the mean squared distance of vectors from their codes. The noise depends on
    the step and the image's number in the global batch.
    """

    options: GumbelOptions
    spread: Tensor  # e
    step: Tensor
    Options = GumbelOptions
    uncompiled = (*CodebookQuantizer.uncompiled, "noise")

    def __init__(self, options: GumbelOptions) -> None:
        super().__init__(options)
        self.proj = nn.Linear(options.codebook_dim, options.codebook_size)
        self.register_buffer("spread", torch.tensor(1.0))
        self.register_buffer("step", torch.tensor(0))
        self.positions = 1  # of one image
        self.images_before = 0  # of this process in this step
        self.images_of_step = 0  # of a process; 0: those of one forward pass

    def assign(self, vectors: Tensor) -> Tensor:
        return nearest_codes(vectors, self.proj.weight, -self.proj.bias)

    def begin_step(self, encode: Encode, micro_batches: Sequence[Tensor]) -> None:
        self.images_of_step = sum(map(len, micro_batches))
        super().begin_step(encode, micro_batches)

    def end_step(self) -> None:
        super().end_step()
        self.images_before = self.images_of_step = 0
        self.step.add_(1)

    @torch.no_grad()
    def initialise(self, vectors: Tensor) -> None:
        super().initialise(vectors)
        errors = (vectors - self.codebook[nearest_codes(vectors, self.codebook)]).square()
        # Not 0 where there are more codes than vectors, of lengths which set the scale.
        lengths = vectors.square().sum(dim=1).mean()
        self.spread.copy_(base.all_reduce_mean(errors.sum(dim=1).mean() + 1e-4 * lengths))
        self.set_codes(torch.arange(len(self.codebook), device=vectors.device), 1 * self.codebook)

    @torch.no_grad()
    def set_codes(self, numbers: Tensor, vectors: Tensor) -> None:
        weight = 2 * vectors / self.spread
        bias = -vectors.square().sum(dim=1) / self.spread
        if len(numbers) < self.options.codebook_size:
            # Training changes the scale of logits: a new code is the likeliest at its own vector.
            bias = 1 + self.proj(vectors).amax(dim=1) - (weight * vectors).sum(dim=1)
        self.proj.weight[numbers], self.proj.bias[numbers] = weight, bias
        super().set_codes(numbers, vectors)

    def forward(self, z_e: Tensor) -> Quantized:
        self.positions = z_e[0, 0].numel()
        return super().forward(z_e)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if not torch.is_grad_enabled() and not self.training:
            indices = self.assign(vectors)  # without N x K logits
            return self.lookup(indices), indices, {}
        self.assign_and_record(vectors.detach())
        logits = self.proj(vectors)  # (N, K)
        noisy = logits + self.noise(logits) if self.training else logits
        indices = noisy.argmax(dim=1)
        soft = (noisy / self.current_temperature()).softmax(dim=1) @ self.codebook.detach()
        # The chosen code gets the decoder's gradient, the logits that of the soft code.
        z_q = self.lookup(indices) + (soft - soft.detach())
        divergence = math.log(self.options.codebook_size) - base.assignment_entropy(logits)[0]
        return z_q, indices, {"entropy": self.options.entropy_weight * divergence}

    def current_temperature(self) -> Tensor:
        """The temperature of this step, ()."""
        first, last = self.options.temperature, self.options.final_temperature
        progress = (self.step / max(1, self.options.temperature_steps)).clamp(max=1)
        return first * (last / first) ** progress

    def noise(self, logits: Tensor) -> Tensor:
        """Gumbel noise for logits (N, K) of the next images of this step."""
        images = len(logits) // self.positions
        first = base.process_rank() * (self.images_of_step or images) + self.images_before
        self.images_before += images
        generator = torch.Generator(logits.device)
        noise = torch.empty_like(logits)
        for number, rows in enumerate(noise.split(self.positions), start=first):
            rows.exponential_(generator=generator.manual_seed((int(self.step) << 24) + number))
        return -noise.log()
