"""What is drawn: the distribution against a plain reference, and the same seed, the same images."""

import pytest
import torch
from scipy import stats

from tests.test_gpt import GRID, make_gpt
from transformer import generate
from transformer.sampling import draw, probabilities

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
    result = probabilities(logits, **settings)
    expected = torch.tensor([reference(line, **settings) for line in logits.tolist()])
    torch.testing.assert_close(result, expected, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert probabilities(torch.tensor([[1.0, 3.0, 2.0]]), temperature=0).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_distribution(settings: dict) -> None:
    """Chi-square on 50,000 draws; what has no probability never comes."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    distribution = probabilities(logits, **settings)
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


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 2}])
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        probabilities(torch.zeros(1, 3), **wrong)


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
    indices = generate(model, prefix, temperature=0)
    assert model(prefix, indices).argmax(dim=-1).equal(indices.flatten(1))
