"""Rotary embeddings, positions in grids of another size, and random orders."""

import pytest
import torch
from torch.autograd import gradcheck

from transformer.rope import GridPositions, PositionExtension, rotate


def test_rotation_and_its_gradient() -> None:
    angles = torch.randn(5, 4, dtype=torch.float64)
    rotary = angles.cos(), angles.sin()
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    y = rotate(x, *rotary)
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)
    torch.testing.assert_close(torch.complex(*y.chunk(2, dim=-1)), pairs)
    assert gradcheck(lambda x: rotate(x, *rotary), (x,))


def test_bfloat16_is_rotated_in_float32() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    rotary = torch.randn(5, 4).cos(), torch.randn(5, 4).sin()
    y = rotate(x, *rotary)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, rotate(x.float(), *rotary))


def test_numbers_and_positions_are_inverse() -> None:
    grid = GridPositions((3, 5), (3, 5), depth=2)
    positions = grid.raster()
    assert positions[13].tolist() == [1, 1, 1]
    assert grid.numbers(positions).tolist() == list(range(30))
    assert torch.equal(grid.at(torch.arange(30)), positions)


def test_a_sliding_crop_goes_from_border_to_border() -> None:
    grid = GridPositions((4, 12), (4, 6))
    inside = grid.trained_positions(grid.raster()[:12])[:, 1].tolist()
    assert inside == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4, 5]
    assert (grid.offsets(grid.raster())[:, 0] == 0).all()


def test_interpolation_keeps_the_trained_range() -> None:
    grid = GridPositions((4, 12), (4, 6), extension=PositionExtension.INTERPOLATE)
    rows, columns = grid.coordinates(grid.raster()).unbind(dim=1)
    assert rows.unique().tolist() == [1, 2, 3, 4]
    assert columns.unique()[:3].tolist() == [0.75, 1.25, 1.75]
    assert columns.max().item() == pytest.approx(6.25)


def test_learned_embeddings_beyond_the_trained_grid() -> None:
    """A table that rises linearly with the columns shows where each position is read."""
    table = torch.arange(6.0).repeat(4)[:, None]  # of 4x6 positions: its column

    def columns(extension: PositionExtension, size: tuple[int, int]) -> list[float]:
        grid = GridPositions(size, (4, 6), extension=extension)
        return grid.embed(grid.raster(), table).view(size)[-1].tolist()

    assert columns(PositionExtension.SLIDE, (4, 6)) == [0, 1, 2, 3, 4, 5]
    slid = columns(PositionExtension.SLIDE, (5, 12))
    assert slid == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4, 5]
    beyond = columns(PositionExtension.EXTRAPOLATE, (5, 9))
    assert beyond == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    between = columns(PositionExtension.INTERPOLATE, (5, 12))
    expected = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5]
    assert between == pytest.approx(expected)
    assert columns(PositionExtension.INTERPOLATE, (2, 3)) == [0, 1, 2]  # a corner of the grid
