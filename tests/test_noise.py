"""Random numbers of one token of one image: uniform, independent, the same in any company."""

import torch
from scipy import stats

from transformer.noise import keys, uniform

IMAGES = torch.arange(2000)


def numbers(seed: int = 0, tokens: int = 25) -> torch.Tensor:
    return torch.stack([uniform(keys(seed, IMAGES), token) for token in range(tokens)], dim=1)


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
    assert torch.equal(uniform(keys(5, chosen), 11), uniform(keys(5, IMAGES), 11)[chosen])
    assert torch.equal(uniform(keys(5, chosen), 10**9), uniform(keys(5, chosen), 10**9))
    assert not torch.equal(uniform(keys(5, chosen), 10**9), uniform(keys(5, chosen), 10**9 + 1))


def test_a_token_in_a_tensor_is_the_same() -> None:
    for token in (0, 11, 10**9):
        number = torch.tensor([token])
        assert torch.equal(uniform(keys(5, IMAGES), number), uniform(keys(5, IMAGES), token))


def test_they_are_what_they_were() -> None:
    """The same seed draws the same images in every version."""
    first = uniform(keys(1, torch.arange(3)), 2)
    assert first.tolist() == [0.43828386068344116, 0.045256972312927246, 0.04596984386444092]
