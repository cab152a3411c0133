"""Pictures: the right pixels in the right places."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils import figures
from utils.figures import comparison, comparison_table, enlarge, error_maps, grid, to_pil


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_to_pil(channels: int, mode: str) -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 9.0]).expand(channels, 2, 5)
    picture = to_pil(values)
    assert picture.mode == mode
    assert picture.size == (5, 2)
    pixels = np.asarray(picture).reshape(2, 5, channels)
    assert pixels[1, :, -1].tolist() == [0, 0, 128, 255, 255]


def test_every_8_bit_value_survives() -> None:
    values = torch.arange(256).reshape(1, 16, 16)
    picture = to_pil(values / 127.5 - 1)
    assert np.array_equal(np.asarray(picture), values[0].numpy())


@pytest.mark.parametrize(("size", "enlarged"), [((10, 7), (520, 364)), ((600, 9), (600, 9))])
def test_enlarge_by_a_whole_factor(size: tuple[int, int], enlarged: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8)
    picture = enlarge(Image.fromarray(pixels))
    assert picture.size == enlarged
    factor = enlarged[0] // size[0]
    assert np.array_equal(np.asarray(picture), pixels.repeat(factor, 0).repeat(factor, 1))


def tiles(picture: Image.Image, height: int, width: int) -> list[list[int]]:
    """The middle of each image of a grid of greys, too large to be enlarged."""
    return np.asarray(picture)[height // 2 :: height + 1, width // 2 :: width + 1].tolist()


def flat(*values: float, size: tuple[int, int] = (600, 300)) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, *size)


def test_grid_is_filled_row_by_row() -> None:
    images = flat(-1.0, 1.0, -0.5, 0.5, 1.0)
    assert tiles(grid(images, columns=2), 600, 300) == [[0, 255], [64, 191], [255, 128]]


def test_grid_is_nearly_square() -> None:
    assert grid(flat(*[0.0] * 8)).size == (4 * 301 - 1, 2 * 601 - 1)
    assert grid(flat(*[0.0] * 9, size=(8, 8))).size == (20 * 26, 20 * 26)
    assert grid(flat(0.0)).size == (300, 600)


def test_comparison_has_original_reconstruction_and_error_side_by_side() -> None:
    originals, others = flat(-1.0, 0.5), flat(-0.75, 0.5)
    pixels = np.asarray(comparison(originals, others))
    assert pixels.shape == (2 * 601 - 1, 900)
    found = [[int(pixels[y, x]) for x in (150, 450, 750)] for y in (300, 901)]
    assert found == [[0, 32, 128], [191, 191, 0]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_error_map_is_grey_opaque_and_on_a_fixed_scale(channels: int) -> None:
    images = torch.zeros(1, channels, 1, 3)
    others = torch.tensor([0.0, 0.1, -1.0]).expand(1, channels, 1, 3)
    maps = error_maps(images, others)
    assert maps.shape == images.shape
    for shades in maps[0, :3]:
        torch.testing.assert_close(shades[0], torch.tensor([-1.0, -0.6, 1.0]))
    if channels == 4:
        assert (maps[0, 3] == 1).all()


def test_a_comparison_table_names_each_image() -> None:
    table = comparison_table(["a.png", "b.png"], flat(-1.0, 1.0), flat(-1.0, 0.0))
    assert table["image_path"] == ["a.png", "b.png"]
    assert [picture.size for picture in table["reference"]] == [(300, 600)] * 2


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


def test_a_map_of_equal_numbers_is_grey() -> None:
    """It was black at step 0, where the GPT predicts all positions alike up to rounding."""
    equal = torch.full((2, 2), 4.0) + torch.tensor([[0, 1e-6], [0, 0]])
    assert set(np.unique(figures.heat(equal))) <= {127, 128}
    assert figures.heat(torch.tensor([[4.0, 4.5], [5.0, 4.0]])).getextrema() == (0, 255)
