"""The window by FlexAttention: on a GPU one fused kernel that skips what nobody sees."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from transformer.attention import attend, covers, window_mask


@lru_cache(maxsize=8)
def block_mask(
    grid: tuple[int, int], window: int, prefix: int, device: torch.device, depth: int = 1
) -> BlockMask:
    """Who sees whom (see `window_mask`), and which blocks of pairs hold nobody who sees."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shape = {"width": grid[1], "window": window, "prefix": prefix, "depth": depth}
        return window_mask(query[None], key[None], **shape)[0, 0]

    length = prefix + grid[0] * grid[1] * depth
    # Compiled, the mask of all pairs never stands whole.
    compiled = {"_compile": True} if device.type == "cuda" else {}
    return create_block_mask(sees, None, None, length, length, device=device, **compiled)


@lru_cache(maxsize=1)
def _kernel(device_type: str):
    """FlexAttention, which is fast only where it is compiled."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def flex_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    window: int = 0,
    prefix: int = 1,
    depth: int = 1,
) -> Tensor:
    """`attend` by FlexAttention; has a backward pass on CUDA only."""
    if covers(window, grid):
        return attend(q, k, v, grid=grid, window=window, prefix=prefix, depth=depth)
    mask = block_mask(grid, window, prefix, q.device, depth)
    return _kernel(q.device.type)(q, k, v, block_mask=mask)
