"""Causal attention over a prefix and a grid in raster order, with a 2-D window; its cache.

A sequence is P tokens of prefix (conditioning) and then the latent grid row by row, `depth` tokens
per latent position. A prefix token attends to the prefix up to itself. A token at (i, j) attends
to the whole prefix, and to itself and the earlier tokens at (i', j') with i - i' < window and
|j - j'| < window; with window 0 to all earlier tokens. `attend` computes this tile by tile on
any device, `FlexAttention` in one fused kernel on CUDA, `KVCache` token by token.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.config import GPTConfig
from transformer.rope import GridPositions, eager_on_cpu, rotary_cos_sin, rotate

TILE_ROWS, TILE_COLUMNS = 8, 16  # latent positions: enough for efficient matrix products
TOKENS_IN_ONE_TILE = 512  # below, a second call would cost more than the mask saves
TOKENS_PER_CALL = 4096  # limits the memory of what is copied for a call
WARM_UP = 3  # runs before a capture, in which kernels are chosen and compiled
Outputs = tuple[Tensor, ...]
Function = Callable[[], Outputs]


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """PyTorch's own, in float32 on a CPU, where a training step in bfloat16 takes 31 % longer."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, **mask)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **mask)
    return y.type_as(q)


def window_is_full(window: int, grid: tuple[int, int]) -> bool:
    """Whether the window includes every earlier position of a grid (h, w)."""
    return window == 0 or window >= max(grid)


def visible_mask(
    queries: Tensor, keys: Tensor, *, width: int, window: int, prefix: int, depth: int = 1
) -> Tensor:
    """Whether queries (Q,) attend to keys (S,), as places in the sequence: (Q, S), bool.

    The sequence begins with the prefix, and its grid has `width` columns.
    """
    q, k = queries[:, None], keys[None, :]
    causal = k <= q
    if window == 0:
        return causal
    latent_q, latent_k = (q - prefix) // depth, (k - prefix) // depth
    row_q, column_q = latent_q // width, latent_q % width
    row_k, column_k = latent_k // width, latent_k % width
    near = (row_q - row_k < window) & ((column_q - column_k).abs() < window)
    return causal & (near | (k < prefix))


class _Tiling(NamedTuple):
    """Tiles of queries, and margins of keys around each; columns are in tokens, unlike `window`."""

    grid: tuple[int, int]
    depth: int
    window: int
    prefix: int
    rows: int  # of a tile
    columns: int
    halo: int  # rows of keys above a tile
    side: int  # columns of keys to its left, and to its right


