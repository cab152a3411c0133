"""Positions in the latent grid: rotary embeddings, larger grids, orders."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer.distribution import uniform

REPULSION, VARIETY = 12.0, 1.5  # of positions in one step, and of orders, beside nearness


class PositionExtension(StrEnum):
    """Positions in grids that are larger than the trained one."""

    SLIDE = "slide"  # the prefix is rotated as for a crop around the position
    EXTRAPOLATE = "extrapolate"  # positions continue beyond the trained range
    INTERPOLATE = "interpolate"  # positions are compressed into the trained range


def rotary_cos_sin(coordinates: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., head_dim / 2) of a 2-D rotary embedding (RoPE, arXiv 2104.09864).

    Half of the angles depend on the rows of the coordinates (..., 2), half on the columns.
    """
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, device=coordinates.device) / quarter)
    angles = (coordinates[..., None] * frequencies).flatten(-2)
    return angles.cos(), angles.sin()


def eager_on_cpu(x: Tensor) -> bool:
    """Whether what is written for PyTorch's kernels on a CPU pays; a compiler makes its own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class RotateOnCPU(torch.autograd.Function):
    """`rotate`, whose halves are written where they belong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = x * torch.cat([cos, cos], dim=-1)
        (a, b), (c, d) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
        c.addcmul_(b, sin, value=-1)
        d.addcmul_(a, sin)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return RotateOnCPU.apply(gradient, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[..., i], x[..., i + head_dim / 2]) of x (..., T, head_dim) by its angle.

    cos and sin are (T, head_dim / 2), or of a shape that broadcasts to half of x.
    """
    if eager_on_cpu(x) and x.dtype == cos.dtype:
        return RotateOnCPU.apply(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def resize_embeddings(table: Tensor, before: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A table (h * w, dim) of positions of a grid `before`, (h, w), resized bilinearly to `size`.

    As for images of another size in ViT (arXiv 2010.11929, section 3.2).
    """
    grid = table.T.unflatten(1, before)[None]
    return F.interpolate(grid, size, mode="bilinear").flatten(2)[0].T


