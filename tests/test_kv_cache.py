"""Two ways to the same result: cached and at once, ring and full cache, batch and single rows.

Over square, wide and tall grids, windows of 0, 1, 3 and more than the grid, prefixes of 1 and 5
(a class and a 2x2 condition), one and two indices per position, in float64 and float32.
"""

import pytest
import torch
from torch import Tensor

from transformer import GPT, GPTConfig, SamplingParams, make_prefix
from transformer.attention import KVCache
from transformer.rope import PositionExtension, rotary_cos_sin, rotate
from transformer.sampling import DecodeStep, generate

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
    """A model whose logits depend on everything: all its weights are random."""
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
        conditions[-1] = config.condition_codebook_size
    prefix = make_prefix(torch.arange(count) % (CLASSES + 1), conditions)
    shape = (*config.latent_dim, config.depth)[: 2 if config.depth == 1 else 3]
    return prefix, torch.randint(CODES, (count, *shape), generator=generator)


@torch.inference_mode()
def step_by_step(model: GPT, prefix: Tensor, indices: Tensor, cache: KVCache) -> Tensor:
    """Logits of all tokens, each from a forward of its own."""
    tokens, depth = indices.flatten(1), model.config.depth
    positions = cache.grid.raster()
    logits = [model.head(model(tokens[:, :0], positions[:0], prefix=prefix, cache=cache), depth=0)]
    for token in range(tokens.shape[1] - 1):
        one = slice(token, token + 1)
        cache.prepare(token)
        hidden = model(tokens[:, one], positions[one], cache=cache)
        logits.append(model.head(hidden, depth=(token + 1) % depth))
    return torch.cat(logits, dim=1)


@torch.inference_mode()
def at_once(model: GPT, prefix: Tensor, indices: Tensor, cache: KVCache) -> Tensor:
    """Logits of all tokens of a grid of any size, from one forward."""
    hidden = model(indices.flatten(1), cache.grid.raster(), prefix=prefix, cache=cache)
    return model.head(hidden[:, :-1])


def full_cache(model: GPT, batch_size: int) -> KVCache:
    """A cache that keeps all rows, whatever the window."""
    cache = model.make_cache(batch_size)
    cache.ring = cache.grid.num_tokens
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
        whole = model.logits(told, indices)
        rows = [model.logits(told[row : row + 1], indices[row : row + 1]) for row in range(3)]
    ring = model.make_cache(3)
    cached = step_by_step(model, told, indices, ring)
    torch.testing.assert_close(cached, whole, **close)
    torch.testing.assert_close(torch.cat(rows), whole, **close)
    full, is_ring = full_cache(model, 3), 0 < window < grid[0]
    assert (ring.nbytes < full.nbytes) == is_ring
    if is_ring:
        torch.testing.assert_close(step_by_step(model, told, indices, full), cached, **close)
    single = step_by_step(model, told[1:2], indices[1:2], model.make_cache(1))
    torch.testing.assert_close(single, cached[1:2], **close)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [0, 1, 3, 9])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (5, 2)], ids=GRIDS)
def test_guidance_of_1_is_none_and_a_batch_samples_its_rows(
    grid, window, prefix, depth, dtype
) -> None:
    """One layer, as the test above covers the caches of two; batches of two and of one."""
    options = {"window": window, "prefix": prefix, "depth": depth, "dtype": dtype}
    model = make_model(grid, num_layers=1, num_heads=2, dim=16, **options)
    told, _ = some_input(model)
    plain = generate(model, told, seed=3)
    assert torch.equal(generate(model, told, seed=3, batch_size=2), plain)
    none = SamplingParams(guidance_schedule="linear")
    assert DecodeStep(model, 1, size=grid, params=none).copies == 1  # the same computation
    # 1 + 1e-9 goes through both passes.
    both = SamplingParams(guidance_scale=1 + 1e-9)
    assert torch.equal(generate(model, told, seed=3, params=both), plain)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2},
        {"positions": "rotary"},
        {"positions": "learned"},
        {"position_scale": (0.5, 2.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("window", [0, 3])
def test_cached_is_whole_with_other_options(window, prefix, depth, options) -> None:
    model = make_model((5, 4), window=window, prefix=prefix, depth=depth, **options)
    told, indices = some_input(model)
    with torch.inference_mode():
        whole = model.logits(told, indices)
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
    whole = at_once(model, told, indices, model.make_cache(2, (5, 7), position_extension))
    cached = step_by_step(model, told, indices, model.make_cache(2, (5, 7), position_extension))
    torch.testing.assert_close(cached, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "extension", [PositionExtension.EXTRAPOLATE, PositionExtension.INTERPOLATE]
)
@pytest.mark.parametrize("window", [0, 2, 4])
@pytest.mark.parametrize("grid", [(4, 11), (13, 6), (10, 10), (2, 3)], ids=str)
def test_cached_logits_on_grids_of_other_sizes(grid, window, extension) -> None:
    model = make_model((4, 6), window=window)
    prefix, indices = torch.arange(3), torch.randint(CODES, (3, *grid))
    expected = at_once(model, prefix, indices, model.make_cache(3, grid, extension))
    actual = step_by_step(model, prefix, indices, model.make_cache(3, grid, extension))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0)], ids=str)
