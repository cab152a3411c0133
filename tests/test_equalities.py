"""Two ways to the same result: cached and whole, ring and full cache, batch and single rows.

Over square, wide and tall grids, windows of 0, 1, 3 and more than the grid, prefixes of 1 and 5
(a class and a condition of 2x2 cells), one and two indices a cell, in float64 and float32.
"""

import pytest
import torch
from torch import Tensor

from transformer import GPT, GPTConfig, Guidance, generate, make_prefix
from transformer.cache import KVCache
from transformer.positions import PositionExtension

GRIDS = {"square": (4, 4), "wide": (2, 8), "tall": (8, 2)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-4}
CODES, CLASSES, CONDITIONS = 11, 3, 7


def make_model(
    grid: tuple[int, int] = (4, 4),
    *,
    window: int = 0,
    prefix: int = 1,
    depth: int = 1,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> GPT:
    """A model whose logits depend on everything: all its weights are drawn."""
    torch.manual_seed(0)
    shape = {"num_layers": 2, "num_heads": 4, "dim": 32} | options
    if prefix > 1:
        shape |= {"condition_codebook_size": CONDITIONS, "condition_latent_dim": (2, 2)}
    config = GPTConfig(
        codebook_size=CODES,
        num_classes=CLASSES,
        latent_dim=grid,
        depth=depth,
        window_size=window,
        **shape,
    )
    model = GPT(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def some_input(model: GPT, count: int = 3) -> tuple[Tensor, Tensor]:
    """Prefix and indices; one class and one condition are unknown."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    conditions = None
    if config.condition_latent_dim is not None:
        conditions = torch.randint(CONDITIONS, (count, 2, 2), generator=generator)
        conditions[-1] = config.no_condition
    prefix = make_prefix(torch.arange(count) % (CLASSES + 1), conditions)
    shape = (*config.latent_dim, config.depth)[: 2 if config.depth == 1 else 3]
    return prefix, torch.randint(CODES, (count, *shape), generator=generator)


@torch.inference_mode()
def step_by_step(model: GPT, prefix: Tensor, indices: Tensor, cache: KVCache) -> Tensor:
    """Logits of all tokens, each from a step of its own."""
    tokens, first = indices.flatten(1), model.config.prefix_length
    logits = [model.step(prefix, 0, cache)]
    for token in range(tokens.shape[1] - 1):
        logits.append(model.step(tokens[:, token], first + token, cache))
    return torch.stack(logits, dim=1)


def full_cache(model: GPT, batch_size: int) -> KVCache:
    """A cache that keeps all rows, whatever the window."""
    cache = model.make_cache(batch_size)
    height, width = model.config.latent_dim
    cache.ring = height * width * model.config.depth
    first = cache.keys[0]
    shape = (*first.shape[:2], cache.prefix + cache.ring, first.shape[3])
    for parts in (cache.keys, cache.values):
        parts[:] = [first.new_zeros(shape) for _ in parts]
    return cache


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [0, 1, 3, 9])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_cached_is_whole_ring_is_full_and_batch_is_rows(grid, window, prefix, depth, dtype) -> None:
    model = make_model(grid, window=window, prefix=prefix, depth=depth, dtype=dtype)
    told, indices = some_input(model)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    with torch.inference_mode():
        whole = model(told, indices)
        rows = [model(told[row : row + 1], indices[row : row + 1]) for row in range(3)]
    ring = model.make_cache(3)
    cached = step_by_step(model, told, indices, ring)
    torch.testing.assert_close(cached, whole, **close)
    torch.testing.assert_close(torch.cat(rows), whole, **close)
    full = full_cache(model, 3)
    torch.testing.assert_close(step_by_step(model, told, indices, full), cached, **close)
    assert (ring.nbytes < full.nbytes) == (0 < window < grid[0])
    single = step_by_step(model, told[1:2], indices[1:2], model.make_cache(1))
    torch.testing.assert_close(single, cached[1:2], **close)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [0, 1, 3, 9])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_guidance_of_1_is_none_and_a_batch_draws_its_rows(
    grid, window, prefix, depth, dtype
) -> None:
    model = make_model(grid, window=window, prefix=prefix, depth=depth, dtype=dtype)
    told, _ = some_input(model)
    plain = generate(model, told, seed=3)
    assert torch.equal(generate(model, told, seed=3, batch_size=1), plain)
    assert torch.equal(generate(model, told, seed=3, guidance=Guidance(1.0, "linear")), plain)
    # 1 + 1e-9 goes through both passes.
    assert torch.equal(generate(model, told, seed=3, guidance=Guidance(1 + 1e-9)), plain)


@pytest.mark.parametrize("options", [{"num_kv_heads": 2}, {"positions": "learned"}], ids=str)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [0, 3])
def test_cached_is_whole_with_other_options(window, prefix, depth, options) -> None:
    model = make_model((5, 4), window=window, prefix=prefix, depth=depth, **options)
    told, indices = some_input(model)
    with torch.inference_mode():
        whole = model(told, indices)
    cached = step_by_step(model, told, indices, model.make_cache(3))
    torch.testing.assert_close(cached, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "position_extension", [PositionExtension.EXTRAPOLATE, PositionExtension.INTERPOLATE]
)
@pytest.mark.parametrize("window", [0, 2])
def test_residual_codes_on_a_larger_grid(
    window: int, position_extension: PositionExtension
) -> None:
    model = make_model((3, 4), window=window, depth=2)
    told, indices = torch.arange(2), torch.randint(CODES, (2, 5, 7, 2))
    with torch.inference_mode():
        whole = model(told, indices, position_extension=position_extension)
    cached = step_by_step(model, told, indices, model.make_cache(2, (5, 7), position_extension))
    torch.testing.assert_close(cached, whole, rtol=1e-10, atol=1e-10)
