"""Sampling: the loop over tokens, guidance, known positions."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import test_kv_cache
from tests.test_kv_cache import at_once
from transformer import GPT, PositionExtension, SamplingParams
from transformer.distribution import probabilities, random_keys
from transformer.sampling import (
    DecodeStep,
    complete,
    generate,
    generate_likeliest,
    generate_rows,
    later_known_mask,
)
from utils.cli import UserError
from utils.data.masks import region_mask


def make_model(grid: tuple[int, int] = (4, 6), window: int = 0, **options: object) -> GPT:
    return test_kv_cache.make_model(grid, window=window, **options)


def some_indices(grid: tuple[int, int], count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.arange(count) % 4, torch.randint(11, (count, *grid), generator=generator)


# --- grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 2])
def test_same_seed_same_images_at_any_batch_size(window: int) -> None:
    model = make_model(window=window)
    prefix = torch.arange(10) % 4
    whole = generate(model, prefix, seed=5, batch_size=10)
    assert whole.shape == (10, 4, 6)
    assert generate(model, prefix, seed=5, batch_size=3).equal(whole)
    assert not generate(model, prefix, seed=6, batch_size=10).equal(whole)


def test_greedy_images_are_the_models_own_choice() -> None:
    """At temperature 0 every index is the uncached model's likeliest, given those before."""
    model = make_model(window=3)
    prefix = torch.tensor([0, 1, 2, 3])
    indices = generate(model, prefix, params=SamplingParams(temperature=0))
    assert model.logits(prefix, indices).argmax(dim=-1).equal(indices.flatten(1))


def test_guidance() -> None:
    model, prefix = make_model(), torch.arange(4)

    def sample(**params: object) -> Tensor:
        return generate(model, prefix, params=SamplingParams(**params))

    plain = generate(model, prefix)
    assert torch.equal(sample(guidance_schedule="linear"), plain)
    # A scale of 0 is the model without classes, and 1 + 1e-9 goes through both passes.
    none = generate(model, torch.full_like(prefix, model.config.num_classes))
    assert torch.equal(sample(guidance_scale=0.0), none)
    assert torch.equal(sample(guidance_scale=1 + 1e-9), plain)
    assert not torch.equal(sample(guidance_scale=3.0), plain)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"depth": 2}], ids=str)
def test_a_guide_takes_the_place_of_the_model_without_classes(options: dict) -> None:
    model, prefix = make_model(**options), torch.arange(5) % 4
    guide = make_model(num_layers=1, positions="learned", **options)

    def sample(scale: float, batch_size: int = 64) -> Tensor:
        params = SamplingParams(guidance_scale=scale)
        return generate(model, prefix, params=params, guide=guide, batch_size=batch_size)

    assert torch.equal(sample(1 + 1e-9), generate(model, prefix))
    assert torch.equal(sample(0.0), generate(guide, prefix))
    assert not torch.equal(sample(3.0), generate(model, prefix))
    assert torch.equal(sample(3.0, batch_size=2), sample(3.0))
    params = SamplingParams(guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"the guide has latent_dim \(4, 4\), but the model has"):
        DecodeStep(model, 1, size=(4, 6), params=params, guide=make_model((4, 4), **options))


def test_typical_sampling_keeps_what_is_near_the_expected_information() -> None:
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)) * 2
    kept = probabilities(logits, SamplingParams(typical_p=0.5))
    for line, found in zip(logits.double().softmax(dim=1), kept, strict=True):
        entropy = -float((line * line.log()).sum())
        order = sorted(range(12), key=lambda i: abs(-math.log(line[i]) - entropy))
        reached, expected = 0.0, torch.zeros(12)
        for index in order:
            if reached < 0.5:
                expected[index] = line[index]
                reached += float(line[index])
        torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-4, atol=1e-6)


