"""The step of drawing as a CUDA graph: all its kernels are launched at once."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from transformer.attention import scaled_dot_product_attention, window_mask
from transformer.cache import KVCache
from transformer.gpt import GPT

WARM_UP = 3  # steps before a capture, in which kernels are chosen and compiled


def step_at(model: GPT, cache: KVCache, tokens: Tensor, position: Tensor) -> Tensor:
    """`GPT.step` of a cell with its position in a tensor, so that all cells are one computation.

    It looks at all slots of the cache, of which a mask hides those that are not in use.

    Args:
        model: with rotary positions, one index a cell and trained in raster order.
        cache: shows the prefix as this cell is to see it (`KVCache.move_to`).
        tokens: (B,), the index of the cell at `position`.
        position: (1,), int64, behind the prefix.

    Returns:
        (B, codebook_size), the logits of the next cell.
    """
    cell = position - cache.prefix
    slot = cache.prefix + cell % cache.ring
    x = model.token_embedding(tokens)[:, None]
    turn = cache.places.at(cell // cache.width, cell % cache.width)
    mask = _mask(cache, cell)

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        keys.index_copy_(2, slot, k)
        values.index_copy_(2, slot, v)
        # Heads that share keys are further queries of one head.
        queries = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask).view(q.shape)

    looks = [partial(look, layer) for layer in range(len(model.blocks))]
    return model.head(model._run(x, tuple(angle.to(x) for angle in turn), looks)[:, 0])


def _mask(cache: KVCache, cell: Tensor) -> Tensor:
    """Which slots of the cache a cell (1,) sees, (1, slots)."""
    slots = torch.arange(cache.ring, device=cell.device)
    held = cell - (cell - slots) % cache.ring  # the cell in each slot: the latest that fits
    positions = {"width": cache.width, "window": cache.window, "prefix": 0}
    sees = window_mask(cell, held, **positions) & (held >= 0)
    return torch.nn.functional.pad(sees, (cache.prefix, 0), value=True)


class GraphStep:
    """`step_at` recorded once for a batch, then replayed for every cell.

    Args of its call: tokens (B,) and their position, as `GPT.step` takes them.
    """

    def __init__(self, model: GPT, cache: KVCache, step: Callable[..., Tensor]) -> None:
        self._model, self._cache, self._step = model, cache, step
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        if position < self._cache.prefix:
            return self._model.step(tokens, position, self._cache)
        self._cache.move_to(position)
        if self._graph is None:
            self._tokens = tokens.clone()
            self._position = torch.full((1,), position, device=tokens.device)
            self._record()
        self._tokens.copy_(tokens)
        self._position.fill_(position)
        self._graph.replay()
        return self._logits

    def _record(self) -> None:
        step = partial(self._step, self._model, self._cache, self._tokens, self._position)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = step()


@lru_cache(maxsize=1)
def make_step(model: GPT, cache: KVCache, *, compiled: bool) -> Callable[[Tensor, int], Tensor]:
    """(tokens, position) -> logits: `GPT.step` itself, or a compiled CUDA graph of it.

    Models whose cells are not one computation, with learned embeddings of them or with residual
    codes, have no such graph.

    Args:
        model: in eval mode.
        cache: of `model.make_cache`.
        compiled: the graph, on a GPU; takes a minute and pays for many images.
    """
    config = model.config
    by_cell = config.positions != "rotary" or config.order_anneal is not None
    if not compiled or cache.keys.device.type != "cuda" or by_cell or config.depth > 1:
        return partial(model.step, cache=cache)
    return GraphStep(model, cache, torch.compile(step_at))