def test_sliding_rotates_the_prefix_as_for_a_crop(scale: tuple[float, float]) -> None:
    """Against attention over all pairs, with the prefix keys rotated for each query on its own."""
    grid, window = (9, 13), 3
    model = make_model((4, 6), window=window, positions="rotary", position_scale=scale)
    prefix, indices = torch.arange(3), torch.randint(CODES, (3, *grid))
    positions = model.grid_positions(grid)
    offsets = torch.cat([torch.zeros(1, 2), positions.offsets(positions.raster())])
    cos, sin = rotary_cos_sin(offsets, 8, model.config.rope_base)
    places = torch.arange(1 + 9 * 13)
    row, column = (places - 1) // 13, (places - 1) % 13
    near = (row[:, None] - row < window) & ((column[:, None] - column).abs() < window)
    mask = (places[:, None] >= places) & (near | (places == 0))

    def attend(q: Tensor, k: Tensor, v: Tensor, **shape: object) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        scores[..., 0] = (q * rotate(k[:, :, :1].expand_as(k), cos, sin)).sum(dim=-1)
        scores = (scores / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1) @ v

    reference = GPT(model.config, attend).double().eval()
    reference.load_state_dict(model.state_dict())
    cache = model.make_cache(3, grid, PositionExtension.EXTRAPOLATE)
    expected = at_once(reference, prefix, indices, cache)
    actual = step_by_step(model, prefix, indices, model.make_cache(3, grid))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="token by token"):
        at_once(model, prefix, indices, model.make_cache(3, grid))


def test_the_memory_of_a_windowed_model_does_not_depend_on_the_height() -> None:
    for window in (2, 4):
        model = make_model((4, 4), window=window)
        small, tall = model.make_cache(2), model.make_cache(2, (64, 4))
        assert tall.nbytes == small.nbytes
    assert make_model((4, 4)).make_cache(2, (64, 4)).nbytes > tall.nbytes


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2}, {"positions": "learned"}, {"order_anneal": (0.5, 0.75)}],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_prefill_of_rows_then_a_few_tokens_at_a_time(rows, window, options) -> None:
    """With the logits of one forward, and all that later steps need in the cache."""
    if window and "order_anneal" in options:
        return
    model = make_model((7, 5), window=window, **options)
    prefix, indices = some_input(model)
    cache, positions, tokens = model.make_cache(3), model.grid.raster(), indices.flatten(1)
    first = slice(rows * 5)
    with torch.inference_mode():
        expected = model.logits(prefix, indices)[:, rows * 5 :]
        hidden = [model(tokens[:, first], positions[first], prefix=prefix, cache=cache)[:, -1:]]
        for token in range(rows * 5, 34):
            if token % 5 in (1, 2):  # three tokens of a row at once: 1, 2, 3
                continue
            few = slice(token - 2 if token % 5 == 3 else token, token + 1)
            cache.prepare(token)
            hidden.append(model(tokens[:, few], positions[few], cache=cache))
        logits = model.head(torch.cat(hidden, dim=1))
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_tokens_without_prefix_need_a_cache() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="need the cache"):
        model(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
