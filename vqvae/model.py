"""The image tokenizer: VQVAE = Encoder + quantizer + Decoder.

Encoder and decoder are those of VQGAN (arXiv 2012.09841, appendix A) behind a stem that first moves
`patch_size` x `patch_size` pixels into channels, which loses nothing and saves the convolutions at
full resolution; `patch_size` 1 is the published network.
"""

import json
from collections import OrderedDict
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.config import FORMAT_VERSION, VQVAEConfig
from vqvae.quantizers import QUANTIZERS, Quantized

TILES = 5  # latent positions on a side of the grid from whose middle a code's picture is taken
FILE_ERRORS = ValueError, TypeError, AttributeError, RuntimeError  # of damaged or other files


def group_norm(config: VQVAEConfig, channels: int) -> nn.GroupNorm:
    """GroupNorm with `channels_per_group`, or 32 groups where it is 0, as far as these divide."""
    size = config.channels_per_group
    groups = channels // gcd(size, channels) if size else gcd(32, channels)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """(B, in_channels, h, w) -> (B, out_channels, h, w): twice GroupNorm, SiLU, 3x3 convolution."""

    checkpointed = True  # where a training saves memory by `checkpoint_activations`

    def __init__(self, config: VQVAEConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(config, out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(self.dropout(F.silu(self.norm2(residual))))
        return self.nin_shortcut(x) + residual


class Attention(nn.Module):
    """(B, channels, h, w) -> the same: GroupNorm, self-attention of all positions with one head."""

    def __init__(self, config: VQVAEConfig, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            project(normed).flatten(2).transpose(1, 2)[:, None]  # (B, 1, h*w, channels)
            for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


def downsample(channels: int) -> nn.Sequential:
    """(B, C, h, w) -> (B, C, h/2, w/2) by a 3x3 convolution of stride 2."""
    # One pixel of padding on the right and at the bottom: even sides halve exactly.
    pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(channels: int) -> nn.Sequential:
    """(B, C, h, w) -> (B, C, 2h, 2w): nearest neighbour, then a 3x3 convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2.0), conv=conv))


class Level(nn.Module):
    """(B, in_channels, h, w) -> (B, width of the level, h', w'): one resolution.

    Residual blocks, each with attention or not, then `resample` to the resolution of the next.
    """

    def __init__(
        self, config: VQVAEConfig, level: int, in_channels: int, blocks: int, resample: nn.Module
    ) -> None:
        super().__init__()
        width = config.widths[level]
        pairs = pairwise([in_channels, *[width] * blocks])
        self.block = nn.ModuleList(ResidualBlock(config, *pair) for pair in pairs)
        attention = level in config.attention_levels
        self.attn = nn.ModuleList(
            Attention(config, width) if attention else nn.Identity() for _ in range(blocks)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.resample(x)


def middle(config: VQVAEConfig) -> nn.Sequential:
    """Layers at the lowest resolution: residual blocks, attention after the first."""
    width = config.widths[-1]
    first, *rest = [ResidualBlock(config, width, width) for _ in range(config.mid_blocks)]
    attention = [Attention(config, width)] if config.mid_attention else []
    return nn.Sequential(first, *attention, *rest)


class Encoder(nn.Module):
    """(B, C, H, W) images in [-1, 1] -> z_e (B, codebook_dim, h, w), h = H / downsampling."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        z, dim, widths = config.z_channels, config.codebook_dim, config.widths
        self.patch_size = config.patch_size
        pixels = config.in_channels * config.patch_size**2  # of one block, in all channels
        self.conv_in = nn.Conv2d(pixels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, before in enumerate([config.channels, *widths[:-1]]):
            last = level == len(widths) - 1
            resample = nn.Identity() if last else downsample(widths[level])
            self.down.append(Level(config, level, before, config.num_res_blocks, resample))
        self.mid = middle(config)
        self.norm_out = group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z or dim, 3, padding=1)
        self.quant_conv = nn.Conv2d(z, dim, 1) if z else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch_size)  # (B, C*p*p, H/p, W/p)
        x = self.conv_in(x)  # (B, channels, H/p, W/p)
        for level in self.down:
            x = level(x)  # halves h and w, except at the last level
        x = self.mid(x)
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, z_channels, h, w)
        return self.quant_conv(x)  # (B, codebook_dim, h, w)


class Decoder(nn.Module):
    """z_q (B, codebook_dim, h, w) -> images (B, C, H, W), about [-1, 1] but not clamped.

    The mirror of `Encoder`, with one residual block more at each level, as in VQGAN.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        z, dim, widths = config.z_channels, config.codebook_dim, config.widths
        self.patch_size = config.patch_size
        self.post_quant_conv = nn.Conv2d(dim, z, 1) if z else nn.Identity()
        self.conv_in = nn.Conv2d(z or dim, widths[-1], 3, padding=1)
        self.mid = middle(config)
        self.up = nn.ModuleList()
        for level, before in reversed([*enumerate([*widths[1:], widths[-1]])]):
            resample = upsample(widths[level]) if level else nn.Identity()
            self.up.append(Level(config, level, before, config.num_res_blocks + 1, resample))
        self.norm_out = group_norm(config, widths[0])
        pixels = config.in_channels * config.patch_size**2
        self.conv_out = nn.Conv2d(widths[0], pixels, 3, padding=1)

    def forward(self, z_q: Tensor) -> Tensor:
        x = self.post_quant_conv(z_q)  # (B, z_channels, h, w)
        x = self.conv_in(x)  # (B, width of the lowest level, h, w)
        x = self.mid(x)
        for level in self.up:
            x = level(x)  # doubles h and w, except at the last level
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, C*p*p, H/p, W/p)
        return F.pixel_shuffle(x, self.patch_size)  # (B, C, H, W)


class VQVAEOutput(NamedTuple):
    """reconstruction: (B, C, H, W); quantized: z_q, indices and losses of the quantizer."""

    reconstruction: Tensor
    quantized: Quantized


class VQVAE(nn.Module):
    """Image tokenizer (arXiv 1711.00937): images to a grid of codebook indices and back.

    >>> tokenizer = VQVAE(VQVAEConfig(image_size=(24, 40), in_channels=3)).eval()
    >>> indices = tokenizer.encode(images)  # (B, 3, 24, 40) in [-1, 1] -> (B, 6, 10)
    >>> images = tokenizer.decode(indices)  # and back, clamped to [-1, 1]

    A training loop calls `quantizer.end_step()` after each optimiser step.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        if config.image_size is None or config.in_channels is None:
            raise ValueError("a VQVAE needs image_size and in_channels")
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = QUANTIZERS[config.quantizer](config.quantizer_options)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Images (B, C, H, W) in [-1, 1] -> reconstruction, indices and quantizer losses."""
        quantized = self.quantizer(self.encoder(images))
        return VQVAEOutput(self.decoder(quantized.z_q), quantized)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> indices (B, h, w), int64 in [0, codebook_size).

        With a depth above 1, indices have it as their last axis, here and below.
        """
        return self.quantizer.nearest(self.encoder(images))

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> z_q (B, codebook_dim, h, w), the decoder's input."""
        return self.quantizer.embed(indices)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> images (B, C, H, W), clamped to [-1, 1]."""
        return self.decoder(self.embed(indices)).clamp(-1, 1)

    @torch.no_grad()
    def inspect_codebook(
        self, counts: Tensor, max_codes: int = 4096, max_decoded: int = 256
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The codebook, learned or implicit, from the most to the least used code.

        Returns the fraction of each code, (K,), by counts as `Quantizer.count` orders them; the
        first codes, (max_codes, D); what the first decode to among their like, (max_decoded, C, f,
        f) in [-1, 1].
        """
        usage, order = (counts / counts.sum()).sort(descending=True, stable=True)
        codes = self.quantizer.codes(order[:max_codes])
        training, f = self.training, self.config.downsampling
        # Alone, in a grid of 1x1, a code would lose to GroupNorm what it shows.
        height, width = (min(side, TILES) for side in self.config.latent_dim)
        grids = codes[:max_decoded, :, None, None].expand(-1, -1, height, width)
        decoded = torch.cat([self.eval().decoder(grid) for grid in grids.split(64)]).clamp(-1, 1)
        self.train(training)
        top, left = height // 2 * f, width // 2 * f
        return usage, codes, decoded[:, :, top : top + f, left : left + f]

    def pretrained_config(self) -> dict[str, Any]:
        """The content of config.json, which `VQVAEConfig.from_json` reads."""
        return {"model": "VQVAE", "format_version": FORMAT_VERSION, **self.config.to_dict()}

    def pretrained_state(self) -> dict[str, Tensor]:
        """The content of model.safetensors."""
        return self.state_dict()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder: config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.pretrained_config(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> Self:
        """The model of a local model folder, in eval mode; an OSError or a ValueError."""
        text = Path(folder, "config.json").read_text(encoding="utf-8")
        try:
            config = VQVAEConfig.from_json(json.loads(text))
            tensors = safetensors.torch.load_file(Path(folder, "model.safetensors"))
            with torch.device("meta"):  # a config may describe a network of any size
                cls(config).load_state_dict(tensors, assign=True)
        except (*FILE_ERRORS, safetensors.SafetensorError) as error:
            raise ValueError(f"config.json or model.safetensors: {error}") from error
        model = cls(config)
        model.load_state_dict(tensors)
        return model.eval().to(device)
