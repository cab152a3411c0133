"""Sampling: the loops over tokens, in raster or any order, and completion of grids."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformer.attention import CUDAGraphCapture, Function, KVCache, Outputs
from transformer.config import GPTConfig
from transformer.distribution import (
    SamplingParams,
    probabilities,
    random_keys,
    sample_from_probs,
    uniform,
)
from transformer.gpt import GPT
from transformer.rope import PositionExtension, known_first_orders, step_sizes

CACHE_PARTS = 4  # one graph for each number of parts that are written


def next_logits(model: GPT, cache: KVCache, tokens: Tensor, token: Tensor, depth: int) -> Tensor:
    """Logits (B, 1, K) of the token with raster number `token`, (1,), after `tokens` (B, 1).

    All that differs between steps is in tensors. The cache is prepared for `tokens`.
    """
    hidden = model(tokens, cache.grid.at(token - 1), cache=cache)
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

    def begin(self, prefix: Tensor, keys: Tensor, known: Tensor, order: Tensor) -> Outputs:
        """Begin a batch and sample the first token after the known ones, see `extend`."""
        self._keys.copy_(keys)
        if self.copies == 2:
            names = self.params.guidance_parts
            prefix = torch.cat([prefix, self.model.config.null_prefix(prefix, names)])
        for _, cache in self.passes:
            cache.reset()
        return self.extend(known, order, known.shape[1], 1, prefix)

    def extend(
        self, tokens: Tensor, order: Tensor, done: int, count: int = 1, prefix: Tensor | None = None
    ) -> Outputs:
        """Sample `count` tokens at once, after the last ones, (B, t), of the first `done`.

        The last of them is given `count` times, each time as if another token came next: that is
        what a GPT learns from random orders, and so it takes no training to decode in parallel.
        `order` (n,), or (B, n) per image, holds the raster numbers of all tokens. A `prefix` begins
        a batch, with a count of 1 and, in raster order, after whole rows.

        Returns conditional logits (B, count, K), float32, and what is sampled, (B, count), int64.
        """
        self._set_token(done)
        chosen, first = order[..., done : done + count], done - tokens.shape[1]
        order = order.repeat(self.copies, 1) if order.dim() == 2 else order
        tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, count - 1)], dim=1)
        numbers = [*range(first, done), *[done - 1] * (count - 1)]
        next_numbers = slice(first + (prefix is None), done + count)
        positions, following = (self.cache.grid.at(order[..., x]) for x in (numbers, next_numbers))
        inputs, options = (tokens.repeat(self.copies, 1), positions), {"next_positions": following}
        logits = []
        for model, cache in self.passes:
            if prefix is None:
                cache.prepare(done - 1, alternatives=count - 1)
            hidden = model(*inputs, prefix=prefix, cache=cache, **options)[:, -count:]
            logits.append(model.head(hidden, depth=done % model.config.depth))
        return self._sample(torch.cat(logits), chosen)

    def __call__(self, tokens: Tensor, token: int) -> Outputs:
        """Like `extend` by one token after `tokens` (B, 1), in raster order and captured."""
        self._tokens.copy_(tokens)
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
        return self._sample(torch.cat(logits), self._token)

    def _sample(self, logits: Tensor, tokens: Tensor) -> Outputs:
        """Logits (B, t, K), or with the unconditional ones (2B, t, K), -> as `extend`."""
        logits = logits.float()
        cond, uncond = logits[: self.batch_size], logits[self.batch_size :]
        logits = cond if self._scale is None else torch.lerp(uncond, cond, self._scale)
        distribution = probabilities(logits, self.params)
        return cond, sample_from_probs(distribution, uniform(self._keys[:, None], tokens))


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of tokens (B, t) by their logits (B, t, K), the sum over t, (B,)."""
    return logits.log_softmax(dim=-1).gather(2, tokens[..., None]).sum(dim=(1, 2))


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

    Args are those of `generate`, on the model's device, and the `random_keys` of the images. Yields
    (B, w) or (B, w, depth), int64, from the top row to the bottom row.
    """
    (height, width), config = step.cache.grid.size, step.model.config
    raster = torch.arange(step.cache.grid.num_tokens, device=keys.device)
    row_length, top = width * config.depth, 0
    row = keys.new_empty(len(keys), *config.grid_shape((1, width))[1:])
    before = keys.new_zeros(len(keys), 0)
    is_known = is_counted = torch.zeros(len(keys), height * width, dtype=torch.bool)
    if known is not None and known_mask is not None:
        # Rows that are known in all images are one prefill, unless the prefix moves with the row.
        if (height, width) == config.latent_dim:
            top = int(known_mask.all(dim=2).all(dim=0).cumprod(dim=0).sum())
        is_known, is_counted = (x.flatten(1) for x in (known_mask, later_known_mask(known_mask)))
        yield from known[:, :top].long().unbind(dim=1)
        known = known.flatten(1).long()
        before = known[:, : top * row_length]
    for token in range(top * row_length, height * row_length):
        if token == top * row_length:
            logits, tokens = step.begin(prefix, keys, before, raster)
        else:
            logits, tokens = step(tokens, token)
        position = token // config.depth
        if known is not None:
            tokens = torch.where(is_known[:, position, None], known[:, token, None], tokens)
        if scores is not None:
            found = log_probabilities(logits, tokens)
            scores += found if known is None else found * is_counted[:, position]
        row.view(len(row), -1)[:, token % row_length] = tokens[:, 0]
        if (token + 1) % row_length == 0:
            yield row.clone()


def sample_classes(
    step: DecodeStep, prefix: Tensor, keys: Tensor, tokens: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Replace "no class", where nothing else is given, by a class sampled given known tokens.

    By Bayes' rule with equal priors, p(class | tokens) is proportional to p(tokens | class): one
    forward for each class. Few labelled images train "no class". Tokens and order are (B, n); all
    filters apply. Returns the prefix and log p(class | tokens), (B,), 0 where a prefix stays.
    """
    model, prefix, log_posterior = step.model, prefix.clone(), torch.zeros_like(keys).float()
    classes = prefix.view(len(prefix), -1)[:, 0]
    without = (prefix == model.config.null_prefix(prefix)).view(len(prefix), -1).all(dim=1)
    if model.config.num_classes and tokens.shape[1] and without.any():
        tokens, positions = tokens[without], step.cache.grid.at(order[without])
        candidates, nats = prefix[without], []
        for number in range(model.config.num_classes):
            candidates.view(len(candidates), -1)[:, 0] = number
            hidden = model(tokens, positions, prefix=candidates)
            nats.append(model.head(hidden[:, :-1], tokens).sum(dim=1))
        posterior = (-torch.stack(nats, dim=1)).log_softmax(dim=1)
        distribution = probabilities(posterior, step.params)
        sampled = sample_from_probs(distribution, uniform(keys[without], -1))
        classes[without] = sampled.to(classes)
        log_posterior[without] = posterior.gather(1, sampled[:, None])[:, 0]
    return prefix, log_posterior


