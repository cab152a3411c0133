"""The loops that draw: a batch row by row, and any number of grids batch by batch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from transformer import noise
from transformer.gpt import GPT
from transformer.graph import make_step
from transformer.step import Step


@torch.no_grad()
def generate_rows(
    step: Step,
    prefix: Tensor,
    keys: Tensor,
    *,
    given: Tensor | None = None,
    keep: Tensor | None = None,
    scores: Tensor | None = None,
) -> Iterator[Tensor]:
    """Draw one batch of grids row by row; a window bounds the memory, however tall they are.

    Args:
        step: of the model, for this batch size and size of grid.
        prefix: (B,) class of each image, or `model.config.no_class`, with a condition (B, p), see
            `make_prefix`; on the model's device.
        keys: (B,), what the choices of each image follow from, see `noise.keys`; there, too.
        given: (B, h, w), indices that are taken over where `keep` says so; with a depth above 1
            (B, h, w, depth).
        keep: (h, w), bool.
        scores: (B,), float32, to which the log-probabilities of the kept cells are added that
            come behind a drawn one, as the model has them: without guidance and params.

    Yields:
        (B, w) or (B, w, depth), int64, from the top row to the bottom row.
    """
    height, width = step.cache.places.size
    config = step.model.config
    kept = [False] * (height * width) if keep is None else keep.flatten().tolist()
    start = kept.index(False) if False in kept else height * width  # the first drawn cell
    # Given rows at the top come in at once; in grids of other sizes the prefix moves with the cell.
    top = start // width
    if (height, width) != config.latent_dim and top < height:
        top = 0
    if top:
        yield from given[:, :top].long().unbind(dim=1)
    step.begin(keys)
    tokens, first = prefix, top * width * config.depth
    for number in range(top, height):
        row = prefix.new_empty(len(prefix), width * config.depth)
        for place in range(width * config.depth):
            token = number * width * config.depth + place
            stays = kept[token // config.depth]
            if token == first and top:
                logits, tokens = step.prefill(prefix, given[:, :top], draws=not stays)
            else:
                logits, tokens = step(tokens, token, draws=not stays)
            if stays:
                tokens = given.flatten(1)[:, token]
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
    given: Tensor | None = None,
    keep: Tensor | None = None,
    out: Tensor | None = None,
    scores: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> Tensor:
    """Draw one grid of indices for each prefix.

    Args:
        model: in eval mode.
        prefix: (N,) class of each image, or `model.config.no_class`; with a condition (N, p), see
            `make_prefix`.
        seed: of all choices, which are a function of it, the image's number and the token.
        batch_size: images drawn at once.
        size: (h, w) of the grids; default: what the model was trained on.
        given: (N, h, w[, depth]) and
        keep: (h, w), bool: indices that are taken over, and where.
        out: (N, h, w[, depth]), any integer type, on the CPU, filled row by row: with a window the
            memory then does not depend on the height, if it lies on a disk.
        scores: (N,), float32, on the CPU, takes in how likely the
            given cells are, see `generate_rows`.
        progress: called with the number of images after each batch.
        options: position_extension, guidance and params of `Step`; compiled of `make_step`.

    Returns:
        `out`; without it (N, h, w) or (N, h, w, depth), int64, on the CPU.
    """
    config = model.config
    size = size or config.latent_dim
    device = model.head.weight.device
    if out is None:
        out = torch.empty(len(prefix), *config.grid_shape(size), dtype=torch.long)
    keys = noise.keys(seed, torch.arange(len(prefix), device=device))
    step: Step | None = None
    for start in range(0, len(prefix), batch_size):
        part = slice(start, start + batch_size)
        count = len(prefix[part])
        if step is None or step.batch_size != count:
            step = None  # first, so that there are never two caches
            step = make_step(model, count, size=size, **options)
        sums = torch.zeros(count, device=device)
        rows = generate_rows(
            *(step, prefix[part].to(device), keys[part]),
            given=None if given is None else given[part].to(device),
            keep=keep,
            scores=None if scores is None else sums,
        )
        for number, row in enumerate(rows):
            out[part, number] = row.to("cpu", out.dtype)
        if scores is not None:
            scores[part] = sums.cpu()
        if progress is not None:
            progress(count)
    return out
