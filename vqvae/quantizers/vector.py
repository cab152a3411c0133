"""Vector quantizers: `vq`, `ema`, `cosine`, `ibq`, and `residual` with several codes a position."""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.quantizers import base
from vqvae.quantizers.base import Quantizer, all_reduce_sum, option, straight_through
from vqvae.quantizers.codebook import DECAY, CodebookOptions, CodebookQuantizer, nearest_codes


def rotation(z_e: Tensor, z_q: Tensor) -> Tensor:
    """z_q (N, D), bitwise, with the gradient of the rotation and scaling that maps z_e to it.

    The rotation trick (arXiv 2410.06424, section 4.2): z_q = s R z_e, where R rotates in the plane
    of both and s is the ratio of their lengths; s and R count as constants.
    """
    z_q = z_q.detach()
    before, after = F.normalize(z_e.detach(), dim=1), F.normalize(z_q, dim=1)
    middle = F.normalize(before + after, dim=1)
    scale = z_q.norm(dim=1, keepdim=True) / z_e.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    # R = I - 2 m m' + 2 a b', never written out as a matrix.
    along_middle = (middle * z_e).sum(dim=1, keepdim=True)
    along_before = (before * z_e).sum(dim=1, keepdim=True)
    rotated = z_e - 2 * middle * along_middle + 2 * after * along_before
    return straight_through(scale * rotated, z_q)


GRADIENTS = {"straight_through": straight_through, "rotation": rotation}


@dataclass(frozen=True)
class VQOptions(CodebookOptions):
    """Options of `vq`, `ema` and `cosine`."""

    commitment_cost: float = base.commitment_cost()
    gradient: str = option(
        "straight_through", "or the rotation trick", choices=tuple(GRADIENTS), training_only=True
    )


