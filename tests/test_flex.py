"""The window by FlexAttention: its mask against the definition, its result against ours."""

import pytest
import torch

from tests.test_drawing import make_model, some_indices
from tests.test_window import dense_mask
from transformer import flex
from transformer.attention import attend
from transformer.flex import block_mask, flex_attend, flex_attend_on

GRIDS = [(13, 17), (3, 50), (40, 5)]


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_the_window(grid: tuple[int, int], window: int, prefix: int) -> None:
    length = prefix + grid[0] * grid[1]
    mask = block_mask(grid, window, prefix, torch.device("cpu"))
    positions = torch.arange(length)
    sees = torch.vmap(
        torch.vmap(lambda q, k: mask.mask_mod(None, None, q, k), (None, 0)), (0, None)
    )
    assert torch.equal(sees(positions, positions), dense_mask(grid, window, prefix))
    q, k, v = torch.randn(3, 2, 2, length, 16)
    ours = attend(q, k, v, grid=grid, window=window, prefix=prefix)
    theirs = flex_attend(q, k, v, grid=grid, window=window, prefix=prefix)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_blocks_that_nobody_sees_are_left_out() -> None:
    mask = block_mask((64, 64), 4, 1, torch.device("cpu"))
    assert mask.sparsity() > 85


def test_the_mask_is_made_once() -> None:
    one = block_mask((8, 9), 2, 1, torch.device("cpu"))
    assert block_mask((8, 9), 2, 1, torch.device("cpu")) is one


def test_a_mask_that_an_evaluation_made_serves_training() -> None:
    """Tensors that inference mode made cannot be kept for a backward pass."""
    block_mask.cache_clear()
    with torch.inference_mode():
        mask = block_mask((8, 9), 2, 1, torch.device("cpu"))
    assert not any(x.is_inference() for x in mask.as_tuple() if isinstance(x, torch.Tensor))


def test_a_compiled_model_does_not_make_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler passes by the cache of masks, and made the mask part of every pass."""
    model = make_model((5, 6), window=2, dtype=torch.float32)
    prefix, indices = some_indices((5, 6))
    device = torch.device("cpu")
    with torch.no_grad():
        expected = model(prefix, indices)
        model.attend = flex_attend_on(device, grid=(5, 6), window=2)
        monkeypatch.setattr(flex, "block_mask", None)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(prefix, indices), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_are_ours() -> None:
    shape = {"grid": (33, 40), "window": 5, "prefix": 1}
    one = [torch.randn(1, 2, 1321, 64, device="cuda", requires_grad=True) for _ in range(3)]
    two = [x.detach().clone().requires_grad_() for x in one]
    weights = torch.randn(1, 2, 1321, 64, device="cuda")
    (attend(*one, **shape) * weights).sum().backward()
    (flex_attend(*two, **shape) * weights).sum().backward()
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-2, atol=1e-2)
