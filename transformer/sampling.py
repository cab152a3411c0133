"""Logits to indices: the distribution that is drawn from, and the loop that draws."""

from collections.abc import Callable

import torch
from torch import Tensor

from transformer.gpt import GPT


def probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """The distribution to draw from: first temperature, then top-k, then top-p.

    Args:
        logits: (..., K).
        temperature: divides the logits; 0 leaves the most likely index alone.
        top_k: keep the k most likely indices; 0 keeps all.
        top_p: of these keep the most likely ones that reach this probability together
            (nucleus sampling, arXiv 1904.09751); the most likely one always stays.

    Returns:
        (..., K), float32, each summing to 1.

    Raises:
        ValueError: temperature < 0, top_k < 0, or top_p outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    logits = logits.float()
    size = logits.shape[-1]
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), size).float()
    logits = logits / temperature
    if (top_k == 0 or top_k >= size) and top_p == 1:
        return logits.softmax(dim=-1)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[..., top_k:] = float("-inf")
    ordered = ordered.softmax(dim=-1)
    before = ordered.cumsum(dim=-1) - ordered  # probability of all more likely indices
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    kept = torch.zeros_like(ordered).scatter(-1, order, ordered)
    return kept / kept.sum(dim=-1, keepdim=True)


def draw(distribution: Tensor, uniform: Tensor) -> Tensor:
    """One index from each distribution, by the inverse of its cumulative distribution.

    An image's indices follow from its own uniform numbers, whatever else is in the batch.

    Args:
        distribution: (B, K), each line summing to 1; indices of probability 0 are never drawn.
        uniform: (B,) in [0, 1).

    Returns:
        (B,), int64.
    """
    cumulative = distribution.cumsum(dim=-1)
    # Rounding may leave the total a little off 1: the number is scaled, and kept below it.
    target = torch.minimum(
        uniform.to(cumulative) * cumulative[:, -1],
        torch.nextafter(cumulative[:, -1], torch.zeros_like(uniform).to(cumulative)),
    )
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


@torch.no_grad()
def generate(
    model: GPT,
    prefix: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw one grid of indices for each prefix.

    Args:
        model: in eval mode.
        prefix: (N,) class of each image, or `model.config.no_class`.
        temperature, top_k, top_p: see `probabilities`.
        seed: of the N x h*w uniform numbers that make all choices; the batch size makes none.
        batch_size: images drawn at once.
        progress: called with the number of images after each batch.

    Returns:
        (N, h, w), int64, on the CPU.
    """
    height, width = model.config.latent_dim
    uniforms = torch.rand(
        len(prefix), height * width, generator=torch.Generator().manual_seed(seed)
    )
    device = model.head.weight.device
    grids = []
    for tokens, uniform in zip(
        prefix.split(batch_size), uniforms.to(device).split(batch_size), strict=True
    ):
        tokens = tokens.to(device)
        cache = model.make_cache(len(tokens))
        drawn = []
        for position in range(height * width):
            logits = model.step(tokens, position, cache)  # (B, K)
            distribution = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            tokens = draw(distribution, uniform[:, position])
            drawn.append(tokens)
        grids.append(torch.stack(drawn, dim=1).view(-1, height, width).cpu())
        if progress is not None:
            progress(len(tokens))
    return torch.cat(grids)