@torch.no_grad()
def generate_in_order(
    step: DecodeStep,
    prefix: Tensor,
    keys: Tensor,
    *,
    known: Tensor | None,
    known_mask: Tensor,
    scores: Tensor | None = None,
) -> Iterator[Tensor]:
    """Like `generate_rows`, but in random orders, after the known positions, and all rows at last.

    Each image has as many known positions (B, h, w). See `sample_classes` for "no class".
    """
    grid, config = step.cache.grid, step.model.config
    first = int(known_mask[0].sum()) * config.depth
    counts = step_sizes(grid.num_tokens - first, step.params.steps)
    order = grid.with_depths(known_first_orders(keys, known_mask, counts))
    tokens = order.new_empty(len(order), 0)
    if known is not None:
        tokens = known.flatten(1).long().gather(1, order[:, :first])
        prefix, log_posterior = sample_classes(step, prefix, keys, tokens, order[:, :first])
        if scores is not None:
            scores += log_posterior
    for count in counts:
        if tokens.shape[1] == first:
            logits, sampled = step.begin(prefix, keys, tokens, order)
        else:
            logits, sampled = step.extend(sampled, order, tokens.shape[1], count)
        if scores is not None:
            scores += log_probabilities(logits, sampled)
        tokens = torch.cat([tokens, sampled], dim=1)
    grids = torch.empty_like(tokens).scatter_(1, order, tokens)
    yield from grids.view(-1, *config.grid_shape(grid.size)).unbind(dim=1)


