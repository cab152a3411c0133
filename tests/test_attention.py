"""Attention with the 2-D window against a mask written out cell by cell."""

import pytest
import torch
import torch.nn.functional as F

from transformer.attention import attend, window_mask

GRIDS = [(7, 7), (4, 40), (40, 4), (33, 20), (1, 9), (9, 1)]


def brute_force_mask(grid: tuple[int, int], window: int, prefix: int) -> torch.Tensor:
    """Straight from the definition: itself and earlier cells less than `window` away."""
    height, width = grid
    length = prefix + height * width
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(query + 1):
            if key < prefix or window == 0:
                mask[query, key] = True
                continue
            i, j = divmod(query - prefix, width)
            k, m = divmod(key - prefix, width)
            mask[query, key] = i - k < window and abs(j - m) < window
    return mask


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("grid", GRIDS)
def test_attention_is_that_of_the_mask(grid: tuple[int, int], window: int, prefix: int) -> None:
    torch.manual_seed(0)
    mask = brute_force_mask(grid, window, prefix)
    positions = torch.arange(len(mask))
    made = window_mask(positions, positions, width=grid[1], window=window, prefix=prefix)
    assert made.equal(mask)
    q, k, v = torch.randn(3, 2, 2, len(mask), 8, dtype=torch.float64).requires_grad_()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    result = attend(q, k, v, grid=grid, window=window, prefix=prefix)
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(result)
    gradients = torch.autograd.grad((result * weights).sum(), [q, k, v])
    wanted = torch.autograd.grad((expected * weights).sum(), [q, k, v])
    torch.testing.assert_close(gradients, wanted)


def test_a_change_outside_the_window_changes_nothing() -> None:
    grid, window, prefix = (20, 30), 3, 1
    q, k, v = torch.randn(3, 1, 1, prefix + 600, 4, dtype=torch.float64)
    before = attend(q, k, v, grid=grid, window=window, prefix=prefix)
    row, column = 9, 14
    v[0, 0, prefix + row * 30 + column] += 1
    changed = attend(q, k, v, grid=grid, window=window, prefix=prefix) != before
    where = changed[0, 0, prefix:].any(dim=-1).view(grid).nonzero().tolist()
    sees = [
        [i, j]
        for i in range(row, row + window)
        for j in range(column - window + 1, column + window)
        if (i, j) >= (row, column)
    ]
    assert where == sees


def test_the_prefix_is_seen_from_everywhere_and_is_no_cell() -> None:
    grid, window = (20, 30), 2
    q, k, v = torch.randn(3, 1, 1, 601, 4, dtype=torch.float64)
    before = attend(q, k, v, grid=grid, window=window, prefix=1)
    v[0, 0, 0] += 1
    changed = attend(q, k, v, grid=grid, window=window, prefix=1) != before
    assert changed.any(dim=-1).all()


def test_a_wrong_length_is_refused() -> None:
    q = torch.zeros(1, 1, 10, 4)
    with pytest.raises(ValueError, match=r"1 \+ 2\*4 = 9 tokens, got 10"):
        attend(q, q, q, grid=(2, 4), window=2, prefix=1)
