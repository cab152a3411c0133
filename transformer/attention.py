"""Causal attention over a prefix and a grid of cells in raster order, with a 2-D window.

The sequence is `prefix` tokens (conditioning; no grid cells) and then the h*w cells of the
grid, row by row. A prefix token sees the prefix up to itself. Cell (i, j) sees the whole
prefix, itself, and the earlier cells (i', j') with i - i' < window and |j - j'| < window;
with window 0 all earlier cells. A cell of `depth` tokens has them one after the other: each sees
all tokens of the cells that its cell sees, and of its own cell those up to itself.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Sides of a tile in cells: large enough for efficient matrix products, small beside the window.
TILE_ROWS, TILE_COLUMNS = 8, 16
# A grid of so few cells is one tile: a second call would cost more than the mask saves.
CELLS_IN_ONE_TILE = 512
# Cells in one call: what is copied for a call, with margins, is small beside a large grid.
CELLS_A_CALL = 4096


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """PyTorch's own, in float32 on a CPU.

    There the backward pass in bfloat16 takes four times as long on short sequences (64 x 4 heads
    of 50 x 32: 18 ms against 4 ms) and is hardly faster on long ones.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=attn_mask, is_causal=is_causal
        )
    return y.type_as(q)


def window_is_full(window: int, grid: tuple[int, int]) -> bool:
    """Whether the window hides no earlier cell of the grid (h, w), so that none is needed."""
    return window == 0 or window >= max(grid)


def window_mask(
    queries: Tensor, keys: Tensor, *, width: int, window: int, prefix: int, depth: int = 1
) -> Tensor:
    """Who sees whom: True at [q, k] where sequence position queries[q] sees keys[k].

    Args:
        queries: (Q,) positions in the sequence; 0 .. prefix - 1 are the prefix.
        keys: (S,) positions in the sequence.
        width: cells in a row of the grid.
        window: extent of the window in cells; 0 for none.
        prefix: number of prefix tokens.
        depth: tokens in a cell.

    Returns:
        (Q, S), bool.
    """
    q, k = queries[:, None], keys[None, :]
    causal = k <= q
    if window == 0:
        return causal
    cell_q, cell_k = (q - prefix) // depth, (k - prefix) // depth
    row_q, column_q = cell_q // width, cell_q % width
    row_k, column_k = cell_k // width, cell_k % width
    near = (row_q - row_k < window) & ((column_q - column_k).abs() < window)
    return causal & (near | (k < prefix))


class _Tiling(NamedTuple):
    """How a grid is cut: tiles of queries, and the margins around each that its cells also see.

    Columns are counted in tokens here, `depth` of them in a cell; the window in cells.
    """

    grid: tuple[int, int]
    depth: int
    window: int
    prefix: int
    rows: int  # of a tile
    columns: int
    halo: int  # rows above a tile that its cells see
    side: int  # columns to its left, and to its right

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
    if height * width <= CELLS_IN_ONE_TILE:
        return _Tiling(grid, depth, window, prefix, height, width, halo, 0)
    columns = max(-(-TILE_COLUMNS // depth) * depth, side)  # whole cells
    if columns + 2 * side >= width:
        columns, side = width, 0
    rows = max(TILE_ROWS * TILE_COLUMNS // columns, halo, 1)
    return _Tiling(grid, depth, window, prefix, min(rows, height), columns, halo, side)


@lru_cache(maxsize=32)
def _tile_mask(tiling: _Tiling, halo: int, device: torch.device) -> Tensor:
    """Who sees whom in the tiles of one band: (across, rows*columns, prefix + keys), bool.

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
    cells = (earlier & near & inside).flatten(3).flatten(1, 2)
    return F.pad(cells, (tiling.prefix, 0), value=True)


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
    """Causal attention over `prefix` tokens and the cells of `grid`, exact for every window.

    Without a window this is one causal call. With one, the grid is cut into tiles: a tile, the
    rows above it and the columns beside it that the window reaches hold all that its cells see.
    Time and memory grow with the number of cells; no mask over all pairs of them ever exists.

    Args:
        q, k, v: (B, heads, prefix + h*w*depth, head_dim).
        grid: rows and columns (h, w).
        window: extent of the window in cells; 0 for none.
        prefix: number of prefix tokens, at least 1.
        depth: tokens in a cell.

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
    if window_is_full(window, grid):
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    tiling = _tile(grid, depth, window, prefix)
    before = [x[:, :, :prefix] for x in (q, k, v)]
    outputs = [scaled_dot_product_attention(*before, is_causal=True)]
    # The first band of tiles has no rows above it; of the others many go into one call.
    bands = max(1, CELLS_A_CALL // (tiling.rows * width))
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
    """Attention of some rows of cells to the prefix, to themselves and to the rows above them.

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
        """Rows of cells -> (B, heads, bands, across, cells of a tile and its margins, d)."""
        missing_rows, missing_columns = bands * rows - height, across * columns - width
        x = F.pad(x, (0, 0, beside, beside + missing_columns, 0, missing_rows))
        x = x.unfold(2, above + rows, rows).unfold(3, columns + 2 * beside, columns)
        return x.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)

    def keyed(x: Tensor, x_prefix: Tensor) -> Tensor:
        """What each tile sees: (B*heads*bands, across, prefix + keys, d)."""
        cells = cut(x, halo, side)
        before = x_prefix[:, :, None, None].expand(*cells.shape[:4], -1, -1)
        return torch.cat([before, cells], dim=4).flatten(0, 2)

    y = scaled_dot_product_attention(
        cut(q, 0, 0).flatten(0, 2),
        keyed(k, k_prefix),
        keyed(v, v_prefix),
        attn_mask=_tile_mask(tiling, halo, q.device)[None],
    )
    y = y.view(batch, heads, bands, across, rows, columns, dim).transpose(3, 4)
    y = y.reshape(batch, heads, bands * rows, across * columns, dim)
    return y[:, :, :height, :width].flatten(2, 3)
