"""Sampling: logit filters, random numbers, the loop over tokens, completion of grids."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.attention import CUDAGraphCapture, Function, KVCache, Outputs
from transformer.config import Guidance, null_prefix, option
from transformer.gpt import GPT
from transformer.rope import PositionExtension

# To divide by less than this is to divide by zero, in float32.
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
# SplitMix64: 2^64 over the golden ratio, the shifts, and the factors, as signed numbers.
GOLDEN_RATIO = 0x9E3779B97F4A7C15 - (1 << 64)
SHIFTS = (30, 27, 31)
FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64), 1)
CACHE_PARTS = 4  # one graph for each number of parts that are written


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Guidance):
    """Guidance, and how the distribution is filtered before sampling, in this order.

    top_p is nucleus sampling (arXiv 1904.09751), min_p is arXiv 2407.01082, typical_p is locally
    typical sampling (arXiv 2202.00666). All but the last always keep the most likely index.
    """

    temperature: float = option(
        1.0, "below 1: safer, less varied samples; 0: the most likely", min=0, below=math.inf
    )
    top_k: int = option(0, "sample from the k most likely indices; 0: from all", min=0)
    top_p: float = option(
        1.0,
        "nucleus sampling: the most likely indices whose probabilities sum to p",
        above=0,
        max=1,
    )
    min_p: float = option(
        0.0, "sample from indices with this fraction of the highest probability", min=0, max=1
    )
    typical_p: float = option(
        1.0,
        "typical sampling: the indices nearest to the expected information whose probabilities "
        "sum to p",
        above=0,
        max=1,
    )


def probabilities(logits: Tensor, params: SamplingParams = SamplingParams()) -> Tensor:
    """Logits (..., K) -> the distributions to sample from, (..., K), float32."""
    logits, size = logits.float(), logits.shape[-1]
    if params.temperature < SMALLEST_TEMPERATURE:
        return F.one_hot(logits.argmax(dim=-1), size).float()
    # The most likely one at 0, so that no temperature takes it out of range.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    if 0 < params.top_k < size:
        ordered, order = logits.topk(params.top_k, dim=-1)
    elif params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    else:
        distribution = _apply_min_p(logits.softmax(dim=-1), params.min_p)
        return _apply_typical_p(distribution, params.typical_p)
    ordered = _first(ordered.softmax(dim=-1), params.top_p)
    ordered = _apply_min_p(ordered, params.min_p)
    distribution = torch.zeros_like(logits).scatter(-1, order, ordered)
    return _apply_typical_p(distribution, params.typical_p)


def _first(ordered: Tensor, mass: float) -> Tensor:
    """The first probabilities (..., K) that sum to `mass`; 0 instead of the others."""
    if mass == 1:
        return ordered
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= mass, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def _apply_typical_p(distribution: Tensor, mass: float) -> Tensor:
    if mass == 1:
        return distribution
    information = -distribution.clamp(min=SMALLEST_TEMPERATURE).log()
    entropy = (distribution * information).sum(dim=-1, keepdim=True)
    order = (information - entropy).abs().argsort(dim=-1, stable=True)
    kept = _first(distribution.gather(-1, order), mass)
    return torch.zeros_like(distribution).scatter(-1, order, kept)


def _apply_min_p(distribution: Tensor, min_p: float) -> Tensor:
    if min_p == 0:
        return distribution
    bar = distribution.amax(dim=-1, keepdim=True) * min_p
    kept = distribution.masked_fill(distribution < bar, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def sample_from_probs(distribution: Tensor, uniform: Tensor) -> Tensor:
    """One index (B,) from each distribution (B, K), by inversion of its cumulative distribution.

    Indices of probability 0 are never sampled. `uniform` (B,) is in [0, 1).
    """
    cumulative = distribution.cumsum(dim=-1)
    # Rounding may leave the total a little off 1: the number is scaled, and kept below it.
    total = cumulative[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform.to(total) * total, below)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def random_keys(seed: int, images: Tensor) -> Tensor:
    """One key of the random numbers for each number of an image (B,), int64; any seed."""
    signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    return _mix(images * GOLDEN_RATIO + signed)


def uniform(keys: Tensor, token: Tensor | int) -> Tensor:
    """A number in [0, 1), float32, for each key (B,) and the number of a token, (1,) or (B,).

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a hash of seed, image and token, so that a
    sample depends on nothing else: not on the batch, nor on the tokens before.
    """
    steps = (torch.as_tensor(token, device=keys.device) + 1) * GOLDEN_RATIO  # modulo 2^64
    return _shifted(_mix(keys + steps), 40).float() / (1 << 24)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in zip(SHIFTS, FACTORS, strict=True):
        x = (x ^ _shifted(x, shift)) * factor
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; that of signed numbers is arithmetic."""
    return x >> bits & (1 << 64 - bits) - 1


