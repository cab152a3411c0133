"""Causal attention over a prefix and a grid of cells in raster order, with a 2-D window.

The sequence is `prefix` tokens (conditioning; no grid cells) and then the h*w cells of the
grid, row by row. A prefix token sees the prefix up to itself. Cell (i, j) sees the whole
prefix, itself, and the earlier cells (i', j') with i - i' < window and |j - j'| < window;
with window 0 all earlier cells.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Cells in a block of rows: enough for the matrix products to be efficient on small windows.
CELLS_A_BLOCK = 128


def _scaled_dot_product_attention(
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


def covers(window: int, grid: tuple[int, int]) -> bool:
    """Whether the window hides no earlier cell of the grid (h, w), so that none is needed."""
    return window == 0 or window >= max(grid)


def window_mask(queries: Tensor, keys: Tensor, *, width: int, window: int, prefix: int) -> Tensor:
    """Who sees whom: True at [q, k] where sequence position queries[q] sees keys[k].

    Args:
        queries: (Q,) positions in the sequence; 0 .. prefix - 1 are the prefix.
        keys: (S,) positions in the sequence.
        width: cells in a row of the grid.
        window: extent of the window in cells; 0 for none.
        prefix: number of prefix tokens.

    Returns:
        (Q, S), bool.
    """
    q, k = queries[:, None], keys[None, :]
    causal = k <= q
    if window == 0:
        return causal
    row_q, column_q = (q - prefix) // width, (q - prefix) % width
    row_k, column_k = (k - prefix) // width, (k - prefix) % width
    near = (row_q - row_k < window) & ((column_q - column_k).abs() < window)
    return causal & (near | (k < prefix))


@lru_cache(maxsize=32)
def _mask(
    first_query: int,
    first_key: int,
    stop: int,
    width: int,
    window: int,
    prefix: int,
    device: torch.device,
) -> Tensor:
    """`window_mask` of queries [first_query, stop) over the prefix and keys [first_key, stop)."""
    queries = torch.arange(first_query, stop, device=device)
    keys = torch.cat(
        [torch.arange(prefix, device=device), torch.arange(first_key, stop, device=device)]
    )
    return window_mask(queries, keys, width=width, window=window, prefix=prefix)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    window: int = 0,
    prefix: int = 1,
) -> Tensor:
    """Causal attention over `prefix` tokens and the cells of `grid`, exact for every window.

    Without a window this is one causal call. With one, the grid is cut into blocks of rows:
    a block and the window - 1 rows above it hold all that its cells see, so that time and
    memory grow with the number of rows and no mask over all pairs of cells ever exists.

    Args:
        q, k, v: (B, heads, prefix + h*w, head_dim).
        grid: rows and columns (h, w).
        window: extent of the window in cells; 0 for none.
        prefix: number of prefix tokens, at least 1.

    Returns:
        (B, heads, prefix + h*w, head_dim).
    """
    height, width = grid
    if q.shape[2] != prefix + height * width:
        raise ValueError(
            f"expected {prefix} + {height}*{width} = {prefix + height * width} tokens, "
            f"got {q.shape[2]}"
        )
    if covers(window, grid):
        return _scaled_dot_product_attention(q, k, v, is_causal=True)

    halo = min(window, height) - 1  # rows above a block that its cells still see
    rows = max(halo, -(-CELLS_A_BLOCK // width), 1)  # rows in a block
    top = prefix + min(rows, height) * width  # end of the first block in the sequence
    mask = _mask(0, prefix, top, width, window, prefix, q.device)
    first = _scaled_dot_product_attention(
        q[:, :, :top], k[:, :, :top], v[:, :, :top], attn_mask=mask
    )
    if rows >= height:
        return first

    # All other blocks look alike, so that one mask serves them in one call.
    blocks = -(-(height - rows) // rows)
    missing = (rows + blocks * rows - height) * width  # cells that fill up the last block
    start, size = prefix + (rows - halo) * width, (rows + halo) * width

    def keyed(x: Tensor) -> Tensor:
        """(B, heads, T, d) -> (B, blocks, heads, prefix + size, d): what each block may see."""
        cells = F.pad(x[:, :, start:], (0, 0, 0, missing)).unfold(2, size, rows * width)
        cells = cells.permute(0, 2, 1, 4, 3)  # (B, blocks, heads, size, d)
        before = x[:, :, :prefix].unsqueeze(1).expand(-1, blocks, -1, -1, -1)
        return torch.cat([before, cells], dim=3)

    batch, heads, _, dim = q.shape
    queries = F.pad(q[:, :, top:], (0, 0, 0, missing))  # (B, heads, blocks*rows*w, d)
    queries = queries.view(batch, heads, blocks, rows * width, dim).transpose(1, 2)
    first_query = prefix + halo * width  # of a block whose keys start right after the prefix
    mask = _mask(first_query, prefix, prefix + size, width, window, prefix, q.device)
    rest = _scaled_dot_product_attention(
        queries.flatten(0, 1),
        keyed(k).flatten(0, 1),
        keyed(v).flatten(0, 1),
        attn_mask=mask,
    )
    rest = rest.view(batch, blocks, heads, rows * width, dim).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, : q.shape[2] - top]], dim=2)


class KVCache:
    """Keys and values of all layers for one batch of sequences, allocated once.

    Attributes:
        keys, values: (num_layers, B, heads, length, head_dim).
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        length: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_layers, batch_size, num_heads, length, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, position: int, mask: Tensor | None
    ) -> Tensor:
        """Store k and v of the tokens from `position` on, and let q look at all until then.

        Args:
            q, k, v: (B, heads, n, head_dim) of the tokens position .. position + n - 1.
            mask: (n, position + n), who sees whom; None: all see all that is stored.

        Returns:
            (B, heads, n, head_dim).
        """
        stop = position + k.shape[2]
        self.keys[layer, :, :, position:stop] = k
        self.values[layer, :, :, position:stop] = v
        return _scaled_dot_product_attention(
            q, self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop], attn_mask=mask
        )
