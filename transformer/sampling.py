"""Logits to indices: the distribution that is drawn from, and the loop that draws."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transformer import noise
from transformer.gpt import GPT
from transformer.graph import make_step
from transformer.positions import Beyond
from transformer.prefix import unknown

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): logits = u + scale * (c - u).

    Attributes:
        scale: 1 for none; the logits c know the class and the condition, u neither.
        schedule: "constant", or how the scale rises from 1 at the first token to `scale` at the
            last: "linear" or "cosine".

    Raises:
        ValueError: a negative scale, or an unknown schedule.
    """

    scale: float = 1.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"guidance_scale must be 0 or more, got {self.scale}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"guidance_schedule must be one of {SCHEDULES}, got {self.schedule}")

    def at(self, token: int, tokens: int) -> float:
        """The scale for token number `token` of `tokens`."""
        progress = token / max(1, tokens - 1)
        if self.schedule == "constant":
            progress = 1.0
        elif self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + (self.scale - 1) * progress


def probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The distribution to draw from: first temperature, then top-k, top-p and min-p.

    Args:
        logits: (..., K).
        temperature: divides the logits; 0 leaves the most likely index alone.
        top_k: keep the k most likely indices; 0 keeps all.
        top_p: of these keep the most likely ones that reach this probability together
            (nucleus sampling, arXiv 1904.09751); the most likely one always stays.
        min_p: keep those that have at least this share of the most likely one's probability
            (arXiv 2407.01082); 0 keeps all.

    Returns:
        (..., K), float32, each summing to 1.

    Raises:
        ValueError: temperature < 0, top_k < 0, top_p outside (0, 1], or min_p outside [0, 1].
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1], got {min_p}")
    logits = logits.float()
    size = logits.shape[-1]
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), size).float()
    logits = logits / temperature
    if min_p:
        bar = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < bar, float("-inf"))
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
def draw_rows(
    model: GPT,
    prefix: Tensor,
    uniform: Callable[[int], Tensor],
    *,
    size: tuple[int, int] | None = None,
    beyond: Beyond = Beyond.SLIDE,
    guidance: Guidance = Guidance(),
    given: Tensor | None = None,
    keep: Tensor | None = None,
    compiled: bool = False,
    **shaping: float,
) -> Iterator[Tensor]:
    """Draw one batch of grids row by row; a window bounds the memory, however tall they are.

    Args:
        model: in eval mode.
        prefix: (B,) class of each image, or `model.config.no_class`, with a condition (B, p), see
            `make_prefix`; on the model's device.
        uniform: number of a token -> (B,) in [0, 1), what makes the choice; on the model's device.
        size: (h, w) of the grid; default: what the model was trained on.
        beyond: positions in a larger grid than that.
        guidance: two passes in one batch, with class and condition, and without.
        given: (B, h, w) or (1, h, w), indices that are taken over where `keep` says so; with a
            depth above 1 that is one more axis.
        keep: (h, w), bool.
        compiled: see `make_step`.
        shaping: of `probabilities`.

    Yields:
        (B, w) or (B, w, depth), int64, from the top row to the bottom row.
    """
    height, width = size or model.config.latent_dim
    depth = model.config.depth
    count = height * width * depth
    shape = (width,) if depth == 1 else (width, depth)
    guided = guidance.scale != 1
    tokens = torch.cat([prefix, unknown(prefix, model.config)]) if guided else prefix
    cache = model.make_cache(len(tokens), (height, width), beyond)
    step = make_step(model, cache, compiled=compiled)
    kept = [False] * (height * width) if keep is None else keep.flatten().tolist()
    row = []
    for token in range(count):
        position = token and model.config.prefix_length + token - 1  # at 0 the whole prefix
        logits = step(tokens, position)  # (B, K)
        if guided:
            informed, without = logits.chunk(2)
            logits = torch.lerp(without, informed, guidance.at(token, count))
        distribution = probabilities(logits, **shaping)
        if kept[token // depth]:
            tokens = given.flatten(1)[:, token].expand(len(prefix))
        else:
            tokens = draw(distribution, uniform(token))
        row.append(tokens)
        if len(row) == width * depth:
            yield torch.stack(row, dim=1).unflatten(1, shape)
            row = []
        tokens = tokens.repeat(2) if guided else tokens


@torch.no_grad()
def generate(
    model: GPT,
    prefix: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    size: tuple[int, int] | None = None,
    given: Tensor | None = None,
    out: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
    **options: object,
) -> Tensor:
    """Draw one grid of indices for each prefix.

    Args:
        model: in eval mode.
        prefix: (N,) class of each image, or `model.config.no_class`; with a condition (N, p), see
            `make_prefix`.
        seed: of all choices, which are a function of it, the image's number and the token.
        batch_size: images drawn at once.
        size: (h, w) of the grids; default: what the model was trained on.
        given: (N, h, w[, depth]), see `draw_rows`.
        out: (N, h, w[, depth]), any integer type, on the CPU, filled row by row: with a window the
            memory then does not depend on the height, if it lies on a disk.
        progress: called with the number of images after each batch.
        options: temperature, top_k, top_p and min_p of `probabilities`; beyond, guidance, keep
            and compiled of `draw_rows`.

    Returns:
        `out`; without it (N, h, w) or (N, h, w, depth), int64, on the CPU.
    """
    config = model.config
    size = size or config.latent_dim
    shape = size if config.depth == 1 else (*size, config.depth)
    device = model.head.weight.device
    out = torch.empty(len(prefix), *shape, dtype=torch.long) if out is None else out
    numbers = torch.arange(len(prefix), device=device)
    for start in range(0, len(prefix), batch_size):
        part = slice(start, start + batch_size)
        rows = draw_rows(
            model,
            prefix[part].to(device),
            partial(noise.uniform, seed, numbers[part]),
            size=size,
            given=None if given is None else given[part].to(device),
            **options,
        )
        for number, row in enumerate(rows):
            out[part, number] = row.to("cpu", out.dtype)
        if progress is not None:
            progress(len(prefix[part]))
    return out