def samples_in_order(config: GPTConfig, size: tuple[int, int], params: SamplingParams) -> bool:
    """Whether `generate` samples in random orders; a ValueError where `params.steps` cannot be."""
    able = config.any_order and size == config.latent_dim
    if params.steps and not (able and config.depth == 1):
        needs = "a GPT trained in random orders to the end (order_anneal 1,1), with depth 1"
        raise ValueError(f"steps needs {needs}, and grids of its size; omit it")
    return able


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
    part: tuple[int, int] = (0, 1),
    merge: Callable[[Tensor], object] = lambda values: None,
    **options: Any,
) -> Tensor:
    """Sample one grid of indices for each prefix, a function of seed, image and token alone.

    Args:
        model: in eval mode.
        prefix: see `make_prefix`; if nothing is given, see `sample_classes`.
        size: (h, w) of the grids; default: the trained size.
        known: (N, h, w[, depth]), kept where `known_mask`, (h, w) or (N, h, w), is True. A GPT of
            any order samples the others after them, in a random order.
        out: (N, h, w[, depth]), any integer type, on the CPU, filled row by row and returned; a
            memory map bounds the memory for any height. Default: a new one, int64.
        scores: (N,), float32, on the CPU, for the log-probabilities of the known tokens behind a
            sampled one, or else of all that is sampled; without guidance and filters.
        progress: called with the number of images after each batch.
        part: the number of this process, and how many share the batches.
        merge: adds to a tensor, which is 0 where others have sampled, their values in place.
        options: of `DecodeStep`.
    """
    device, params = model.head.weight.device, options.get("params") or SamplingParams()
    size = size or model.config.latent_dim
    if out is None:
        out = torch.zeros(len(prefix), *model.config.grid_shape(size), dtype=torch.long)
    if known is None or known_mask is None:
        known, known_mask = None, torch.zeros(size, dtype=torch.bool)
    known_mask = known_mask.expand(len(prefix), *size)
    in_order = samples_in_order(model.config, size, params)
    sample_rows = generate_in_order if in_order else generate_rows
    keys = random_keys(seed, torch.arange(len(prefix), device=device))
    step: DecodeStep | None = None
    # In other orders, all images of a batch have as many known positions.
    counts = known_mask.flatten(1).sum(dim=1) * in_order
    groups = [(counts == count).nonzero()[:, 0] for count in counts.unique()]
    batches = [batch for group in groups for batch in group.split(batch_size)]
    for batch in batches[part[0] :: part[1]]:
        if step is None or step.batch_size != len(batch):
            step = None  # first, so that there are never two caches
            step = DecodeStep(model, len(batch), size=size, **options)
        sums = torch.zeros(len(batch), device=device)
        rows = sample_rows(
            *(step, prefix[batch].to(device), keys[batch.to(device)]),
            known=None if known is None else known[batch].to(device),
            known_mask=known_mask[batch].to(device),
            scores=None if scores is None else sums,
        )
        for number, row in enumerate(rows):
            # NumPy's assignment also fills uint16, for which PyTorch has no indexed kernel.
            out.numpy()[batch.numpy(), number] = row.cpu().numpy()
        if scores is not None:
            scores[batch] = sums.cpu()
        progress(len(batch))
    for values in (out,) if scores is None else (out, scores):
        merge(values)
    return out


def likeliest(scores: Tensor, groups: Tensor, candidates: int) -> Tensor:
    """Numbers (N,) of the best of N * candidates samples, for the images of `groups` (N,).

    Samples i * candidates, ... are those of image i. The images of a group share their samples: of
    those, as many are kept as it has images, the ones with the highest scores.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[groups.repeat_interleave(candidates)[order].argsort(stable=True)]
    counts = groups.bincount()  # of images; the samples are now by group, the best ones first
    samples = order.split((counts * candidates).tolist())
    best = [x[:count] for x, count in zip(samples, counts.tolist(), strict=True)]
    chosen = torch.empty_like(groups)
    chosen[groups.argsort(stable=True)] = torch.cat(best)
    return chosen


def generate_likeliest(
    model: GPT, prefix: Tensor, *, candidates: int, groups: Tensor | None = None, **options: Any
) -> Tensor:
    """Sample `candidates` times as many grids as prefixes; keep the most likely ones of each group.

    The `groups` (N,) are by default those of the same prefix. For the other arguments see
    `generate`; the likelihood is without guidance and filters.
    """
    groups = prefix.unique(dim=0, return_inverse=True)[1] if groups is None else groups
    prefix = prefix.repeat_interleave(candidates, dim=0)
    scores = torch.zeros(len(prefix))
    sampled = generate(model, prefix, scores=scores, **options)
    return sampled[likeliest(scores, groups, candidates)]


def later_known_mask(known_mask: Tensor) -> Tensor:
    """The known positions that come after a sampled one, (..., h, w) like `known_mask`, bool."""
    sampled_before = (~known_mask).flatten(-2).cumsum(dim=-1).view(known_mask.shape) > 0
    return known_mask & sampled_before


def complete(
    model: GPT, prefix: Tensor, known: Tensor, known_mask: Tensor, candidates: int = 1, **other: Any
) -> Tensor:
    """Sample the positions that are not known; like `known`, int64, on the CPU.

    In raster order a position is sampled without regard to the known ones behind it. So several
    candidates are sampled for each image, and that one is kept under which the known tokens behind
    sampled ones are most likely, without guidance and filters: the mode of self-normalised
    importance sampling with the samples as proposals. A GPT of any order samples with regard to all
    known positions, and the most likely candidate is kept. For the arguments see `generate`.
    """
    candidates = candidates if later_known_mask(known_mask).any() else 1
    tensors = {"known": known, "known_mask": known_mask.expand(known.shape[:3])}
    other |= {name: x.repeat_interleave(candidates, dim=0) for name, x in tensors.items()}
    other |= {"candidates": candidates, "size": (known.shape[1], known.shape[2])}
    return generate_likeliest(model, prefix, groups=torch.arange(len(prefix)), **other)
