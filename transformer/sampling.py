"""Sampling: the loop over tokens, its steps as CUDA graphs, and the completion of grids."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from transformer.filters import (
    DEFAULT_PARAMS,
    NO_GUIDANCE,
    Guidance,
    SamplingParams,
    guide_and_sample,
    random_keys,
    uniform,
)
from transformer.gpt import GPT
from transformer.kv_cache import KVCache
from transformer.prefix import null_prefix
from transformer.rope import PositionExtension

WARM_UP = 3  # runs before a capture, in which kernels are chosen and compiled
CACHE_PARTS = 4  # a captured step reads as many of them as are written; one graph for each

Outputs = tuple[Tensor, Tensor]


def next_logits(model: GPT, cache: KVCache, tokens: Tensor, token: Tensor, depth: int) -> Tensor:
    """Logits (B, K) of the token that follows, with all that differs between steps in tensors.

    Args:
        model: in eval mode.
        cache: prepared for `tokens`.
        tokens: (B, 1), the previous token of each grid.
        token: (1,), raster number of the token that follows, at least 1.
        depth: of that token.
    """
    hidden = model(tokens, cache.grid.at(token - 1), cache=cache)[:, -1]
    return model.head(hidden, depth=depth)


@lru_cache(maxsize=1)
def _compiled_next_logits() -> Callable[..., Tensor]:
    return torch.compile(next_logits)


class CUDAGraphCapture:
    """Captures functions as CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """`function` as a graph; the tensors that it returns are overwritten by each replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class DecodeStep:
    """Samples batches of grids token by token, with one cache for all batches.

    Attributes:
        cache: keys and values of the batch; with guidance of both halves of a doubled one.
        batch_size: B, grids in a batch.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        *,
        size: tuple[int, int],
        position_extension: PositionExtension = PositionExtension.SLIDE,
        guidance: Guidance = NO_GUIDANCE,
        params: SamplingParams = DEFAULT_PARAMS,
        capture: Callable[[Callable[[], Outputs]], Callable[[], Outputs]] | None = None,
        forward: Callable[..., Tensor] = next_logits,
    ) -> None:
        """Allocate the cache, and the tensors that captured graphs read.

        Args:
            model: in eval mode.
            batch_size: grids in a batch.
            size: (h, w) of the grids.
            position_extension: positions in a grid that is larger than the trained one.
            guidance: conditional and unconditional pass in one doubled batch.
            params: logit filters.
            capture: makes a graph of a function without arguments, such as `CUDAGraphCapture()`;
                default: every step runs eagerly.
            forward: `next_logits`, or its compiled form.
        """
        self.model, self.guidance, self.params = model, guidance, params
        self.batch_size, guided = batch_size, guidance.guidance_scale != 1
        self.cache = model.make_cache(batch_size * (1 + guided), size, position_extension)
        self._capture, self._forward = capture, forward
        self._graphs: dict[tuple[int, int], Callable[[], Outputs]] = {}  # by slots and depth
        device = self.cache.device
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self._token = torch.zeros(1, dtype=torch.long, device=device)
        self._keys = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._scale = torch.ones((), device=device) if guided else None

    def begin(self, prefix: Tensor, keys: Tensor, known: Tensor | None = None) -> Outputs:
        """Begin a batch and sample its first token, or the one after the known tokens.

        Args:
            prefix: (B,) or (B, P), see `make_prefix`.
            keys: (B,), see `random_keys`.
            known: (B, n), the tokens of whole rows at the top.

        Returns:
            logits: (B, K), conditional.
            sampled: (B,), int64.
        """
        self._keys.copy_(keys)
        self.cache.reset()
        if known is None:
            known = keys.new_zeros(len(keys), 0)
        token = known.shape[1]
        if self._scale is not None:
            prefix = torch.cat([prefix, null_prefix(prefix, self.model.config)])
            known = torch.cat([known, known])
            self._scale.fill_(self.guidance.at(token, self.cache.grid.num_tokens))
        positions = self.cache.grid.at(torch.arange(token, device=keys.device))
        hidden = self.model(known, positions, prefix=prefix, cache=self.cache)[:, -1]
        logits = self.model.head(hidden, depth=0)
        sampled = guide_and_sample(logits, uniform(keys, token), self.params, self._scale)
        return logits[: self.batch_size], sampled

    def __call__(self, tokens: Tensor, token: int) -> Outputs:
        """Sample the token with raster number `token` after `tokens` (B,), the one before it."""
        self._tokens.copy_(tokens[:, None])
        self._token.fill_(token)
        if self._scale is not None:
            self._scale.fill_(self.guidance.at(token, self.cache.grid.num_tokens))
        depth = token % self.model.config.depth
        if self._capture is None:
            self.cache.prepare(token - 1)
            return self._decode(depth)
        key = self.cache.prepare(token - 1, CACHE_PARTS), depth
        if key not in self._graphs:
            self._graphs[key] = self._capture(partial(self._decode, depth))
        return self._graphs[key]()

    def _decode(self, depth: int) -> Outputs:
        rows = self._tokens if self._scale is None else self._tokens.repeat(2, 1)
        logits = self._forward(self.model, self.cache, rows, self._token, depth)
        random = uniform(self._keys, self._token)
        sampled = guide_and_sample(logits, random, self.params, self._scale)
        return logits[: self.batch_size], sampled


