"""Learned codebooks: lookup, k-means initialisation, usage, dead-code reset, collapse."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqvae.quantizers import base
from vqvae.quantizers.base import Quantizer, QuantizerOptions, all_gather, all_reduce_sum, option

# The lookup computes at most this many distances at once (64 MiB in float32).
CHUNK = 1 << 24
KMEANS_STEPS = 10
MAX_PASSES = 1024  # forward passes in one step
DECAY = 0.99  # of moving averages over batches
ENTROPY_TEMPERATURE = 0.01  # of soft assignments, relative to the codes' mean squared length


@cache
def _has_fused_lookup(device: torch.device) -> bool:
    """Whether a device has TF32 matrix units, and Triton is there to use them."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def nearest_codes(vectors: Tensor, codebook: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Codebook lookup: argmin over k of offsets[k] - v . codebook[k] for each v of `vectors`.

    Vectors (N, D), codebook (K, D), offsets (K,), by default half the squared length of each code,
    which finds the nearest: |v - c|^2 = |v|^2 - 2 v.c + |c|^2, where |v|^2 is the same for all
    codes. Memory does not grow with N x K. Ties go to the lowest index. On CUDA, float32 vectors
    take one kernel, whose scores may differ from these in the last bits.
    """
    if offsets is None:
        offsets = codebook.square().sum(dim=1) / 2
    if vectors.dtype == torch.float32 and _has_fused_lookup(vectors.device):
        from vqvae.quantizers.fused_lookup import fused_nearest_codes

        return fused_nearest_codes(vectors, codebook, offsets)
    chunks = vectors.split(max(1, CHUNK // len(codebook)))
    return torch.cat([torch.addmm(offsets, x, codebook.T, alpha=-1).argmin(dim=1) for x in chunks])


@dataclass(frozen=True)
class CodebookOptions(QuantizerOptions):
    """Options of quantizers whose codes are learned."""

    entropy_weight: float = base.entropy_weight(0.0)
    dead_code_threshold: float = option(
        0.03, "reset codes used less than this share of 1/K; 0: never", training_only=True
    )


class CodebookQuantizer(Quantizer):
    """A learned codebook (K, D) that is initialised from data and whose dead codes are reset.

    The codes start as the k-means centres of the first training batch. A code whose usage (a
    moving average) falls below `dead_code_threshold / codebook_size` is dead: at the end of the
    step it is reset to a vector of the batch, sampled by its squared error.
    """

    options: CodebookOptions
    usage_ema: Tensor  # (K,)
    initialised: Tensor
    rng_offset: Tensor
    Options = CodebookOptions
    supports_reset = True
    uncompiled: ClassVar[tuple[str, ...]] = ("batch_mean", "assign_and_record")

    def __init__(self, options: CodebookOptions) -> None:
        super().__init__(options)
        size, dim = options.codebook_size, options.codebook_dim
        self.embedding = nn.Embedding(size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.register_buffer("usage_ema", torch.full((size,), 1 / size))
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("rng_offset", torch.tensor(0))
        self.recorded: list[tuple[Tensor, Tensor]] = []  # vectors and indices of this step

    def project(self, vectors: Tensor) -> Tensor:
        """Vectors (..., D) in the space in which they are compared; here unchanged."""
        return vectors

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D) as they are compared and decoded."""
        return self.project(self.embedding.weight)

    def assign(self, vectors: Tensor) -> Tensor:
        return nearest_codes(self.project(vectors), self.codebook)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook[indices]

    def entropy_logits(self, vectors: Tensor) -> list[Tensor]:
        # Codes of a deeper residual layer are all 0 where the layer before it leaves no residual.
        norm = self.codebook.detach().square().sum(dim=1).mean()
        scale = 2 / (ENTROPY_TEMPERATURE * norm).clamp_min(1e-12)
        # The vectors' own squared length is the same for all codes and drops out of the softmax.
        half_norms = self.codebook.square().sum(dim=1) / 2
        return [(self.project(vectors) @ self.codebook.T - half_norms) * scale]

    def needs_batch(self) -> bool:
        return super().needs_batch() or not self.initialised

    def observe(self, micro_batches: list[Tensor]) -> None:
        if not self.initialised:
            self.initialise(torch.cat(micro_batches))
        super().observe(micro_batches)

    def next_generator(self) -> torch.Generator:
        """A generator seeded with the number of earlier calls, so the same in all processes."""
        generator = torch.Generator().manual_seed(int(self.rng_offset))
        self.rng_offset.add_(1)
        return generator

    @torch.no_grad()
    def initialise(self, vectors: Tensor) -> None:
        """Set the codes to the k-means centres of the vectors (N, D) of all processes."""
        size, vectors = self.options.codebook_size, all_gather(self.project(vectors))
        order = torch.randperm(max(len(vectors), size), generator=self.next_generator())
        centres = vectors[order[:size].to(vectors.device) % len(vectors)].clone()
        for _ in range(KMEANS_STEPS):
            nearest = nearest_codes(vectors, centres)
            counts = torch.bincount(nearest, minlength=size)
            sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
            occupied = counts > 0  # an unassigned centre stays where it is
            centres[occupied] = self.project(sums[occupied] / counts[occupied, None])
        self.set_codes(torch.arange(size, device=vectors.device), centres)
        self.initialised.fill_(True)

    @torch.no_grad()
    def assign_and_record(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> indices (N,); in training mode `end_step` will learn from them."""
        if self.training and not self.initialised:
            self.initialise(vectors)
        indices = self.assign(vectors)
        if self.training:
            if len(self.recorded) > MAX_PASSES:
                raise RuntimeError("call end_step() of the quantizer after each optimiser step")
            self.recorded.append((self.project(vectors), indices))
        return indices

    @torch.no_grad()
    def end_step(self) -> None:
        super().end_step()
        if self.recorded:
            vectors, indices = (torch.cat(part) for part in zip(*self.recorded, strict=True))
            self.recorded.clear()
            self.learn(vectors, indices)

    def learn(self, vectors: Tensor, indices: Tensor) -> None:
        """Update the codes' usage, and reset dead ones, by this process's vectors of a step."""
        counts = torch.bincount(indices, minlength=len(self.usage_ema)).to(self.usage_ema)
        counts = all_reduce_sum(counts)
        self.usage_ema.lerp_(counts / counts.sum(), 1 - DECAY)
        threshold = self.options.dead_code_threshold / self.options.codebook_size
        dead = (self.usage_ema < threshold).nonzero().flatten()
        if len(dead) > 0:
            # As k-means++ samples its centres, also from a batch that is not finite.
            errors = all_gather((vectors - self.lookup(indices)).square().sum(dim=1))
            weights = errors.cpu().double().nan_to_num(0, 0) + 1e-12
            generator = self.next_generator()
            rows = torch.multinomial(weights, len(dead), replacement=True, generator=generator)
            self.set_codes(dead, all_gather(vectors)[rows.to(vectors.device)])
            self.usage_ema[dead] = 1 / self.options.codebook_size

    @torch.no_grad()
    def set_codes(self, numbers: Tensor, vectors: Tensor) -> None:
        """Set the codes of the given numbers (n,) to vectors (n, D)."""
        self.embedding.weight[numbers] = vectors

    def reset_codebook(self) -> None:
        self.initialised.fill_(False)
        self.usage_ema.fill_(1 / self.options.codebook_size)


class CollapseMonitor(nn.Module):
    """Warns of evaluations that find few codes in use, and may reset the codebook."""

    LOW_USAGE = 20.0  # percent
    INDICES_PER_CODE = 4  # fewer do not suffice to measure the usage
    MAX_RESETS = 3
    num_resets: Tensor

    def __init__(self, *, reset: bool) -> None:
        super().__init__()
        self.reset = reset
        self.register_buffer("num_resets", torch.tensor(0))

    def check(self, quantizer: Quantizer, counts: Tensor, *, final: bool) -> list[str]:
        """Lines to print, given how often each code was used; `final`: the training ends here."""
        usage = 100 * float((counts > 0).float().mean())
        if usage >= self.LOW_USAGE or counts.sum() < self.INDICES_PER_CODE * len(counts):
            return []
        lines = [
            f"warning: only {usage:.1f} % of the codes are in use, so the images will lack detail; "
            f"{quantizer.usage_hint}"
        ]
        if self.reset and not final and self.num_resets < self.MAX_RESETS:
            quantizer.reset_codebook()
            self.num_resets += 1
            lines.append(
                f"codebook reset {self.num_resets} of {self.MAX_RESETS}: all codes are "
                "reinitialised from the next batch"
            )
        return lines