def _tile(grid: tuple[int, int], depth: int, window: int, prefix: int) -> _Tiling:
    """Tiles of about TILE_ROWS x TILE_COLUMNS; as wide as the grid where margins would not pay."""
    height, width = grid[0], grid[1] * depth
    halo, side = min(window, height) - 1, (min(window, grid[1]) - 1) * depth
    rows = height
    columns = max(-(-TILE_COLUMNS // depth) * depth, side)  # whole latent positions
    if height * width <= TOKENS_IN_ONE_TILE or columns + 2 * side >= width:
        columns, side = width, 0
    if height * width > TOKENS_IN_ONE_TILE:
        rows = min(max(TILE_ROWS * TILE_COLUMNS // columns, halo, 1), height)
    return _Tiling((height, width), depth, window, prefix, rows, columns, halo, side)


@lru_cache(maxsize=32)
def _tile_mask(tiling: _Tiling, halo: int, device: torch.device) -> Tensor:
    """`visible_mask` in the tiles of one band: (across, rows*columns, prefix + keys), bool.

    The first band has no `halo`, rows of keys above the tiles.
    """
    width, columns, side = tiling.grid[1], tiling.columns, tiling.side
    shape = {"width": width // tiling.depth, "depth": tiling.depth}
    rows = torch.arange(halo + tiling.rows, device=device)[:, None] * width
    masks = []
    for left in range(0, width, columns):
        column = torch.arange(left - side, left + columns + side, device=device)
        inside = ((column >= 0) & (column < width)).repeat(len(rows))
        queries = (rows[halo:] + column[side : side + columns]).flatten()
        keys = (rows + column).flatten()
        visible = visible_mask(queries, keys, window=tiling.window, prefix=0, **shape)
        masks.append(visible & inside)
    return F.pad(torch.stack(masks), (tiling.prefix, 0), value=True)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    window: int = 0,
    prefix: int = 1,
    depth: int = 1,
) -> Tensor:
    """Causal attention over `prefix` tokens, at least 1, and a grid, exact for every window.

    Without a window this is one causal call. With one, the grid is cut into tiles: the keys of a
    tile are the tile itself, and the rows above it and columns beside it that the window reaches.
    Time and memory grow with the number of tokens; a mask over all pairs of them never exists. q,
    k, v and the result are (B, heads, prefix + h*w*depth, head_dim) for a grid (h, w).
    """
    height, width = grid[0], grid[1] * depth
    if q.shape[2] != prefix + height * width:
        raise ValueError(f"expected {prefix} + {height}*{width} tokens, got {q.shape[2]}")
    if height == 0 or window_is_full(window, grid):
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    tiling = _tile(grid, depth, window, prefix)
    before = q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix]
    outputs = [scaled_dot_product_attention(*before, is_causal=True)]
    # The first band of tiles has no rows above it; many others go into one call.
    bands = max(1, TOKENS_PER_CALL // (tiling.rows * width))
    sizes = [min(tiling.rows, height)]
    while sum(sizes) < height:
        sizes.append(min(bands * tiling.rows, height - sum(sizes)))
    # Split, not sliced: the gradients of all parts are then joined once.
    grids = [x[:, :, prefix:].unflatten(2, tiling.grid) for x in (q, k, v)]
    parts = [x.split(sizes, dim=2) for x in grids]
    above: list[Tensor] = []
    for q_rows, *key_rows in zip(*parts, strict=True):
        keys = key_rows
        if above and tiling.halo:
            pairs = zip(above, key_rows, strict=True)
            keys = [torch.cat([x[:, :, -tiling.halo :], y], dim=2) for x, y in pairs]
        outputs.append(_attend_rows(q_rows, keys, before[1:], tiling))
        above = key_rows
    return torch.cat(outputs, dim=2)


def _attend_rows(
    q: Tensor, keys: Sequence[Tensor], prefix: Sequence[Tensor], tiling: _Tiling
) -> Tensor:
    """Attention of rows q (B, heads, rows, w, d) to the prefix, to themselves and those above.

    The keys and values are (B, heads, halo + rows, w, d), in the first rows of the grid without a
    halo, those of the prefix (B, heads, prefix, d). Returns (B, heads, rows * w, d).
    """
    batch, heads, height, width, dim = q.shape
    halo, side = keys[0].shape[2] - height, tiling.side
    rows, columns = tiling.rows, tiling.columns
    bands, across = -(-height // rows), -(-width // columns)

    def cut(x: Tensor, above: int, beside: int) -> Tensor:
        """Rows of the grid -> (B, heads, bands, across, tokens of a tile and its margins, d)."""
        right = beside + across * columns - width
        x = F.pad(x, (0, 0, beside, right, 0, bands * rows - height))
        x = x.unfold(2, above + rows, rows).unfold(3, columns + 2 * beside, columns)
        return x.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)

    parts = [cut(q, 0, 0).flatten(0, 2)]
    for x, x_prefix in zip(keys, prefix, strict=True):
        tiles = cut(x, halo, side)
        before = x_prefix[:, :, None, None].expand(*tiles.shape[:4], -1, -1)
        # (B*heads*bands, across, prefix + keys, d)
        parts.append(torch.cat([before, tiles], dim=4).flatten(0, 2))
    mask = _tile_mask(tiling, halo, q.device)[None]
    y = scaled_dot_product_attention(*parts, attn_mask=mask)
    y = y.view(batch, heads, bands, across, rows, columns, dim).transpose(3, 4)
    y = y.reshape(batch, heads, bands * rows, across * columns, dim)
    return y[:, :, :height, :width].flatten(2, 3)


class FlexAttention:
    """`attend` as one fused kernel (arXiv 2412.05496); it has a backward pass on CUDA only."""

    def __init__(self, device: torch.device, **shape: Any) -> None:
        """Make the mask of a grid, with the arguments of `attend`, outside of a compiled model."""
        from torch.nn.attention import flex_attention  # takes half a second

        self.shape = {"prefix": 1, "depth": 1, **shape}
        grid, window, prefix, depth = (self.shape[x] for x in ("grid", "window", "prefix", "depth"))

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            near = {"window": window, "prefix": prefix, "depth": depth}
            return visible_mask(query[None], key[None], width=grid[1], **near)[0, 0]

        self.mask, length = None, prefix + grid[0] * grid[1] * depth
        make_mask: Any = flex_attention.create_block_mask
        self.kernel: Any = flex_attention.flex_attention
        if device.type == "cuda":
            make_mask = torch.compile(make_mask)  # which never materialises the mask of all pairs
            self.kernel = torch.compile(self.kernel)  # only this one is fast
        if not window_is_full(window, grid):
            self.mask = make_mask(visible, None, None, length, length, device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **shape: Any) -> Tensor:
        """Like `attend`; a grid of another shape is left to `attend`."""
        if self.mask is None or shape != self.shape:
            return attend(q, k, v, **shape)
        return self.kernel(q, k, v, block_mask=self.mask)


class KVCache:
    """Keys and values of all layers for one batch of grids, allocated once.

    The prefix has slots of its own. Behind them is a ring of as many rows of the grid as the window
    reaches: a token takes the slot of the token `ring` before it, which no later token attends to.
    So the memory does not depend on the height of the grid; without a window all rows are kept.

    A token is written by its position, a tensor; so `attend` is the same computation for every
    token, which a CUDA graph can capture. What must be a number on the host is set by `prepare`.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, grid: GridPositions, like: Tensor
    ) -> None:
        """Allocate the cache on the device and in the type of `like`."""
        self.grid, self.prefix = grid, config.prefix_length
        self.device, self.rope_base = like.device, config.rope_base
        height, self.width = grid.size
        is_full = window_is_full(config.window_size, grid.size)
        self.window = 0 if is_full else config.window_size
        self.ring = min(self.window or height, height) * self.width * grid.depth
        slots = self.prefix + self.ring
        shape = batch_size, config.num_kv_heads, slots, config.head_dim
        # Not one tensor: a compiler would copy the whole of it where a part is written.
        self.keys = [like.new_zeros(shape) for _ in range(config.num_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_layers)]
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def reset(self) -> None:
        """Begin another batch; slots are masked until they are written, and need no zeros."""
        self.slots, self._all_visible = self.ring, False
        self._offset = [0, 0]  # by which the keys of the prefix are rotated
        self._prefix_keys: list[Tensor] = []  # before they are

    def prepare(self, token: int, parts: int | None = None, alternatives: int = 0) -> int:
        """Get ready for the token with this number in the sequence, the last that is written.

        Limits `attend` to the slots that are written by then, rounded up to a multiple of 1/parts
        of the ring if few different computations should occur; returns their number. Where
        positions slide, rotates the prefix by the `GridPositions.offsets` of the token.
        Behind it come `alternatives`: it again, for other positions; the next tokens replace them.
        """
        self._last, self._alternatives = token, alternatives
        written = min(token + 1 + alternatives, self.ring)
        part = 1 if parts is None else -(-self.ring // parts)
        self.slots = min(-(-written // part) * part, self.ring)
        self._all_visible = self.window == 0 and self.slots == token + 1 and not alternatives
        if self.grid.slides:
            offset = self.grid.offsets(self.grid.at(torch.tensor(token)))
            if offset.tolist() != self._offset:
                self._rotate_prefix(offset)
        return self.slots

    def _rotate_prefix(self, offset: Tensor) -> None:
        shown = [keys[:, :, : self.prefix] for keys in self.keys]
        self._prefix_keys = self._prefix_keys or [keys.clone() for keys in shown]
        cos, sin = rotary_cos_sin(offset.to(self.device), shown[0].shape[-1], self.rope_base)
        for keys, original in zip(shown, self._prefix_keys, strict=True):
            keys.copy_(rotate(original, cos, sin))
        self._offset = offset.tolist()

    def numbers(self, count: int) -> Tensor:
        """Numbers (count,) in the sequence of the last elements that `prepare` is for."""
        stop = self._last + 1 + self._alternatives
        return torch.arange(stop - count, stop, device=self.device)

    def _mask(self, tokens: Tensor) -> Tensor | None:
        """Which slots the tokens numbered (T,) attend to, (T, prefix + slots); None: to all."""
        if self._all_visible and len(tokens) == 1:
            return None
        # Each slot holds the latest token that belongs there.
        slots = torch.arange(self.slots, device=tokens.device)
        held = tokens[-1] - (tokens[-1] - slots) % self.ring
        shape = {"width": self.width, "window": self.window, "depth": self.grid.depth}
        visible = visible_mask(tokens, held, prefix=0, **shape) & (held >= 0)
        if self._alternatives:
            visible &= (held < self._last) | (held == tokens[:, None])
        return F.pad(visible, (self.prefix, 0), value=True)

    def write_first(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v (B, kv_heads, prefix + n, head_dim) of a sequence that begins."""
        count = k.shape[2] - self.prefix
        first = max(0, count - self.ring)  # no later token attends to those before
        slots = torch.arange(first, count, device=k.device) % self.ring + self.prefix
        for cached, new in ((self.keys[layer], k), (self.values[layer], v)):
            cached[:, :, : self.prefix] = new[:, :, : self.prefix]
            cached[:, :, slots] = new[:, :, self.prefix + first :].to(cached)

    def attention(self, tokens: Tensor) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """Of the `tokens` numbered (T,), all of one row.

        Called with a layer's number, q (B, heads, T, head_dim), the shape of the result, and k and
        v (B, kv_heads, T, head_dim), which are stored first.
        """
        slots: Any = tokens % self.ring + self.prefix
        if len(tokens) == 1 and eager_on_cpu(tokens):
            slots = slice(int(slots), int(slots) + 1)  # copied in half the time
        visible = self._mask(tokens)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            stored = self.keys[layer], self.values[layer]
            stored[0][:, :, slots], stored[1][:, :, slots] = k, v
            keys, values = (x[:, :, : self.prefix + self.slots] for x in stored)
            # Heads that share keys become queries of one: (B, kv_heads, groups * T, d).
            queries = q.reshape(len(q), k.shape[1], -1, q.shape[3])
            mask = None if visible is None else visible.repeat(q.shape[1] // k.shape[1], 1)
            if not eager_on_cpu(q):
                return F.scaled_dot_product_attention(queries, keys, values, mask).reshape(q.shape)
            # PyTorch's own takes 1.4 to 2 times as long for one query (512 x 4 heads of 25).
            scores = queries * q.shape[-1] ** -0.5 @ keys.mT
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            return (scores.softmax(dim=-1) @ values).view(q.shape)

        return attend


class CUDAGraphCapture:
    """Captures functions as CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function) -> Function:
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