@dataclass
class GridPositions:
    """Positions (row, column, depth) in a grid of `size` (h, w) for a model of `trained` (h, w)."""

    size: tuple[int, int]
    trained: tuple[int, int]
    depth: int = 1
    extension: PositionExtension = PositionExtension.SLIDE
    scale: tuple[float, float] = (1.0, 1.0)  # rotary coordinates per row and per column

    def __post_init__(self) -> None:
        self.num_tokens = self.size[0] * self.size[1] * self.depth
        self.slides = self.extension == PositionExtension.SLIDE and self.size != self.trained

    def at(self, tokens: Tensor) -> Tensor:
        """Raster numbers of tokens (...), depth innermost -> their positions (..., 3), int64."""
        latent, width = tokens // self.depth, self.size[1]
        return torch.stack([latent // width, latent % width, tokens % self.depth], dim=-1)

    def with_depths(self, order: Tensor) -> Tensor:
        """Orders of latent positions (B, n) -> of their tokens (B, n * depth), raster numbers."""
        depths = torch.arange(self.depth, device=order.device)
        return (order[:, :, None] * self.depth + depths).flatten(1)

    def raster(self, device: torch.device | None = None) -> Tensor:
        """Positions of all tokens in raster order, (h * w * depth, 3)."""
        return self.at(torch.arange(self.num_tokens, device=device))

    def numbers(self, positions: Tensor) -> Tensor:
        """The inverse of `at`: (..., 3) -> (...)."""
        row, column, depth = positions.unbind(dim=-1)
        return (row * self.size[1] + column) * self.depth + depth

    def coordinates(self, positions: Tensor) -> Tensor:
        """Rotary coordinates (..., 2), float32, of positions; they count from 1."""
        centres = []
        for axis, (size, trained) in enumerate(zip(self.size, self.trained, strict=True)):
            compress = self.extension == PositionExtension.INTERPOLATE and size > trained
            scale = self.scale[axis] * (trained / size if compress else 1.0)
            centres.append(positions[..., axis] * scale + (scale / 2 + 0.5))
        return torch.stack(centres, dim=-1)

    def aligned_positions(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Rotary coordinates (its h * w, 2), float32, of another grid laid over this one."""
        sizes = zip(self.size, size, self.scale, strict=True)
        scale: Any = tuple(own / count * scale for own, count, scale in sizes)
        other = GridPositions(size, size, scale=scale)
        return other.coordinates(other.raster(device))

    def trained_positions(self, positions: Tensor) -> Tensor:
        """Rows and columns (..., 2) in the trained grid that positions (..., 2 or 3) stand for.

        A crop of the trained size slides along the grid, centred on the position as far as the
        borders allow; the result is the position within that crop.
        """
        inside = []
        for axis, (size, trained) in enumerate(zip(self.size, self.trained, strict=True)):
            x, middle = positions[..., axis], trained // 2
            if size > trained:
                x = torch.where(x < middle, x, (x + (trained - size)).clamp(min=middle))
            inside.append(x)
        return torch.stack(inside, dim=-1)

    def embed(self, positions: Tensor, table: Tensor) -> Tensor:
        """Embeddings (..., dim) of positions, of a table (h * w, dim) for the trained grid.

        On larger grids, SLIDE reads those of `trained_positions`, EXTRAPOLATE the nearest, and
        INTERPOLATE resizes the table.
        """
        size, (row, column) = self.trained, positions[..., :2].unbind(dim=-1)
        if self.slides:
            row, column = self.trained_positions(positions).unbind(dim=-1)
        elif self.extension == PositionExtension.INTERPOLATE and self.size != size:
            size = (max(self.size[0], size[0]), max(self.size[1], size[1]))
            table = resize_embeddings(table, self.trained, size)
        elif self.size != size:
            row, column = row.clamp(max=size[0] - 1), column.clamp(max=size[1] - 1)
        # Beyond the last token nothing follows; any row will do.
        return F.embedding((row * size[1] + column).clamp(max=len(table) - 1), table)

    def offsets(self, positions: Tensor) -> Tensor:
        """Distances (..., 2) of positions from their `trained_positions`, in rotary coordinates.

        The product of a rotated query and a rotated key depends on their distance alone: a prefix
        rotated by the offset is to a position what it was in training.
        """
        distances = positions[..., :2] - self.trained_positions(positions)
        return distances * torch.tensor(self.scale, device=positions.device)


def random_order_probability(anneal: tuple[float, float], progress: float) -> float:
    """Probability of a random order at a fraction `progress` of the training (RAR, 2411.00776).

    1 up to the first number of `anneal`, 0 from the second on, linear in between (section 3.2).
    """
    start, end = anneal
    if progress < start:
        return 1.0
    return 0.0 if progress >= end else (end - progress) / (end - start)


def sample_permutations(indices: Tensor, probability: float) -> Tensor:
    """Orders of latent positions (B, h * w) for grids (B, h, w[, depth]), random or raster."""
    count, positions = len(indices), indices.shape[1] * indices.shape[2]
    shuffled = torch.rand(count, positions).argsort(dim=1)
    is_random = torch.rand(count, 1) < probability
    return torch.where(is_random, shuffled, torch.arange(positions)).to(indices.device)


def step_sizes(count: int, steps: int) -> list[int]:
    """How many of `count` tokens each step samples: MaskGIT's cosine schedule (2202.04200)."""
    if not 0 < steps < count:
        return [1] * count
    done, steps = [0, 1], max(2, steps)
    for step in range(2, steps + 1):
        wanted = round(count * (1 - math.cos(math.pi / 2 * step / steps)))
        done.append(min(max(wanted, done[-1] + 1), count - steps + step))
    return [b - a for a, b in itertools.pairwise(done)]


def known_first_orders(keys: Tensor, known_mask: Tensor, counts: Sequence[int] = ()) -> Tensor:
    """Orders (B, h * w) of latent positions, first the known ones (B, h, w), for `random_keys`.

    They are random; or for steps of so many at once, which are sampled independently, far from each
    other and near those of earlier steps (LPD, arXiv 2507.01957, section 3.2).
    """
    known, height, width = known_mask.flatten(1), *known_mask.shape[1:]
    numbers = torch.arange(height * width, device=keys.device)
    noise = uniform(keys[:, None], -2 - numbers)  # no numbers of tokens
    order = torch.where(known, noise, noise + 1).argsort(dim=1, stable=True)
    if len(counts) == sum(counts):
        return order
    places = torch.stack([numbers // width, numbers % width], dim=1).float()
    nearness = (-torch.cdist(places, places)).exp()
    score = (known.float() @ nearness).add_(noise, alpha=VARIETY).masked_fill_(known, -torch.inf)
    chosen = [order[:, : len(numbers) - sum(counts)]]
    for count in counts:
        apart = score.clone()
        for _ in range(count):
            chosen.append(apart.argmax(dim=1, keepdim=True))
            near = nearness[chosen[-1][:, 0]]
            apart.sub_(near, alpha=REPULSION).scatter_(1, chosen[-1], -torch.inf)
            score.add_(near).scatter_(1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=1)