def test_the_likeliest_samples_of_a_class_are_kept() -> None:
    model, prefix, candidates = make_model(), torch.tensor([2, 0, 2, 1]), 3
    best = generate_likeliest(model, prefix, candidates=candidates, batch_size=5)
    repeated = prefix.repeat_interleave(candidates)
    sampled = generate(model, repeated)
    scores = log_likelihood(model, repeated, sampled, torch.ones(4, 6))
    for number in range(4):
        own = (repeated == number).nonzero()[:, 0]
        images = (prefix == number).nonzero()[:, 0]
        expected = own[scores[own].argsort(descending=True)[: len(images)]]
        assert torch.equal(best[images], sampled[expected])


def test_guidance_schedules_begin_at_1_and_end_at_the_scale() -> None:
    for schedule in ("linear", "cosine"):
        params = SamplingParams(guidance_scale=5.0, guidance_schedule=schedule)
        scales = [params.scale_at(position, 9) for position in range(9)]
        assert scales == sorted(scales)
        assert scales[0] == pytest.approx(1)
        assert scales[4] == pytest.approx(3)
        assert scales[8] == pytest.approx(5)
    assert SamplingParams(guidance_scale=5.0).scale_at(0, 9) == 5


@pytest.mark.parametrize("power", [0.5, 1, 2.75])
def test_power_cosine_is_that_of_rar(power: float) -> None:
    """`scale_step` of its generate(), whose progress ends one token before 1."""
    for step in range(16):
        expected = (4 - 1) * (1 - math.cos((step / 16) ** power * math.pi)) / 2 + 1
        scale = {"guidance_scale": 4.0, "guidance_schedule": "cosine", "guidance_power": power}
        assert SamplingParams(**scale).scale_at(step, 17) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_outside_of_the_interval_nothing_is_guided(schedule: str) -> None:
    whole = SamplingParams(guidance_scale=3.0, guidance_schedule=schedule)
    part = replace(whole, guidance_interval=(0.25, 0.5))
    for token in range(9):
        expected = whole.scale_at(token, 9) if 2 <= token <= 4 else 1
        assert part.scale_at(token, 9) == expected
    with pytest.raises(ValueError, match="guidance_interval"):
        SamplingParams(guidance_scale=3.0, guidance_interval=(0.5, 2.0))


def test_guidance_schedules_have_names() -> None:
    with pytest.raises(ValueError, match="guidance_schedule"):
        SamplingParams(guidance_scale=2.0, guidance_schedule="square")


def test_known_tokens_stay_and_the_rest_is_sampled() -> None:
    model = make_model()
    prefix, given = some_indices((4, 6))
    keep = torch.zeros(4, 6, dtype=torch.bool)
    keep[:2] = True
    sampled = generate(model, prefix, known=given, known_mask=keep)
    assert torch.equal(sampled[:, :2], given[:, :2])
    assert not torch.equal(sampled[:, 2:], given[:, 2:])
    everything = generate(model, prefix, known=given, known_mask=torch.ones_like(keep))
    assert torch.equal(everything, given)


def test_rows_come_one_by_one() -> None:
    model = make_model((4, 6), window=3)
    step = DecodeStep(model, 2, size=(1000, 5))
    rows = generate_rows(step, torch.zeros(2, dtype=torch.long), random_keys(0, torch.arange(2)))
    assert next(rows).shape == (2, 5)


# --- known positions ----------------------------------------------------------------------------


def test_sides() -> None:
    assert region_mask("top:0.5", (4, 3)).tolist() == [[True] * 3] * 2 + [[False] * 3] * 2
    assert region_mask("right:0.34", (2, 3)).tolist() == [[False, False, True]] * 2
    assert region_mask("left:0.5", (2, 2)).tolist() == [[True, False]] * 2
    assert region_mask("bottom:0.25", (4, 1)).flatten().tolist() == [False, False, False, True]
    center = region_mask("center:0.5", (4, 4))
    assert center.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert torch.equal(region_mask("border:0.5", (4, 4)), ~center)
    for text in ("top", "top:2", "middle:0.5", "left:x", "left:nan"):
        with pytest.raises(UserError, match="neither a picture"):
            region_mask(text, (4, 4))


