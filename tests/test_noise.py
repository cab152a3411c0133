"""Random numbers of one token of one image: uniform, independent, the same in any company."""

import torch
from scipy import stats

from transformer.noise import uniform

IMAGES = torch.arange(2000)


def numbers(seed: int = 0, tokens: int = 25) -> torch.Tensor:
    return torch.stack([uniform(seed, IMAGES, token) for token in range(tokens)], dim=1)


def test_they_are_uniform_in_the_unit_interval() -> None:
    for seed in (0, 1, -1, 12345, 2**64 - 1):
        drawn = numbers(seed)
        assert drawn.dtype == torch.float32
        assert 0 <= drawn.min() < 1e-3
        assert 1 - 1e-3 < drawn.max() < 1
        assert stats.kstest(drawn.flatten().double(), "uniform").pvalue > 1e-3


def test_neighbours_know_nothing_of_each_other() -> None:
    """Tokens, images and seeds that lie side by side; 50,000 pairs have |r| < 0.02 by chance."""
    drawn = numbers()
    for one, other in (
        (drawn[:, :-1], drawn[:, 1:]),
        (drawn[:-1], drawn[1:]),
        (drawn, numbers(seed=1)),
        (drawn[:-1], numbers(seed=1)[1:]),
    ):
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02
        assert (one == other).float().mean() < 1e-4


def test_they_do_not_depend_on_what_is_drawn_beside_them() -> None:
    chosen = torch.tensor([1999, 3, 77])
    assert torch.equal(uniform(5, chosen, 11), uniform(5, IMAGES, 11)[chosen])
    assert torch.equal(uniform(5, chosen, 10**9), uniform(5, chosen, 10**9))
    assert not torch.equal(uniform(5, chosen, 10**9), uniform(5, chosen, 10**9 + 1))
