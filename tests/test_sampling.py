"""What is drawn: the distribution against a plain reference, and the same seed, the same images."""

import math

import pytest
import torch
from scipy import stats

from tests.test_gpt import GRID, make_gpt
from transformer import generate
from transformer.distribution import Guidance, SamplingParams, draw, probabilities

SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
]


def reference(logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """The same in plain Python: sort, cut, renormalise."""
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature).softmax(0).tolist()
    order = sorted(range(len(weights)), key=lambda index: -weights[index])
    if top_k:
        order = order[:top_k]
    total = sum(weights[index] for index in order)
    kept, reached = [], 0.0
    for index in order:
        if kept and reached >= top_p:
            break
        kept.append(index)
        reached += weights[index] / total
    total = sum(weights[index] for index in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("settings", SETTINGS)
def test_probabilities_against_the_reference(settings: dict) -> None:
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)) * 2
    result = probabilities(logits, SamplingParams(**settings))
    expected = torch.tensor([reference(line, **settings) for line in logits.tolist()])
    torch.testing.assert_close(result, expected, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert probabilities(torch.tensor([[1.0, 3.0, 2.0]]), SamplingParams(0)).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_distribution(settings: dict) -> None:
    """Chi-square on 50,000 draws; what has no probability never comes."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    distribution = probabilities(logits, SamplingParams(**settings))
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(4))
    drawn = draw(distribution.expand(50_000, -1), uniform)
    counts = torch.bincount(drawn, minlength=12)
    possible = distribution > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        expected = distribution[possible].double() * 50_000
        expected *= counts.sum() / expected.sum()
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def test_the_ends_of_the_unit_interval() -> None:
    distribution = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(2, -1)
    nearly_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert draw(distribution, torch.stack([torch.tensor(0.0), nearly_one])).tolist() == [1, 3]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}),
        *({"top_k": -1}, {"top_p": 0}, {"top_p": 2}, {"min_p": math.nan}),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("scale", [-1, math.nan, math.inf])
def test_guidance_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="guidance_scale"):
        Guidance(scale)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-38, 1e-40, 1e-300])
def test_no_temperature_is_too_low(temperature: float) -> None:
    """Logits over a tiny number are infinite: the distribution was no number, the index none."""
    logits = torch.tensor([[-300.0, 300.0, 299.0], [0.0, 0.0, -1.0]])
    result = probabilities(logits, SamplingParams(temperature))
    assert result[0].tolist() == [0, 1, 0]
    assert result[1, 2] == 0
    assert result.sum(dim=1).tolist() == [1, 1]


def test_min_p_comes_last() -> None:
    """It came before top-p, whose share then counted from what min-p had left."""
    logits = torch.tensor([0.45, 0.2, 0.15, 0.12, 0.08]).log()
    # The nucleus of 0.75 is the first three of all; of the first four by min-p it is two.
    kept = probabilities(logits, SamplingParams(top_p=0.75, min_p=0.25))
    expected = torch.tensor([0.45, 0.2, 0.15, 0, 0])
    torch.testing.assert_close(kept, expected / expected.sum())


@pytest.mark.parametrize("window", [0, 2])
def test_same_seed_same_images_at_any_batch_size(window: int) -> None:
    model = make_gpt(window_size=window)
    prefix = torch.arange(10) % 4
    whole = generate(model, prefix, seed=5, batch_size=10)
    assert whole.shape == (10, *GRID)
    assert generate(model, prefix, seed=5, batch_size=3).equal(whole)
    assert not generate(model, prefix, seed=6, batch_size=10).equal(whole)


def test_greedy_images_are_the_models_own_choice() -> None:
    """At temperature 0 every index is the uncached model's likeliest, given those before."""
    model = make_gpt(window_size=3)
    prefix = torch.tensor([0, 1, 2, 3])
    indices = generate(model, prefix, params=SamplingParams(temperature=0))
    assert model(prefix, indices).argmax(dim=-1).equal(indices.flatten(1))
