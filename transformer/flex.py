"""The window by FlexAttention: on a GPU one fused kernel that skips what nobody sees."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from transformer.attention import attend, window_is_full, window_mask


@lru_cache(maxsize=8)
def block_mask(
    grid: tuple[int, int], window: int, prefix: int, device: torch.device, depth: int = 1
) -> BlockMask:
    """Visibility (see `window_mask`), and which blocks are empty."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shape = {"width": grid[1], "window": window, "prefix": prefix, "depth": depth}
        return window_mask(query[None], key[None], **shape)[0, 0]

    length = prefix + grid[0] * grid[1] * depth
    # Compiled, the mask of all pairs never stands whole.
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    # The mask stays for later calls: made by an evaluation, a training must still accept it.
    with torch.inference_mode(False), torch.no_grad():
        return make(sees, None, None, length, length, device=device)


@lru_cache(maxsize=1)
def _kernel(device_type: str) -> Callable[..., Tensor]:
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
    if window_is_full(window, grid):
        return attend(q, k, v, grid=grid, window=window, prefix=prefix, depth=depth)
    mask = block_mask(grid, window, prefix, q.device, depth)
    return _kernel(q.device.type)(q, k, v, block_mask=mask)


def flex_attend_on(
    device: torch.device, *, grid: tuple[int, int], window: int, prefix: int = 1, depth: int = 1
) -> Callable[..., Tensor]:
    """`flex_attend` with the mask of one grid made now, for a model that is to be compiled.

    A compiler does not know of the cache of masks: it would make the mask in every pass.

    Returns:
        what takes the arguments of `attend`; grids of another shape go to `flex_attend`.
    """
    shape = {"grid": tuple(grid), "window": window, "prefix": prefix, "depth": depth}
    if window_is_full(window, grid):
        return attend
    mask, kernel = block_mask(**shape, device=device), _kernel(device.type)

    def attend_masked(q: Tensor, k: Tensor, v: Tensor, **asked: object) -> Tensor:
        return kernel(q, k, v, block_mask=mask) if asked == shape else flex_attend(q, k, v, **asked)

    return attend_masked
