"""`gumbel`: the encoder scores all codes; training samples one of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqvae.quantizers.base import Quantizer, entropy, entropy_weight
from vqvae.quantizers.codebook import (
    CodebookOptions,
    nearest_codes,
    next_generator,
    update_usage,
)


@dataclass(frozen=True)
class GumbelOptions(CodebookOptions):
    """Options of `gumbel`."""

    entropy_weight: float = entropy_weight(5e-4)


class GumbelQuantizer(Quantizer):
    """Logits of all codes for each vector, in training with Gumbel noise (arXiv 1611.01144).

    The decoder always gets one whole code. The gradient is that of the softmax of logits and noise
    (straight-through Gumbel-softmax, section 2.2). The entropy term is the divergence of the
    softmax from uniform, in nats, which keeps codes in use (arXiv 2102.12092, section 2.1).
    Training computes N x K logits: for codebooks of moderate size.

    Codes and encodings are in different spaces, so the codes cannot be initialised from data. A
    dead code, which rarely has the highest logit, splits a frequent one: both get its code and its
    logits minus the logarithm of their number, which does not change the expected output.
    """

    options: GumbelOptions
    usage_ema: Tensor  # (K,)
    rng_offset: Tensor
    Options = GumbelOptions
    usage_hint = "use a higher entropy_weight, or a smaller codebook_size or learning_rate"
    uncompiled = ("_split_codes",)
    TEMPERATURE = 1.0

    def __init__(self, options: GumbelOptions) -> None:
        super().__init__(options)
        size, dim = options.codebook_size, options.codebook_dim
        self.proj = nn.Linear(dim, size)
        self.embedding = nn.Embedding(size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.register_buffer("usage_ema", torch.full((size,), 1 / size))
        self.register_buffer("rng_offset", torch.tensor(0))

    def assign(self, vectors: Tensor) -> Tensor:
        return nearest_codes(vectors, self.proj.weight, -self.proj.bias)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.embedding.weight[indices]

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if not torch.is_grad_enabled() and not self.training:
            indices = self.assign(vectors)  # without N x K logits
            return self.lookup(indices), indices, {}
        if self.training and self.options.dead_code_threshold > 0:
            self._split_codes(vectors.detach())
        logits = self.proj(vectors)  # (N, K)
        noisy = logits
        if self.training:
            noisy = logits - torch.empty_like(logits).exponential_().log()
        indices = noisy.argmax(dim=1)
        soft = (noisy / self.TEMPERATURE).softmax(dim=1) @ self.embedding.weight.detach()
        # The chosen code gets the decoder's gradient, the logits that of the soft code.
        z_q = self.lookup(indices) + (soft - soft.detach())
        uncertainty, _ = entropy(logits)
        divergence = math.log(self.options.codebook_size) - uncertainty
        return z_q, indices, {"entropy": self.options.entropy_weight * divergence}

    @torch.no_grad()
    def _split_codes(self, vectors: Tensor) -> None:
        """Update the usage by vectors (N, D), and let dead codes split frequent ones."""
        threshold = self.options.dead_code_threshold
        dead = update_usage(self.usage_ema, self.assign(vectors), threshold)
        if len(dead) == 0:
            return
        weights = self.usage_ema.index_fill(0, dead, 0.0).cpu().double() + 1e-12
        generator = next_generator(self.rng_offset)
        sampled = torch.multinomial(weights, len(dead), replacement=True, generator=generator)
        parents = sampled.to(dead.device)
        copies = torch.bincount(parents, minlength=len(self.usage_ema)) + 1.0
        self.proj.bias.sub_(copies.log())
        self.usage_ema.div_(copies)
        for values in (self.proj.weight, self.proj.bias, self.embedding.weight, self.usage_ema):
            values[dead] = values[parents]
