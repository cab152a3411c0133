"""Drawing cell by cell against whole forward passes, and the distributions that are drawn from."""

import pytest
import torch
from torch import Tensor

from transformer import GPT, GPTConfig, Guidance, PositionExtension, generate, noise
from transformer.distribution import SamplingParams, draw, probabilities
from transformer.positions import rotate
from transformer.sampling import generate_rows
from transformer.step import Step


def make_model(
    grid: tuple[int, int] = (4, 6), window: int = 0, dtype: torch.dtype = torch.float64, **options
) -> GPT:
    """A model whose logits depend on everything: all its weights are drawn."""
    torch.manual_seed(0)
    shape = {"num_layers": 2, "num_heads": 4, "dim": 32} | options
    config = GPTConfig(
        codebook_size=11, num_classes=3, latent_dim=grid, window_size=window, **shape
    )
    model = GPT(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.inference_mode()
def step_by_step(
    model: GPT,
    prefix: Tensor,
    indices: Tensor,
    position_extension: PositionExtension = PositionExtension.SLIDE,
) -> Tensor:
    cache = model.make_cache(len(prefix), tuple(indices.shape[1:]), position_extension)
    cells = indices.flatten(1)
    tokens = torch.cat([prefix[:, None], cells[:, :-1]], dim=1)
    return torch.stack([model.step(tokens[:, t], t, cache) for t in range(cells.shape[1])], dim=1)


def some_indices(grid: tuple[int, int], count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.arange(count) % 4, torch.randint(11, (count, *grid), generator=generator)


@pytest.mark.parametrize(
    "position_extension", [PositionExtension.EXTRAPOLATE, PositionExtension.INTERPOLATE]
)
@pytest.mark.parametrize("window", [0, 2, 4])
@pytest.mark.parametrize("grid", [(4, 11), (13, 6), (10, 10), (2, 3)], ids=str)
def test_cached_logits_on_grids_of_other_sizes(grid, window, position_extension) -> None:
    model = make_model((4, 6), window)
    prefix, indices = some_indices(grid)
    with torch.inference_mode():
        expected = model(prefix, indices, position_extension=position_extension)
    actual = step_by_step(model, prefix, indices, position_extension)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_sliding_shows_the_prefix_from_where_a_crop_would_lie() -> None:
    """Against attention over all pairs, the prefix keys turned for each query on its own."""
    grid, trained, window = (9, 13), (4, 6), 3
    model = make_model(trained, window)
    prefix, indices = some_indices(grid)
    places = model.sequence.places(grid, PositionExtension.SLIDE)
    offsets = torch.tensor([places.offset(i, j) for i in range(9) for j in range(13)])
    offsets = torch.cat([torch.zeros(1, 2, dtype=torch.long), offsets])
    cos, sin = (x.double() for x in places.turn(offsets[:, 0], offsets[:, 1]))
    positions = torch.arange(1 + 9 * 13)
    cells = positions - 1
    row, column = cells // 13, cells % 13
    near = (row[:, None] - row < window) & ((column[:, None] - column).abs() < window)
    mask = (positions[:, None] >= positions) & (near | (positions == 0))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        scores[..., 0] = (q * rotate(k[:, :, :1].expand_as(k), cos, sin)).sum(dim=-1)
        scores = (scores / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1) @ v

    with torch.inference_mode():
        x = torch.cat(
            [model.prefix_embedding(prefix)[:, None], model.token_embedding(indices.flatten(1))], 1
        )
        turn = tuple(x.double() for x in model.sequence.turn(places))
        expected = model.head(model.run_blocks(x, turn, lambda layer: attend)[:, :-1])
    actual = step_by_step(model, prefix, indices)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_sliding_crop_goes_from_border_to_border() -> None:
    places = make_model((4, 6)).sequence.places((4, 12))
    assert [places.inside(0, j)[1] for j in range(12)] == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4, 5]
    assert all(places.offset(i, j)[0] == 0 for i in range(4) for j in range(12))


def test_the_memory_of_a_windowed_model_does_not_depend_on_the_height() -> None:
    for window in (2, 4):
        model = make_model((4, 4), window)
        small, tall = model.make_cache(2), model.make_cache(2, (64, 4))
        assert tall.nbytes == small.nbytes
    assert make_model((4, 4)).make_cache(2, (64, 4)).nbytes > tall.nbytes


def test_guidance() -> None:
    model, prefix = make_model(), torch.arange(4)
    plain = generate(model, prefix)
    assert torch.equal(generate(model, prefix, guidance=Guidance(1.0, "linear")), plain)
    # A scale of 0 is the model without classes, and 1 + 1e-9 goes through both passes.
    none = generate(model, torch.full_like(prefix, model.config.no_class))
    assert torch.equal(generate(model, prefix, guidance=Guidance(0.0)), none)
    assert torch.equal(generate(model, prefix, guidance=Guidance(1 + 1e-9)), plain)
    assert not torch.equal(generate(model, prefix, guidance=Guidance(3.0)), plain)


def test_guidance_schedules_begin_at_1_and_end_at_the_scale() -> None:
    for schedule in ("linear", "cosine"):
        scales = [Guidance(5.0, schedule).at(cell, 9) for cell in range(9)]
        assert scales == sorted(scales)
        assert scales[0] == pytest.approx(1)
        assert scales[4] == pytest.approx(3)
        assert scales[8] == pytest.approx(5)
    assert Guidance(5.0).at(0, 9) == 5
    with pytest.raises(ValueError, match="guidance_schedule"):
        Guidance(2.0, "square")


def test_given_cells_stay_and_the_rest_is_drawn() -> None:
    model = make_model()
    prefix, given = some_indices((4, 6))
    keep = torch.zeros(4, 6, dtype=torch.bool)
    keep[:2] = True
    drawn = generate(model, prefix, given=given, keep=keep)
    assert torch.equal(drawn[:, :2], given[:, :2])
    assert not torch.equal(drawn[:, 2:], given[:, 2:])
    everything = generate(model, prefix, given=given, keep=torch.ones_like(keep))
    assert torch.equal(everything, given)


def test_rows_come_one_by_one() -> None:
    model = make_model((4, 6), window=3)
    step = Step(model, 2, size=(1000, 5))
    rows = generate_rows(step, torch.zeros(2, dtype=torch.long), noise.keys(0, torch.arange(2)))
    assert next(rows).shape == (2, 5)


def test_min_p_keeps_what_is_likely_enough() -> None:
    logits = torch.tensor([0.5, 0.25, 0.2, 0.05]).log()
    kept = probabilities(logits, SamplingParams(min_p=0.45))
    torch.testing.assert_close(kept, torch.tensor([2 / 3, 1 / 3, 0, 0]))
    torch.testing.assert_close(probabilities(logits, SamplingParams(min_p=0.0)), logits.exp())
    assert torch.equal(
        probabilities(logits, SamplingParams(min_p=1.0)), torch.tensor([1.0, 0, 0, 0])
    )
    with pytest.raises(ValueError, match="min_p"):
        probabilities(logits, SamplingParams(min_p=1.1))


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits, expected = torch.tensor([0.1, 0.4, 0.3, 0.2]).log(), torch.tensor([0, 4 / 7, 3 / 7, 0])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.65)):
        kept = probabilities(logits, params)
        torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        probabilities(logits, SamplingParams(temperature=0)), torch.tensor([0.0, 1, 0, 0])
    )


def test_draws_follow_the_distribution() -> None:
    distribution = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3])
    drawn = draw(distribution.expand(20000, -1), torch.linspace(0, 1 - 1e-6, 20000))
    shares = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(shares, distribution, rtol=0, atol=1e-3)
