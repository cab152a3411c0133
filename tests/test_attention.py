"""Windowed attention, in tiles and by FlexAttention, against the definition pair by pair."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.test_kv_cache import make_model, some_input
from transformer import GPT, FlexAttention, attention
from transformer.attention import attend, visible_mask

# grid and tokens per position
GRIDS = {
    "square": ((6, 6), 1),
    "wide": ((3, 40), 1),
    "tall": ((23, 4), 1),
    "large": ((11, 37), 1),
    "square, residual": ((6, 6), 2),
    "wide, residual": ((3, 40), 3),
    "tall, residual": ((23, 4), 2),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def sees(query: int, key: int, width: int, window: int, prefix: int, depth: int) -> bool:
    """The definition at the head of transformer/attention.py, for one pair of positions."""
    if key > query:
        return False
    if key < prefix or window == 0:
        return True
    position, position_key = (query - prefix) // depth, (key - prefix) // depth
    (i, j), (i_key, j_key) = divmod(position, width), divmod(position_key, width)
    return i - i_key < window and abs(j - j_key) < window


@cache
def dense_mask(grid: tuple[int, int], window: int, prefix: int, depth: int = 1) -> Tensor:
    length = prefix + grid[0] * grid[1] * depth
    shape = (grid[1], window, prefix, depth)
    return torch.tensor([[sees(q, k, *shape) for k in range(length)] for q in range(length)])


def brute_force(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [0, 1, 3, 9, 50])
@pytest.mark.parametrize(("grid", "depth"), GRIDS.values(), ids=GRIDS)
def test_forward_and_gradients_are_those_of_the_definition(
    grid: tuple[int, int],
    depth: int,
    window: int,
    prefix: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "TOKENS_IN_ONE_TILE", 64)
    length = prefix + grid[0] * grid[1] * depth
    one = [torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    two = [x.detach().double().requires_grad_() for x in one]
    weights = torch.randn(2, 3, length, 8, dtype=dtype)
    ours = attend(*one, grid=grid, window=window, prefix=prefix, depth=depth)
    theirs = brute_force(*two, dense_mask(grid, window, prefix, depth))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCE[dtype])
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("window", [1, 3, 6])
def test_tiles_of_any_size_give_the_same(
    window: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles lower than the window once cut rows from above the grid."""
    grid, x = (13, 17), torch.randn(3, 1, 2, 2 + 13 * 17 * depth, 8, dtype=torch.float64)
    mask = dense_mask(grid, window, 2, depth)
    for rows, columns in ((1, 1), (2, 4), (4, 16)):
        monkeypatch.setattr(attention, "TILE_ROWS", rows)
        monkeypatch.setattr(attention, "TILE_COLUMNS", columns)
        monkeypatch.setattr(attention, "TOKENS_PER_CALL", 60)
        monkeypatch.setattr(attention, "TOKENS_IN_ONE_TILE", 0)
        y = attend(*x, grid=grid, window=window, prefix=2, depth=depth)
        torch.testing.assert_close(y, brute_force(*x, mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("window", [0, 2, 7])
def test_the_mask_of_single_queries_is_the_definition(window: int, depth: int) -> None:
    grid, prefix = (5, 6), 3
    positions = torch.arange(prefix + 30 * depth)
    shape = {"width": 6, "window": window, "prefix": prefix, "depth": depth}
    mask = visible_mask(positions, positions, **shape)
    assert torch.equal(mask, dense_mask(grid, window, prefix, depth))


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


def test_the_prefix_is_seen_from_everywhere_and_has_no_position() -> None:
    grid, window = (20, 30), 2
    q, k, v = torch.randn(3, 1, 1, 601, 4, dtype=torch.float64)
    before = attend(q, k, v, grid=grid, window=window, prefix=1)
    v[0, 0, 0] += 1
    changed = attend(q, k, v, grid=grid, window=window, prefix=1) != before
    assert changed.any(dim=-1).all()


def test_a_wrong_length_is_refused() -> None:
    x = torch.zeros(1, 1, 10, 4)
    with pytest.raises(ValueError, match="3\\*3"):
        attend(x, x, x, grid=(3, 3), prefix=2)


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("grid", [(13, 17), (3, 50), (40, 5)])
def test_flex_attention_is_the_window(grid: tuple[int, int], window: int, prefix: int) -> None:
    length = prefix + grid[0] * grid[1]
    shape = {"grid": grid, "window": window, "prefix": prefix, "depth": 1}
    flex = FlexAttention(torch.device("cpu"), **shape)
    positions = torch.arange(length)
    sees = torch.vmap(
        torch.vmap(lambda q, k: flex.mask.mask_mod(None, None, q, k), (None, 0)), (0, None)
    )
    assert torch.equal(sees(positions, positions), dense_mask(grid, window, prefix))
    q, k, v = torch.randn(3, 2, 2, length, 16)
    ours = attend(q, k, v, **shape)
    torch.testing.assert_close(flex(q, k, v, **shape), ours, rtol=1e-4, atol=1e-5)


def test_blocks_that_nobody_sees_are_left_out() -> None:
    flex = FlexAttention(torch.device("cpu"), grid=(64, 64), window=4)
    assert flex.mask.sparsity() > 85


def test_a_compiled_model_does_not_make_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler passes by the cache of masks, and made the mask part of every pass."""
    model = make_model((5, 6), window=2, dtype=torch.float32)
    prefix, indices = some_input(model)
    flex = GPT(model.config, FlexAttention(torch.device("cpu"), grid=(5, 6), window=2)).eval()
    flex.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.loss(prefix, indices)
        monkeypatch.setattr(torch.nn.attention.flex_attention, "create_block_mask", None)
        monkeypatch.setattr(attention, "_attend_rows", None)
        torch._dynamo.reset()
        loss = torch.compile(flex.loss, backend="eager", fullgraph=True)
        torch.testing.assert_close(loss(prefix, indices), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(copy.deepcopy(flex).attend, FlexAttention)  # as an average of weights does


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_are_ours() -> None:
    shape = {"grid": (33, 40), "window": 5, "prefix": 1, "depth": 1}
    one = [torch.randn(1, 2, 1321, 64, device="cuda", requires_grad=True) for _ in range(3)]
    two = [x.detach().clone().requires_grad_() for x in one]
    weights = torch.randn(1, 2, 1321, 64, device="cuda")
    (attend(*one, **shape) * weights).sum().backward()
    (FlexAttention(torch.device("cuda"), **shape)(*two, **shape) * weights).sum().backward()
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-2, atol=1e-2)
