"""The step of drawing as CUDA graphs: all its kernels are launched at once."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from transformer import noise
from transformer.attention import scaled_dot_product_attention
from transformer.blocks import Attend
from transformer.cache import KVCache
from transformer.distribution import SamplingParams, choose
from transformer.gpt import GPT
from transformer.step import Step

WARM_UP = 3  # steps before a capture, in which kernels are chosen and compiled
PARTS = 4  # of the cache: a step reads as many of them as are in use, and there is a graph for each

Outputs = tuple[Tensor, Tensor]


def step_at(model: GPT, cache: KVCache, tokens: Tensor, token: Tensor, slots: int) -> Tensor:
    """`GPT.step` with its position in a tensor, so that all cells are one computation.

    Args:
        model: with rotary positions, one index a cell and trained in raster order.
        cache: shows the prefix as this cell is to see it (`KVCache.move_to`).
        tokens: (B,), the index of the cell before number `token`.
        token: (1,), int64, at least 1, the cell that is drawn.
        slots: how many of the ring the step reads, among them all that are in use.

    Returns:
        (B, codebook_size), the logits of the cell.
    """
    cell, stop = token - 1, cache.prefix + slots
    slot = cache.prefix + cell % cache.ring
    x = model.token_embedding(tokens)[:, None]
    turn = cache.places.at(cell // cache.width, cell % cache.width)
    mask = cache.sees(cell, slots)

    def attention_of(layer: int) -> Attend:
        keys, values = cache.keys[layer], cache.values[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.index_copy_(2, slot, k)
            values.index_copy_(2, slot, v)
            # Heads that share keys are further queries of one head.
            queries = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            in_use = keys[:, :, :stop], values[:, :, :stop]
            return scaled_dot_product_attention(queries, *in_use, attn_mask=mask).view(q.shape)

        return attend

    states = model.run_blocks(x, tuple(angle.to(model.cos) for angle in turn), attention_of)
    return model.head(states)[:, 0]


def draw_at(
    model: GPT,
    cache: KVCache,
    tokens: Tensor,
    token: Tensor,
    keys: Tensor,
    scale: Tensor | None,
    *,
    slots: int,
    params: SamplingParams,
) -> Outputs:
    """`Step` behind the prefix, with all that differs from cell to cell in tensors.

    Args:
        model, cache, token, slots: see `step_at`.
        tokens: (B,), the index of the cell before.
        keys: (B,), see `noise.keys`.
        scale: (), of the guidance; None for none.
        params: of the distributions that are drawn from.

    Returns:
        logits: (B, K), of the model that knows class and condition.
        drawn: (B,), int64.
    """
    rows = tokens if scale is None else tokens.repeat(2)
    logits = step_at(model, cache, rows, token, slots)
    return logits[: len(tokens)], choose(logits, noise.uniform(keys, token), params, scale)


class Recorder:
    """Records functions as CUDA graphs that share their memory."""

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


class GraphStep(Step):
    """`Step` as a few recorded graphs, each of which serves all cells of a part of the grid."""

    def __init__(
        self,
        *arguments: Any,
        draw: Callable[..., Outputs] = draw_at,
        record: Callable[[Callable[[], Outputs]], Callable[[], Outputs]],
        **options: Any,
    ) -> None:
        """Allocate the cache, and the tensors that the graphs read.

        Args:
            arguments, options: see `Step`.
            draw: `draw_at`, or what it was compiled to.
            record: makes a graph of a function without arguments, see `Recorder`.
        """
        super().__init__(*arguments, **options)
        self._draw, self._record = draw, record
        self._graphs: dict[int, Callable[[], Outputs]] = {}  # by the slots that they read
        device = self.cache.device
        self._tokens = torch.zeros(self.batch_size, dtype=torch.long, device=device)
        self._token = torch.zeros(1, dtype=torch.long, device=device)
        self._keys = torch.zeros_like(self._tokens)
        self._scale = torch.ones((), device=device) if self.guided else None

    def begin(self, keys: Tensor) -> None:
        self.cache.reset()
        self._keys.copy_(keys)

    def __call__(
        self, tokens: Tensor, token: int, *, draws: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        if token == 0:
            return super().__call__(tokens, token, draws=draws)
        self.cache.move_to(self.cache.prefix + token - 1)
        self._tokens.copy_(tokens)
        self._token.fill_(token)
        if self._scale is not None:
            self._scale.fill_(self.guidance.at(token, self.count))
        slots = self.slots(token)
        if slots not in self._graphs:
            self._graphs[slots] = self._record(
                partial(
                    self._draw,
                    *(self.model, self.cache, self._tokens, self._token, self._keys, self._scale),
                    slots=slots,
                    params=self.params,
                )
            )
        return self._graphs[slots]()

    def slots(self, token: int) -> int:
        """How many slots of the ring are read to draw a token: whole parts of it."""
        ring = self.cache.ring
        part = -(-ring // PARTS)
        return min(-(-token // part) * part, ring)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Outputs]:
    return torch.compile(draw_at)


def make_step(model: GPT, batch_size: int, *, compiled: bool = False, **options: Any) -> Step:
    """The `Step` of a model: the plain one, or compiled CUDA graphs of it.

    Models whose cells are not one computation, with learned embeddings of them or with residual
    codes, have no such graphs.

    Args:
        model, batch_size, options: see `Step`.
        compiled: the graphs, on a GPU; takes a minute and pays for many images.
    """
    on_gpu = model.head.weight.device.type == "cuda"
    if not compiled or not on_gpu or model.config.has_absolute_positions or model.config.depth > 1:
        return Step(model, batch_size, **options)
    return GraphStep(model, batch_size, draw=_compiled(), record=Recorder(), **options)
