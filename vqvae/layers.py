"""Layers of the encoder and the decoder: residual block, attention, down- and upsampling.

From VQGAN (arXiv 2012.09841, appendix A).
"""

from itertools import pairwise
from math import gcd

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or with as many of them as divide `channels`."""
    return nn.GroupNorm(gcd(32, channels), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """(B, in_channels, h, w) -> (B, out_channels, h, w): twice GroupNorm, SiLU, 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(self.dropout(F.silu(self.norm2(residual))))
        return self.nin_shortcut(x) + residual


class Attention(nn.Module):
    """(B, channels, h, w) -> the same: GroupNorm, self-attention of all positions with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same."""
        normed = self.norm(x)
        q, k, v = (
            project(normed).flatten(2).transpose(1, 2)[:, None]  # (B, 1, h*w, channels)
            for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


def middle(channels: int, num_blocks: int, attention: bool, dropout: float) -> nn.Sequential:
    """Layers at the lowest resolution: residual blocks, attention after the first."""
    layers: list[nn.Module] = [
        ResidualBlock(channels, channels, dropout) for _ in range(num_blocks)
    ]
    if attention:
        layers.insert(1, Attention(channels))
    return nn.Sequential(*layers)


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2) by a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        # One pixel of padding on the right and at the bottom: even sides halve exactly.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention or not, then resampling, if any."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        dropout: float,
        attention: bool,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(
            ResidualBlock(before, after, dropout) for before, after in pairwise(widths)
        )
        self.attn = nn.ModuleList(
            Attention(out_channels) if attention else nn.Identity() for _ in range(num_blocks)
        )
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h', w')."""
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.resample(x)
