"""The distribution of a token: filters, and random numbers of a seed and an image."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from transformer import SamplingParams
from transformer.distribution import probabilities, random_keys, sample_from_probs, uniform

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
    assert probabilities(
        torch.tensor([[1.0, 3.0, 2.0]]), SamplingParams(temperature=0)
    ).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_distribution(settings: dict) -> None:
    """Chi-square on 50,000 draws; what has no probability never comes."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    distribution = probabilities(logits, SamplingParams(**settings))
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(4))
    sampled = sample_from_probs(distribution.expand(50_000, -1), uniform)
    counts = torch.bincount(sampled, minlength=12)
    possible = distribution > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        expected = distribution[possible].double() * 50_000
        expected *= counts.sum() / expected.sum()
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def test_the_ends_of_the_unit_interval() -> None:
    distribution = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(2, -1)
    nearly_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert sample_from_probs(
        distribution, torch.stack([torch.tensor(0.0), nearly_one])
    ).tolist() == [1, 3]


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
        SamplingParams(guidance_scale=scale)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-38, 1e-40, 1e-300])
def test_no_temperature_is_too_low(temperature: float) -> None:
    """Logits over a tiny number are infinite: the distribution was no number, the index none."""
    logits = torch.tensor([[-300.0, 300.0, 299.0], [0.0, 0.0, -1.0]])
    result = probabilities(logits, SamplingParams(temperature=temperature))
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


# --- random numbers -----------------------------------------------------------------------------

IMAGES = torch.arange(2000)


def noise(seed: int, images: Tensor, token: Tensor | int) -> Tensor:
    return uniform(random_keys(seed, images), token)


def numbers(seed: int = 0, tokens: int = 25) -> torch.Tensor:
    return torch.stack([noise(seed, IMAGES, token) for token in range(tokens)], dim=1)


def test_they_are_uniform_in_the_unit_interval() -> None:
    for seed in (0, 1, -1, 12345, 2**64 - 1):
        sampled = numbers(seed)
        assert sampled.dtype == torch.float32
        assert 0 <= sampled.min() < 1e-3
        assert 1 - 1e-3 < sampled.max() < 1
        assert stats.kstest(sampled.flatten().double(), "uniform").pvalue > 1e-3


def test_neighbours_know_nothing_of_each_other() -> None:
    """Tokens, images and seeds that lie side by side; 50,000 pairs have |r| < 0.02 by chance."""
    sampled = numbers()
    for one, other in (
        (sampled[:, :-1], sampled[:, 1:]),
        (sampled[:-1], sampled[1:]),
        (sampled, numbers(seed=1)),
        (sampled[:-1], numbers(seed=1)[1:]),
    ):
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02
        assert (one == other).float().mean() < 1e-4


def test_they_do_not_depend_on_what_is_sampled_beside_them() -> None:
    chosen = torch.tensor([1999, 3, 77])
    assert torch.equal(noise(5, chosen, 11), noise(5, IMAGES, 11)[chosen])
    assert torch.equal(noise(5, chosen, 10**9), noise(5, chosen, 10**9))
    assert not torch.equal(noise(5, chosen, 10**9), noise(5, chosen, 10**9 + 1))


def test_a_token_in_a_tensor_is_the_same() -> None:
    for token in (0, 11, 10**9):
        number = torch.tensor([token])
        assert torch.equal(noise(5, IMAGES, number), noise(5, IMAGES, token))


def test_they_are_what_they_were() -> None:
    """The same seed draws the same images in every version."""
    first = uniform(random_keys(1, torch.arange(3)), 2)
    assert first.tolist() == [0.43828386068344116, 0.045256972312927246, 0.04596984386444092]
