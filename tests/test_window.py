"""Windowed attention against the definition, written out pair by pair."""

import pytest
import torch
from torch import Tensor

from transformer import attention
from transformer.attention import attend, window_mask

GRIDS = {"square": (6, 6), "wide": (3, 40), "tall": (23, 4), "large": (19, 37)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def sees(query: int, key: int, width: int, window: int, prefix: int) -> bool:
    """The definition at the head of transformer/attention.py, for one pair of positions."""
    if key > query:
        return False
    if key < prefix or window == 0:
        return True
    (i, j), (i_key, j_key) = divmod(query - prefix, width), divmod(key - prefix, width)
    return i - i_key < window and abs(j - j_key) < window


def dense_mask(grid: tuple[int, int], window: int, prefix: int) -> Tensor:
    length = prefix + grid[0] * grid[1]
    return torch.tensor(
        [[sees(q, k, grid[1], window, prefix) for k in range(length)] for q in range(length)]
    )


def brute_force(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [0, 1, 3, 9, 50])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_forward_and_gradients_are_those_of_the_definition(
    grid: tuple[int, int],
    window: int,
    prefix: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "CELLS_IN_ONE_TILE", 64)
    length = prefix + grid[0] * grid[1]
    one = [torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    two = [x.detach().double().requires_grad_() for x in one]
    weights = torch.randn(2, 3, length, 8, dtype=dtype)
    ours = attend(*one, grid=grid, window=window, prefix=prefix)
    theirs = brute_force(*two, dense_mask(grid, window, prefix))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCE[dtype])
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("window", [1, 3, 6])
def test_tiles_of_any_size_give_the_same(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles lower than the window once cut rows from above the grid."""
    grid, x = (13, 17), torch.randn(3, 1, 2, 2 + 13 * 17, 8, dtype=torch.float64)
    mask = dense_mask(grid, window, 2)
    for rows, columns in ((1, 1), (2, 4), (4, 16)):
        monkeypatch.setattr(attention, "TILE_ROWS", rows)
        monkeypatch.setattr(attention, "TILE_COLUMNS", columns)
        monkeypatch.setattr(attention, "CELLS_A_CALL", 60)
        monkeypatch.setattr(attention, "CELLS_IN_ONE_TILE", 0)
        y = attend(*x, grid=grid, window=window, prefix=2)
        torch.testing.assert_close(y, brute_force(*x, mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [0, 2, 7])
def test_the_mask_of_single_queries_is_the_definition(window: int) -> None:
    grid, prefix = (5, 6), 3
    positions = torch.arange(prefix + 30)
    mask = window_mask(positions, positions, width=6, window=window, prefix=prefix)
    assert torch.equal(mask, dense_mask(grid, window, prefix))


def test_a_wrong_length_is_refused() -> None:
    x = torch.zeros(1, 1, 10, 4)
    with pytest.raises(ValueError, match="3\\*3"):
        attend(x, x, x, grid=(3, 3), prefix=2)
