"""Causal attention over a prefix and a grid in raster order, with a 2-D window.

A sequence is P tokens of prefix (conditioning) and then the latent grid row by row, `depth` tokens
per latent position. A prefix token attends to the prefix up to itself. A token at (i, j) attends
to the whole prefix, and to itself and the earlier tokens at (i', j') with i - i' < window and
|j - j'| < window; with window 0 to all earlier tokens. `attend` computes this tile by tile on
any device, `FlexAttention` in one fused kernel on CUDA.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.rope import visible_mask, window_is_full

# Sides of a tile in latent positions: large enough for efficient matrix products, small beside
# the window.
TILE_ROWS, TILE_COLUMNS = 8, 16
# A grid of so few tokens is one tile: a second call would cost more than the mask saves.
TOKENS_IN_ONE_TILE = 512
# Tokens per call: what is copied for a call, with margins, is small beside a large grid.
TOKENS_PER_CALL = 4096


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """PyTorch's own, in float32 on a CPU, where a training step in bfloat16 takes 31 % longer."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=attn_mask, is_causal=is_causal
        )
    return y.type_as(q)


class _Tiling(NamedTuple):
    """How a grid is cut: tiles of queries, and the margins of keys around each tile.

    Columns are counted in tokens, `depth` per latent position; the window in latent positions.
    """

    grid: tuple[int, int]
    depth: int
    window: int
    prefix: int
    rows: int  # of a tile
    columns: int
    halo: int  # rows of keys above a tile
    side: int  # columns of keys to its left, and to its right

    @property
    def across(self) -> int:
        """Tiles beside each other."""
        return -(-self.grid[1] // self.columns)


def _tile(grid: tuple[int, int], depth: int, window: int, prefix: int) -> _Tiling:
    """Tiles of about TILE_ROWS x TILE_COLUMNS; as wide as the grid where margins would not pay."""
    height, width = grid
    halo, side = min(window, height) - 1, min(window, width) - 1
    width, side = width * depth, side * depth
    grid = height, width
    if height * width <= TOKENS_IN_ONE_TILE:
        return _Tiling(grid, depth, window, prefix, height, width, halo, 0)
    columns = max(-(-TILE_COLUMNS // depth) * depth, side)  # whole latent positions
    if columns + 2 * side >= width:
        columns, side = width, 0
    rows = max(TILE_ROWS * TILE_COLUMNS // columns, halo, 1)
    return _Tiling(grid, depth, window, prefix, min(rows, height), columns, halo, side)


@lru_cache(maxsize=32)
def _tile_mask(tiling: _Tiling, halo: int, device: torch.device) -> Tensor:
    """`visible_mask` in the tiles of one band: (across, rows*columns, prefix + keys), bool.

    Args:
        halo: rows of keys above the tiles; 0 for the first band, `tiling.halo` for all others.
    """
    width, columns, side = tiling.grid[1], tiling.columns, tiling.side
    rows = torch.arange(tiling.rows, device=device)
    column = torch.arange(tiling.across, device=device)[:, None] * columns
    column_q = column + torch.arange(columns, device=device)  # (across, columns)
    column_k = column + torch.arange(-side, columns + side, device=device)
    down = rows[:, None] - torch.arange(-halo, tiling.rows, device=device)  # row_q - row_k
    before = column_q[:, :, None] >= column_k[:, None, :]
    beside = column_q[:, :, None] // tiling.depth - column_k[:, None, :] // tiling.depth
    # (across, rows, columns, rows of keys, columns of keys)
    down, before, beside = (
        down[None, :, None, :, None],
        before[:, None, :, None, :],
        beside[:, None, :, None, :],
    )
    earlier = (down > 0) | ((down == 0) & before)
    near = (down < tiling.window) & (beside.abs() < tiling.window)
    inside = ((column_k >= 0) & (column_k < width))[:, None, None, None, :]
    visible = (earlier & near & inside).flatten(3).flatten(1, 2)
    return F.pad(visible, (tiling.prefix, 0), value=True)


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
    """Causal attention over `prefix` tokens and a grid, exact for every window.

    Without a window this is one causal call. With one, the grid is cut into tiles: the keys of a
    tile are the tile itself, and the rows above it and columns beside it that the window reaches.
    Time and memory grow with the number of tokens; a mask over all pairs of them never exists.

    Args:
        q, k, v: (B, heads, prefix + h*w*depth, head_dim).
        grid: rows and columns (h, w).
        window: extent of the window in latent positions; 0 for none.
        prefix: number of prefix tokens, at least 1.
        depth: tokens per latent position.

    Returns:
        (B, heads, prefix + h*w*depth, head_dim).

    Raises:
        ValueError: the tensors have another length, or there is no prefix.
    """
    height, width = grid[0], grid[1] * depth
    if q.shape[2] != prefix + height * width or prefix < 1:
        raise ValueError(
            f"expected {max(prefix, 1)} + {height}*{width} = {max(prefix, 1) + height * width} "
            f"tokens, got {q.shape[2]}"
        )
    if height == 0 or window_is_full(window, grid):
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    tiling = _tile(grid, depth, window, prefix)
    before = q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix]
    outputs = [scaled_dot_product_attention(*before, is_causal=True)]
    # The first band of tiles has no rows above it; of the others many go into one call.
    bands = max(1, TOKENS_PER_CALL // (tiling.rows * width))
    sizes = [min(tiling.rows, height)]
    while sum(sizes) < height:
        sizes.append(min(bands * tiling.rows, height - sum(sizes)))
    # Split, not sliced: the gradients of all parts are then joined once.
    parts = [x[:, :, prefix:].unflatten(2, tiling.grid).split(sizes, dim=2) for x in (q, k, v)]
    above: list[Tensor] | None = None
    for q_rows, *key_rows in zip(*parts, strict=True):
        if above is None or tiling.halo == 0:
            k_rows, v_rows = key_rows
        else:
            k_rows, v_rows = (
                torch.cat([old[:, :, -tiling.halo :], new], dim=2)
                for old, new in zip(above, key_rows, strict=True)
            )
        outputs.append(_attend_rows(q_rows, k_rows, v_rows, before[1], before[2], tiling))
        above = key_rows
    return torch.cat(outputs, dim=2)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, tiling: _Tiling
) -> Tensor:
    """Attention of some rows of the grid to the prefix, to themselves and to the rows above.

    Args:
        q: (B, heads, rows, w, d).
        k, v: (B, heads, halo + rows, w, d); in the first rows of the grid halo is 0.
        k_prefix, v_prefix: (B, heads, prefix, d).

    Returns:
        (B, heads, rows * w, d).
    """
    batch, heads, height, width, dim = q.shape
    halo, side = k.shape[2] - height, tiling.side
    rows, columns, across = tiling.rows, tiling.columns, tiling.across
    bands = -(-height // rows)

    def cut(x: Tensor, above: int, beside: int) -> Tensor:
        """Rows of the grid -> (B, heads, bands, across, tokens of a tile and its margins, d)."""
        missing_rows, missing_columns = bands * rows - height, across * columns - width
        x = F.pad(x, (0, 0, beside, beside + missing_columns, 0, missing_rows))
        x = x.unfold(2, above + rows, rows).unfold(3, columns + 2 * beside, columns)
        return x.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)

    def keyed(x: Tensor, x_prefix: Tensor) -> Tensor:
        """Prefix and keys of each tile: (B*heads*bands, across, prefix + keys, d)."""
        tiles = cut(x, halo, side)
        before = x_prefix[:, :, None, None].expand(*tiles.shape[:4], -1, -1)
        return torch.cat([before, tiles], dim=4).flatten(0, 2)

    y = scaled_dot_product_attention(
        cut(q, 0, 0).flatten(0, 2),
        keyed(k, k_prefix),
        keyed(v, v_prefix),
        attn_mask=_tile_mask(tiling, halo, q.device)[None],
    )
    y = y.view(batch, heads, bands, across, rows, columns, dim).transpose(3, 4)
    y = y.reshape(batch, heads, bands * rows, across * columns, dim)
    return y[:, :, :height, :width].flatten(2, 3)


@lru_cache(maxsize=8)
def block_mask(
    grid: tuple[int, int], window: int, prefix: int, depth: int, device: torch.device
) -> Any:
    """`visible_mask` as a FlexAttention `BlockMask`, whose empty blocks are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask  # takes half a second

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shape = {"width": grid[1], "window": window, "prefix": prefix, "depth": depth}
        return visible_mask(query[None], key[None], **shape)[0, 0]

    length = prefix + grid[0] * grid[1] * depth
    # Compiled, the mask of all pairs is never materialised.
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    # A mask first made under inference mode must serve a later training step as well.
    with torch.inference_mode(False), torch.no_grad():
        return make(visible, None, None, length, length, device=device)


class FlexAttention:
    """`attend` as one fused kernel (arXiv 2412.05496); it has a backward pass on CUDA only.

    The mask of one grid is made at construction: inside a compiled model, which bypasses the cache
    of masks, it would otherwise be made again in every pass.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        grid: tuple[int, int],
        window: int,
        prefix: int = 1,
        depth: int = 1,
    ) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        # Only the compiled kernel is fast.
        self.kernel = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
        self.shape = {"grid": tuple(grid), "window": window, "prefix": prefix, "depth": depth}
        self.mask = (
            None if window_is_full(window, grid) else block_mask(**self.shape, device=device)
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **shape: Any) -> Tensor:
        """Like `attend`; a grid of another shape is left to `attend`."""
        if self.mask is None or shape != self.shape:
            return attend(q, k, v, **shape)
        return self.kernel(q, k, v, block_mask=self.mask)