def test_later_known_positions_come_after_a_sampled_one() -> None:
    assert not later_known_mask(region_mask("top:0.5", (4, 4))).any()
    assert later_known_mask(region_mask("left:0.5", (2, 2))).tolist() == [
        [False, False],
        [True, False],
    ]


def log_likelihood(
    model: GPT,
    prefix: Tensor,
    indices: Tensor,
    counted: Tensor,
    extension: PositionExtension = PositionExtension.EXTRAPOLATE,
) -> Tensor:
    """Sum over `counted` (h, w) of log p(token | tokens before it), (N,), by one forward."""
    with torch.no_grad():
        cache = model.make_cache(len(prefix), tuple(counted.shape), extension)
        logs = at_once(model, prefix, indices, cache).log_softmax(dim=-1)
        logs = logs.gather(2, indices.flatten(1)[:, :, None])[:, :, 0]
    return (logs * counted.flatten().repeat_interleave(model.config.depth)).sum(dim=1).float()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("side", ["left:0.5", "bottom:0.25", "right:0.34"])
@pytest.mark.parametrize("depth", [1, 2])
def test_scores_are_the_models_own_of_the_known_tokens_behind(depth, side, guidance) -> None:
    """Without guidance and params, which are no part of how likely the model finds a token."""
    model = make_model(depth=depth)
    prefix, given = torch.arange(5) % 4, torch.randint(11, (5, 4, 6, 2)[: 3 + (depth > 1)])
    keep, scores = region_mask(side, (4, 6)), torch.zeros(5)
    options = {
        "params": SamplingParams(guidance_scale=guidance, temperature=0.5, top_k=3),
        "batch_size": 2,
    }
    sampled = generate(model, prefix, known=given, known_mask=keep, scores=scores, **options)
    expected = log_likelihood(model, prefix, sampled, later_known_mask(keep))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_scores_of_larger_grids_are_by_the_positions_that_they_are_sampled_with() -> None:
    """They were ranked by other positions, which learned ones do not even have."""
    model = make_model(window=3)
    prefix, given = some_indices((6, 9))
    keep, scores = region_mask("left:0.34", (6, 9)), torch.zeros(3)
    options = {
        "known": given,
        "known_mask": keep,
        "size": (6, 9),
        "position_extension": PositionExtension.INTERPOLATE,
    }
    sampled = generate(model, prefix, scores=scores, **options)
    expected = log_likelihood(
        model, prefix, sampled, later_known_mask(keep), PositionExtension.INTERPOLATE
    )
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    learned = make_model(positions="learned", window=3)
    assert complete(learned, prefix, given, keep, candidates=2).shape == (3, 6, 9)


@pytest.mark.parametrize("side", ["top:0.5", "left:0.5", "right:0.5"])
def test_completions_keep_what_is_given_and_candidates_fit_it_better(side: str) -> None:
    model = make_model()
    prefix, given = some_indices((4, 6), 8)
    keep = region_mask(side, (4, 6))
    one = complete(model, prefix, given, keep)
    many = complete(model, prefix, given, keep, candidates=8, batch_size=5)
    for sampled in (one, many):
        assert torch.equal(sampled[:, keep], given[:, keep])
    if side == "top:0.5":  # nothing to rank by
        assert torch.equal(one, many)
        return
    later = later_known_mask(keep)
    scores = [log_likelihood(model, prefix, sampled, later).sum() for sampled in (one, many)]
    assert scores[1] > scores[0]


def test_what_follows_a_known_token_is_sampled_given_it() -> None:
    model = make_model()
    prefix, given = some_indices((4, 6), 2)
    keep = region_mask("top:0.25", (4, 6))
    one, two = complete(model, prefix, given, keep), generate(model, prefix)
    assert not torch.equal(one[:, 1:], two[:, 1:])