def next_logits(model: GPT, cache: KVCache, tokens: Tensor, token: Tensor, depth: int) -> Tensor:
    """Logits (B, K) of the token with raster number `token`, (1,), after `tokens` (B, 1).

    All that differs between steps is in tensors. The cache is prepared for `tokens`.
    """
    hidden = model(tokens, cache.grid.at(token - 1), cache=cache)[:, -1]
    return model.head(hidden, depth=depth)


class DecodeStep:
    """Samples batches of `batch_size` grids token by token, with one cache for all batches.

    With guidance a batch is doubled: conditional grids, then unconditional ones. With a `guide`, a
    weaker GPT of the same indices and classes, the latter are its conditional ones.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        *,
        size: tuple[int, int],
        position_extension: PositionExtension = PositionExtension.SLIDE,
        params: SamplingParams | None = None,
        guide: GPT | None = None,
        compiled: bool = False,
    ) -> None:
        """Allocate the caches, and the tensors that captured graphs read, `compiled` on a GPU."""
        self.model, self.batch_size, self.params = model, batch_size, params or SamplingParams()
        guided = self.params.guidance_scale != 1
        self.copies = 1 + (guided and guide is None)  # of the batch, for the model
        self.cache = model.make_cache(batch_size * self.copies, size, position_extension)
        self.passes = [(model, self.cache)]
        if guided and guide is not None:
            model.config.check_guide(guide.config)
            self.passes.append((guide, guide.make_cache(batch_size, size, position_extension)))
        device = self.cache.device
        self.capture: Callable[[Function], Function] | None = None  # every step runs eagerly
        self.forward: Callable[..., Tensor] = next_logits
        if compiled and device.type == "cuda":
            self.capture, self.forward = CUDAGraphCapture(), torch.compile(next_logits)
        self._graphs: dict[tuple[int, ...], Function] = {}  # by slots and depth
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self._token = torch.zeros(1, dtype=torch.long, device=device)
        self._keys = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._scale = torch.ones((), device=device) if guided else None

    def begin(self, prefix: Tensor, keys: Tensor, known: Tensor) -> Outputs:
        """Begin a batch and sample its first token, or the one after whole known rows (B, n).

        Returns:
            logits: (B, K), conditional, float32.
            sampled: (B,), int64.
        """
        self._keys.copy_(keys)
        self._set_token(known.shape[1])
        positions = self.cache.grid.at(torch.arange(known.shape[1], device=keys.device))
        if self.copies == 2:
            prefix = torch.cat([prefix, null_prefix(prefix, self.model.config)])
            known = torch.cat([known, known])
        logits = []
        for model, cache in self.passes:
            cache.reset()
            hidden = model(known, positions, prefix=prefix, cache=cache)[:, -1]
            logits.append(model.head(hidden, depth=0))
        return self._sample(torch.cat(logits))

    def __call__(self, tokens: Tensor, token: int) -> Outputs:
        """Sample the token with raster number `token` after `tokens` (B,), the one before it."""
        self._tokens.copy_(tokens[:, None])
        self._set_token(token)
        depth = token % self.model.config.depth
        parts = None if self.capture is None else CACHE_PARTS
        key = (*(cache.prepare(token - 1, parts) for _, cache in self.passes), depth)
        if self.capture is None:
            return self._decode(depth)
        if key not in self._graphs:
            self._graphs[key] = self.capture(partial(self._decode, depth))
        return self._graphs[key]()

    def _set_token(self, token: int) -> None:
        self._token.fill_(token)
        if self._scale is not None:
            self._scale.fill_(self.params.scale_at(token, self.cache.grid.num_tokens))

    def _decode(self, depth: int) -> Outputs:
        tokens = self._tokens.repeat(self.copies, 1)
        logits = [self.forward(*one, tokens, self._token, depth) for one in self.passes]
        return self._sample(torch.cat(logits))

    def _sample(self, logits: Tensor) -> Outputs:
        """Logits (B, K), or with the unconditional ones (2B, K), -> the results of `begin`."""
        logits = logits.float()
        cond, uncond = logits[: self.batch_size], logits[self.batch_size :]
        logits = cond if self._scale is None else torch.lerp(uncond, cond, self._scale)
        distribution = probabilities(logits, self.params)
        return cond, sample_from_probs(distribution, uniform(self._keys, self._token))


@torch.no_grad()
def generate_rows(
    step: DecodeStep,
    prefix: Tensor,
    keys: Tensor,
    *,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    scores: Tensor | None = None,
) -> Iterator[Tensor]:
    """Sample one batch of grids row by row; a window bounds the memory for any height.

    Args are those of `generate`, on the model's device, and the `random_keys` of the images.

    Yields:
        (B, w) or (B, w, depth), int64, from the top row to the bottom row.
    """
    (height, width), config = step.cache.grid.size, step.model.config
    is_known = [False] * (height * width)
    if known_mask is not None:
        is_known = known_mask.flatten().tolist()
    start = [*is_known, False].index(False)  # the first one that is sampled
    # Known rows at the top are one prefill; in other grids the prefix moves with the row.
    top = start // width if (height, width) == config.latent_dim else 0
    row_length, before = width * config.depth, keys.new_zeros(len(keys), 0)
    row = keys.new_empty(len(keys), *config.grid_shape((1, width))[1:])
    if known is not None:
        yield from known[:, :top].long().unbind(dim=1)
        known = known.flatten(1).long()
        before = known[:, : top * row_length]
    for token in range(top * row_length, height * row_length):
        if token == top * row_length:
            logits, tokens = step.begin(prefix, keys, before)
        else:
            logits, tokens = step(tokens, token)
        counted = known is None
        if known is not None and is_known[token // config.depth]:
            tokens, counted = known[:, token], token // config.depth > start
        if scores is not None and counted:
            scores += logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        row.view(len(row), -1)[:, token % row_length] = tokens
        if (token + 1) % row_length == 0:
            yield row.clone()


@torch.no_grad()
def generate(
    model: GPT,
    prefix: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    size: tuple[int, int] | None = None,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    out: Tensor | None = None,
    scores: Tensor | None = None,
    progress: Callable[[int], object] = lambda count: None,
    **options: Any,
) -> Tensor:
    """Sample one grid of indices for each prefix, a function of seed, image and token alone.

    Args:
        model: in eval mode.
        prefix: (N,) or with a condition (N, P), see `make_prefix`.
        seed: of all random numbers.
        batch_size: images sampled at once.
        size: (h, w) of the grids; default: the trained size.
        known: (N, h, w[, depth]), kept where `known_mask`, (h, w), is True.
        out: (N, h, w[, depth]), any integer type, on the CPU, filled row by row and returned; a
            memory map bounds the memory for any height. Default: a new one, int64.
        scores: (N,), float32, on the CPU, for the log-probabilities of the known tokens behind a
            sampled one, or without `known` of all tokens; without guidance and filters.
        progress: called with the number of images after each batch.
        options: of `DecodeStep`.
    """
    size, device = size or model.config.latent_dim, model.head.weight.device
    if out is None:
        out = torch.empty(len(prefix), *model.config.grid_shape(size), dtype=torch.long)
    keys = random_keys(seed, torch.arange(len(prefix), device=device))
    step: DecodeStep | None = None
    for batch in torch.arange(len(prefix)).split(batch_size):
        if step is None or step.batch_size != len(batch):
            step = None  # first, so that there are never two caches
            step = DecodeStep(model, len(batch), size=size, **options)
        sums = torch.zeros(len(batch), device=device)
        rows = generate_rows(
            *(step, prefix[batch].to(device), keys[batch.to(device)]),
            known=None if known is None else known[batch].to(device),
            known_mask=known_mask,
            scores=None if scores is None else sums,
        )
        for number, row in enumerate(rows):
            out[batch, number] = row.to("cpu", out.dtype)
        if scores is not None:
            scores[batch] = sums.cpu()
        progress(len(batch))
    return out


def likeliest(scores: Tensor, groups: Tensor, candidates: int) -> Tensor:
    """Numbers (N,) of the best of N * candidates samples, for the images of `groups` (N,).

    Samples i * candidates, ... are those of image i. The images of a group share their samples: of
    those, as many are kept as it has images, the ones with the highest scores.
    """
    order = scores.argsort(descending=True, stable=True)
    shared = groups.repeat_interleave(candidates)[order]
    order, shared = order[shared.argsort(stable=True)], shared.sort(stable=True).values
    counts = groups.bincount()
    first = (counts.cumsum(dim=0) - counts) * candidates
    rank = torch.arange(len(order)) - first[shared]
    chosen = torch.empty_like(groups)
    chosen[groups.argsort(stable=True)] = order[rank < counts[shared]]
    return chosen


def generate_likeliest(model: GPT, prefix: Tensor, *, candidates: int, **options: Any) -> Tensor:
    """Sample `candidates` times as many grids as prefixes; keep the most likely of each prefix.

    For the arguments see `generate`; the likelihood is without guidance and filters.
    """
    prefixes = prefix.repeat_interleave(candidates, dim=0)
    scores, groups = torch.zeros(len(prefixes)), prefix.unique(dim=0, return_inverse=True)[1]
    sampled = generate(model, prefixes, scores=scores, **options)
    return sampled[likeliest(scores, groups, candidates)]


def later_known_mask(known_mask: Tensor) -> Tensor:
    """The known positions that come after a sampled one, (h, w), bool."""
    sampled_before = (~known_mask).flatten().cumsum(dim=0).view(known_mask.shape) > 0
    return known_mask & sampled_before


def complete(
    model: GPT,
    prefix: Tensor,
    known: Tensor,
    known_mask: Tensor,
    *,
    candidates: int = 1,
    **options: Any,
) -> Tensor:
    """Sample the positions that are not known; like `known`, int64, on the CPU.

    In raster order a position is sampled without regard to the known ones behind it. So several
    candidates are sampled for each image, and that one is kept under which the known tokens behind
    sampled ones are most likely, without guidance and filters: the mode of self-normalised
    importance sampling with the samples as proposals. For the arguments see `generate`.
    """
    candidates = candidates if later_known_mask(known_mask).any() else 1
    prefixes, grids = (x.repeat_interleave(candidates, dim=0) for x in (prefix, known))
    scores, (height, width) = torch.zeros(len(prefixes)), known_mask.shape
    options |= {"known": grids, "known_mask": known_mask, "scores": scores}
    sampled = generate(model, prefixes, size=(height, width), **options)
    return sampled[likeliest(scores, torch.arange(len(prefix)), candidates)]