def make_step(model: GPT, batch_size: int, *, compiled: bool = False, **options: Any) -> DecodeStep:
    """A `DecodeStep`: eager, or `compiled`, on a GPU, as compiled CUDA graphs."""
    if compiled and model.head.weight.device.type == "cuda":
        options |= {"capture": CUDAGraphCapture(), "forward": _compiled_next_logits()}
    return DecodeStep(model, batch_size, **options)


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

    Args:
        step: of the model, for this batch size and size of grid.
        prefix: (B,) class of each image, or `model.config.no_class`; with a condition (B, P), see
            `make_prefix`; on the model's device.
        keys: (B,), see `random_keys`; on the model's device.
        known: (B, h, w) or (B, h, w, depth), indices that are kept where `known_mask` is True.
        known_mask: (h, w), bool.
        scores: (B,), float32, to which the log-probabilities of the known tokens behind a sampled
            one are added, without guidance and filters.

    Yields:
        (B, w) or (B, w, depth), int64, from the top row to the bottom row.
    """
    (height, width), config = step.cache.grid.size, step.model.config
    is_known = [False] * (height * width) if known_mask is None else known_mask.flatten().tolist()
    start = is_known.index(False) if False in is_known else height * width  # first to be sampled
    # Known rows at the top are one prefill; in grids of other sizes the prefix moves with the row.
    top = start // width
    if (height, width) != config.latent_dim and top < height:
        top = 0
    if top:
        yield from known[:, :top].long().unbind(dim=1)
    row_length = width * config.depth
    first = top * row_length
    known_tokens = None if known is None else known.flatten(1).long()
    for number in range(top, height):
        row = keys.new_empty(len(prefix), row_length)
        for place in range(row_length):
            token = number * row_length + place
            if token == first:
                before = None if known_tokens is None else known_tokens[:, :first]
                logits, tokens = step.begin(prefix, keys, before)
            else:
                logits, tokens = step(tokens, token)
            if is_known[token // config.depth]:
                tokens = known_tokens[:, token]
                if scores is not None and token // config.depth > start:
                    chosen = logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])
                    scores += chosen[:, 0]
            row[:, place] = tokens
        yield row if config.depth == 1 else row.unflatten(1, (width, config.depth))


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
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> Tensor:
    """Sample one grid of indices for each prefix, a function of seed, image and token alone.

    Args:
        model: in eval mode.
        prefix: (N,) class of each image, or `model.config.no_class`; with a condition (N, P), see
            `make_prefix`.
        seed: of all random numbers.
        batch_size: images sampled at once.
        size: (h, w) of the grids; default: the trained size.
        known: (N, h, w[, depth]), indices that are kept where
        known_mask: (h, w), bool, is True.
        out: (N, h, w[, depth]), any integer type, on the CPU, filled row by row: as a memory map,
            it makes the memory independent of the height, if there is a window.
        scores: (N,), float32, on the CPU, see `generate_rows`.
        progress: called with the number of images after each batch.
        options: position_extension, guidance and params of `DecodeStep`; compiled of `make_step`.

    Returns:
        `out`; without it (N, h, w) or (N, h, w, depth), int64, on the CPU.
    """
    size, device = size or model.config.latent_dim, model.head.weight.device
    if out is None:
        out = torch.empty(len(prefix), *model.config.grid_shape(size), dtype=torch.long)
    keys = random_keys(seed, torch.arange(len(prefix), device=device))
    step: DecodeStep | None = None
    for start in range(0, len(prefix), batch_size):
        batch = slice(start, start + batch_size)
        count = len(prefix[batch])
        if step is None or step.batch_size != count:
            step = None  # first, so that there are never two caches
            step = make_step(model, count, size=size, **options)
        sums = torch.zeros(count, device=device)
        rows = generate_rows(
            *(step, prefix[batch].to(device), keys[batch]),
            known=None if known is None else known[batch].to(device),
            known_mask=known_mask,
            scores=None if scores is None else sums,
        )
        for number, row in enumerate(rows):
            out[batch, number] = row.to("cpu", out.dtype)
        if scores is not None:
            scores[batch] = sums.cpu()
        if progress is not None:
            progress(count)
    return out


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
    """Sample the positions that are not known.

    In raster order a position is sampled without regard to the known ones behind it. So several
    candidates are sampled, and that one is kept under which the known tokens behind sampled ones
    are most likely, without guidance and filters: the mode of self-normalised importance sampling
    with the samples as proposals.

    Args:
        model: in eval mode.
        prefix: (N,) or (N, P), see `generate`.
        known: (N, h, w) or (N, h, w, depth); indices that are sampled may have any value.
        known_mask: (h, w), bool.
        candidates: samples per image; no effect where all known positions come first.
        options: see `generate`.

    Returns:
        Like `known`, int64, on the CPU.
    """
    candidates = candidates if later_known_mask(known_mask).any() else 1
    prefixes, grids = (x.repeat_interleave(candidates, dim=0) for x in (prefix, known))
    scores = torch.zeros(len(prefixes))
    sampled = generate(
        *(model, prefixes),
        known=grids,
        known_mask=known_mask,
        size=(known_mask.shape[0], known_mask.shape[1]),
        scores=scores,
        **options,
    )
    best = scores.view(-1, candidates).argmax(dim=1)
    return sampled[best + torch.arange(len(prefix)) * candidates]
