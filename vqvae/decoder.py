"""Latent vectors to images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.blocks import Level, Upsample, group_norm, middle

if TYPE_CHECKING:
    from vqvae.model import VQVAEConfig


class Decoder(nn.Module):
    """z_q (B, codebook_dim, h, w) -> images (B, C, H, W), about [-1, 1] but not clamped.

    The mirror of `Encoder`, with one residual block more at each level, as in VQGAN
    (arXiv 2012.09841, appendix A).
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        widths.reverse()  # the decoder starts at the lowest resolution
        self.patch_size = config.patch_size
        self.post_quant_conv = (
            nn.Conv2d(config.codebook_dim, config.z_channels, 1)
            if config.z_channels
            else nn.Identity()
        )
        self.conv_in = nn.Conv2d(config.z_channels or config.codebook_dim, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config.mid_blocks, config.mid_attention, config.dropout)
        self.up = nn.ModuleList(
            Level(
                in_channels=widths[max(level - 1, 0)],
                out_channels=width,
                num_blocks=config.num_res_blocks + 1,
                dropout=config.dropout,
                attention=len(widths) - 1 - level in config.attention_levels,
                resample=Upsample(width) if level < len(widths) - 1 else None,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(
            widths[-1], config.in_channels * config.patch_size**2, 3, padding=1
        )

    def forward(self, z_q: Tensor) -> Tensor:
        """z_q (B, codebook_dim, h, w) -> images (B, C, H, W), not clamped."""
        x = self.post_quant_conv(z_q)  # (B, z_channels, h, w)
        x = self.conv_in(x)  # (B, width of the lowest level, h, w)
        x = self.mid(x)
        for level in self.up:
            x = level(x)  # doubles h and w, except at the last level
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, C*p*p, H/p, W/p)
        return F.pixel_shuffle(x, self.patch_size)  # (B, C, H, W)
