"""Where the cells of a grid are: rotary angles, and grids of other sizes than the trained one."""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor


class PositionExtension(StrEnum):
    """Positions in grids that are larger than the trained one."""

    SLIDE = "slide"  # the prefix is seen from where a crop of the trained size would lie
    EXTRAPOLATE = "extrapolate"  # positions just go on
    INTERPOLATE = "interpolate"  # positions are compressed into the trained range


def rotary_angles(rows: Tensor, columns: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Rotation angles of a 2-D rotary embedding (RoPE, arXiv 2104.09864), (n, head_dim / 2).

    The first half of the angles turns with the row, the second with the column.

    Args:
        rows, columns: (n,) position of each cell; 0, 0 is not turned.
        head_dim: a multiple of 4.
    """
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, device=rows.device) / quarter)
    return torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[..., i], x[..., i + head_dim / 2]) by the angles of `cos` and `sin`.

    Args:
        x: (..., n, head_dim).
        cos, sin: (n, head_dim / 2), or what expands to the half of x.

    Raises:
        RuntimeError: they do not.
    """
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return _Rotation.apply(x, cos.expand(shape), sin.expand(shape))


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back: nothing of x need be kept, and the memory is read less often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin).to(ctx.dtype), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, cos.dtype))
    left, right = y.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(a, sin, out=right).addcmul_(b, cos)
    return y


def _inside(place: int, size: int, trained: int) -> int:
    """Where a crop of `trained` cells that slides along `size` cells has the cell `place`.

    The crop keeps the cell in its middle, as far as the borders let it.
    """
    half = trained // 2
    if size <= trained or place < half:
        return place
    return max(half, trained - (size - place))


class Places:
    """The cells of a grid of any size, as a model sees them that was trained on another.

    Attributes:
        size: rows and columns (h, w) of the grid.
        trained: rows and columns that the model was trained on.
        position_extension: what happens where `size` is the larger.
    """

    def __init__(
        self,
        size: tuple[int, int],
        trained: tuple[int, int],
        head_dim: int,
        position_extension: PositionExtension,
    ) -> None:
        self.size, self.trained, self.position_extension = size, trained, position_extension
        self._head_dim = head_dim
        stretch = position_extension == PositionExtension.INTERPOLATE
        self._scale = [
            t / s if stretch and s > t else 1.0 for s, t in zip(size, trained, strict=True)
        ]

    def turn(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, (n, head_dim / 2) each, of the angles at positions (n,), (n,)."""
        angles = rotary_angles(rows, columns, self._head_dim)
        return angles.cos(), angles.sin()

    def at(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the cells in these rows and columns, (n,) each: (n, head_dim / 2) each.

        Cells count from 1; the prefix is at 0, 0. A compressed cell keeps its middle.
        """
        vertical, horizontal = self._scale
        return self.turn((rows + 0.5) * vertical + 0.5, (columns + 0.5) * horizontal + 0.5)

    def cells(self, row: int, rows: int = 1) -> tuple[Tensor, Tensor]:
        """cos and sin of the cells in `rows` rows from `row` on, (rows * w, head_dim / 2) each."""
        down, right = torch.arange(row, row + rows), torch.arange(self.size[1])
        return self.at(down.repeat_interleave(self.size[1]), right.repeat(rows))

    def aligned_positions(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """cos and sin of another grid spread over this one, (its cells, head_dim / 2) each.

        What lies at the same place of the picture is turned alike, whatever the two sizes.
        """
        down, right = (
            (torch.arange(count) + 0.5) * (own / count) + 0.5
            for count, own in zip(size, self.size, strict=True)
        )
        return self.turn(down.repeat_interleave(size[1]), right.repeat(size[0]))

    def inside(self, row: int, column: int) -> tuple[int, int]:
        """The cell of the trained grid that the cell (row, column) takes the place of."""
        size, trained = self.size, self.trained
        return _inside(row, size[0], trained[0]), _inside(column, size[1], trained[1])

    def offset(self, row: int, column: int) -> tuple[int, int]:
        """How far the cell (row, column) lies from the one whose place it takes.

        Turned by as much, the prefix looks to the cell as it did in training: what a rotated
        query and a rotated key make of each other depends on their distance alone.
        """
        inside = self.inside(row, column)
        return row - inside[0], column - inside[1]