class VectorQuantizer(CodebookQuantizer):
    """The codebook of VQ-VAE, learned by gradient (arXiv 1711.00937, equation 3)."""

    options: VQOptions
    Options = VQOptions

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        indices = self.assign_and_record(vectors.detach())
        vectors, codes = self.project(vectors), self.lookup(indices)
        z_q = GRADIENTS[self.options.gradient](vectors, codes)
        return z_q, indices, self.losses(vectors, codes)

    def losses(self, vectors: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Losses of projected vectors and their codes, (N, D) each."""
        return {
            "codebook": F.mse_loss(codes, vectors.detach()),
            # beta belongs to this term, which moves the encoder (equation 3).
            "commitment": self.options.commitment_cost * F.mse_loss(vectors, codes.detach()),
            **self.entropy_term(vectors),
        }


class EMAQuantizer(VectorQuantizer):
    """Codes are moving averages of their vectors (arXiv 1711.00937, appendix A.1)."""

    counts: Tensor  # (K,)
    sums: Tensor  # (K, D)
    MIN_COUNT = 1e-5  # vectors; below, a moving average has no information left

    def __init__(self, options: VQOptions) -> None:
        super().__init__(options)
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("counts", torch.ones(options.codebook_size))
        self.register_buffer("sums", self.embedding.weight.detach().clone())

    def losses(self, vectors: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {k: v for k, v in super().losses(vectors, codes).items() if k != "codebook"}

    def learn(self, vectors: Tensor, indices: Tensor) -> None:
        counts = torch.bincount(indices, minlength=len(self.counts)).to(self.counts)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors)
        self.counts.lerp_(all_reduce_sum(counts), 1 - DECAY)
        self.sums.lerp_(all_reduce_sum(sums), 1 - DECAY)
        # An unused code stays where it is, while both of its averages decay.
        alive = self.counts > self.MIN_COUNT
        self.embedding.weight[alive] = self.sums[alive] / self.counts[alive, None]
        super().learn(vectors, indices)

    @torch.no_grad()
    def set_codes(self, numbers: Tensor, vectors: Tensor) -> None:
        super().set_codes(numbers, vectors)
        self.sums[numbers] = vectors
        self.counts[numbers] = 1.0


class CosineQuantizer(VectorQuantizer):
    """Codes and encodings on the unit sphere, compared by angle (arXiv 2110.04627, section 3.2)."""

    def project(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)


@dataclass(frozen=True)
class IBQOptions(CodebookOptions):
    """Options of `ibq`."""

    commitment_cost: float = base.commitment_cost()
    entropy_weight: float = base.entropy_weight(None)
    similarity: str = option(
        "distance", "of codes; the paper has inner_product", choices=("distance", "inner_product")
    )
    softmax_temperature: float = option(
        0.2, "of the softmax that passes gradients to all codes", min=1e-3, training_only=True
    )

    def __post_init__(self) -> None:
        if self.entropy_weight is None:  # longer codes win more inner products without this term
            self.derive(entropy_weight=0.2 if self.similarity == "inner_product" else 0.0)
        super().__post_init__()


class IndexBackpropagationQuantizer(CodebookQuantizer):
    """Index backpropagation (arXiv 2412.02692, section 3.2): argmax forward, softmax backward.

    All codes get a gradient in every step, from N x K logits: -|z - c|^2, in units of a vector's
    mean squared distance to the codes, or inner products, as in the paper.
    """

    options: IBQOptions
    Options = IBQOptions
    ENTROPY_TEMPERATURE = 0.01  # section 4.1 of the paper

    def assign(self, vectors: Tensor) -> Tensor:
        if self.options.similarity == "distance":
            return super().assign(vectors)
        codebook = self.codebook
        return nearest_codes(vectors, codebook, codebook.new_zeros(len(codebook)))

    def logits(self, vectors: Tensor) -> Tensor:
        """Vectors (N, D) -> logits of all codes (N, K)."""
        products = vectors @ self.codebook.T
        if self.options.similarity == "inner_product":
            return products
        lengths = vectors.square().sum(dim=1, keepdim=True) + self.codebook.square().sum(dim=1)
        distances = (lengths - 2 * products).clamp_min(0)
        mean = distances.detach().mean(dim=1, keepdim=True)
        return -distances / mean.clamp_min(1e-12)

    def entropy_logits(self, vectors: Tensor) -> list[Tensor]:
        return [self.logits(vectors) / self.ENTROPY_TEMPERATURE]

    @torch.no_grad()
    def set_codes(self, numbers: Tensor, vectors: Tensor) -> None:
        if self.options.similarity == "inner_product":
            # With codes of one length, a vector's own direction has the largest inner product.
            everything = len(numbers) == self.options.codebook_size
            lengths = (vectors if everything else self.codebook).norm(dim=1)
            vectors = F.normalize(vectors, dim=1) * lengths.mean()
        super().set_codes(numbers, vectors)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        indices = self.assign_and_record(vectors.detach())
        z_q = codes = self.lookup(indices)
        learns = torch.is_grad_enabled()  # otherwise the N x K logits are not needed
        if learns:
            logits = self.logits(vectors) / self.options.softmax_temperature
            soft = logits.softmax(dim=1) @ self.codebook.detach()
            z_q = codes + (soft - soft.detach())  # one-hot + softmax - its value, times the codes
        losses = {
            # Double quantization loss (equation 5): also through the indices. Beta weights the
            # encoder's term, as everywhere here.
            "codebook": F.mse_loss(z_q, vectors),
            "commitment": self.options.commitment_cost * F.mse_loss(vectors, codes.detach()),
        }
        return z_q, indices, losses | (self.entropy_term(vectors) if learns else {})


@dataclass(frozen=True)
class ResidualOptions(VQOptions):
    """Options of `residual`: those of `ema`, for the codebook of each depth, and their number."""

    depth: int = option(4, "codes per latent position")


class ResidualQuantizer(Quantizer):
    """A stack of `depth` EMA codebooks (arXiv 2107.03312, section III.C; arXiv 2203.01941).

    Its indices have an axis of length depth, coarse first; z_q is the sum of the codes.
    """

    options: ResidualOptions
    Options = ResidualOptions
    supports_reset = True

    def __init__(self, options: ResidualOptions) -> None:
        super().__init__(options)
        one = VQOptions(**{field.name: getattr(options, field.name) for field in fields(VQOptions)})
        self.layers: Any = nn.ModuleList(EMAQuantizer(one) for _ in range(options.depth))

    def assign(self, vectors: Tensor) -> Tensor:
        indices = []
        for layer in self.layers:
            indices.append(layer.assign(vectors))
            vectors = vectors - layer.lookup(indices[-1])
        return torch.stack(indices, dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        codes = [layer.lookup(indices[:, depth]) for depth, layer in enumerate(self.layers)]
        return sum(codes[1:], start=codes[0])

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        residual, chosen = vectors, []
        losses: dict[str, Tensor] = {}
        for layer in self.layers:
            _, indices, terms = layer.quantize(residual)
            chosen.append(indices)
            # Each depth moves the encoder towards the sum of codes so far, a constant.
            residual = residual - layer.lookup(indices).detach()
            losses = {name: losses.get(name, 0) + term for name, term in terms.items()}
        indices = torch.stack(chosen, dim=1)
        z_q = GRADIENTS[self.options.gradient](vectors, self.lookup(indices))
        return z_q, indices, losses

    def needs_batch(self) -> bool:
        return any(layer.needs_batch() for layer in self.layers)

    def observe(self, micro_batches: list[Tensor]) -> None:
        for layer in self.layers:
            layer.observe(micro_batches)
            micro_batches = [x - layer.lookup(layer.assign(x)) for x in micro_batches]

    def end_step(self) -> None:
        for layer in self.layers:
            layer.end_step()

    def reset_codebook(self) -> None:
        for layer in self.layers:
            layer.reset_codebook()

    def codes(self, numbers: Tensor) -> Tensor:
        # Those of the first depth come before those of the second, and so on.
        return torch.cat([layer.codebook for layer in self.layers])[numbers]
