"""Numbers as pictures: heights and places are right."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils import figures


def ink(picture: Image.Image) -> np.ndarray:
    """Where the colour of the values is, (rows, columns)."""
    return (np.asarray(picture) == figures.INK).all(axis=2)


@pytest.mark.parametrize("count", [2, 7, 5000])
def test_bars_are_as_high_as_their_shares(count: int) -> None:
    shares = torch.linspace(1, 0.01, count)
    shares /= shares.sum()
    heights = ink(figures.bars(shares)).sum(axis=0)[figures.MARGIN : -figures.MARGIN - 1]
    inner = figures.SIDE - 2 * figures.MARGIN
    assert heights.max() == pytest.approx(inner, abs=2)
    middles = ((torch.arange(min(count, 7)) + 0.5) / min(count, 7) * len(heights)).long()
    expected = shares[(middles.double() / len(heights) * count).long()] / shares[0] * inner
    assert np.allclose(heights[middles], expected.numpy(), atol=10)


def test_the_line_lies_where_all_would_be_alike() -> None:
    picture = np.asarray(figures.bars(torch.tensor([1.0, 0.0, 0.0, 0.0])))
    (rows,) = np.nonzero((picture == figures.LINE).all(axis=2).any(axis=1))
    bottom, inner = figures.TOP + figures.SIDE - figures.MARGIN, figures.SIDE - 2 * figures.MARGIN
    assert bottom - rows.mean() == pytest.approx(inner / 4, abs=1)


def test_points_lie_where_they_should_and_unused_ones_are_hollow() -> None:
    places = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    picture = figures.points(places, torch.tensor([0.8, 0.2, 0.0, 0.0]))
    where = ink(picture)
    half = figures.SIDE // 2
    left, right = where[figures.TOP :, :half], where[figures.TOP :, half:]
    assert left[half:].sum() > 3 * right[:half].sum() > 0  # areas are as the shares
    assert not left[:half].any()
    assert not right[half:].any()
    pale = (np.asarray(picture)[figures.TOP + half :, half:] == figures.PALE).all(axis=2)
    assert pale.any()


@pytest.mark.parametrize("count", [1, 2])
def test_equal_points_and_no_shares_are_no_trouble(count: int) -> None:
    figures.points(torch.ones(count, 2), torch.zeros(count))
    figures.bars(torch.zeros(count))
