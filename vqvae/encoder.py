"""Images to latent vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.blocks import Downsample, Level, group_norm, middle

if TYPE_CHECKING:
    from vqvae.model import VQVAEConfig


class Encoder(nn.Module):
    """(B, C, H, W) images in [-1, 1] -> z_e (B, codebook_dim, h, w), h = H / downsampling.

    The encoder of VQGAN (arXiv 2012.09841, appendix A) behind a stem that first moves
    `patch_size` x `patch_size` pixels into channels, which loses nothing and saves the
    convolutions at full resolution; `patch_size` 1 is the published network.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(
            config.in_channels * config.patch_size**2, config.channels, 3, padding=1
        )
        self.down = nn.ModuleList(
            Level(
                in_channels=widths[level - 1] if level else config.channels,
                out_channels=width,
                num_blocks=config.num_res_blocks,
                dropout=config.dropout,
                attention=level in config.attention_levels,
                resample=Downsample(width) if level < len(widths) - 1 else None,
            )
            for level, width in enumerate(widths)
        )
        self.mid = middle(widths[-1], config.mid_blocks, config.mid_attention, config.dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(
            widths[-1], config.z_channels or config.codebook_dim, 3, padding=1
        )
        self.quant_conv = (
            nn.Conv2d(config.z_channels, config.codebook_dim, 1)
            if config.z_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> z_e (B, codebook_dim, h, w)."""
        x = F.pixel_unshuffle(x, self.patch_size)  # (B, C*p*p, H/p, W/p)
        x = self.conv_in(x)  # (B, channels, H/p, W/p)
        for level in self.down:
            x = level(x)  # halves h and w, except at the last level
        x = self.mid(x)
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, z_channels, h, w)
        return self.quant_conv(x)  # (B, codebook_dim, h, w)
