"""The image tokenizer: VQVAE = Encoder + quantizer + Decoder."""

import json
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.config import FORMAT_VERSION, VQVAEConfig
from vqvae.layers import Downsample, Level, Upsample, group_norm, middle
from vqvae.quantizers import QUANTIZERS, Quantized


class Encoder(nn.Module):
    """(B, C, H, W) images in [-1, 1] -> z_e (B, codebook_dim, h, w), h = H / downsampling.

    The encoder of VQGAN (arXiv 2012.09841, appendix A) behind a stem that first moves
    `patch_size` x `patch_size` pixels into channels, which loses nothing and saves the
    convolutions at full resolution; `patch_size` 1 is the published network.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        z, dim = config.z_channels, config.codebook_dim
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.patch_channels, config.channels, 3, padding=1)
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
        self.conv_out = nn.Conv2d(widths[-1], z or dim, 3, padding=1)
        self.quant_conv = nn.Conv2d(z, dim, 1) if z else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> z_e (B, codebook_dim, h, w)."""
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
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        widths.reverse()  # the decoder starts at the lowest resolution
        z, dim = config.z_channels, config.codebook_dim
        self.patch_size = config.patch_size
        self.post_quant_conv = nn.Conv2d(dim, z, 1) if z else nn.Identity()
        self.conv_in = nn.Conv2d(z or dim, widths[0], 3, padding=1)
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
        self.conv_out = nn.Conv2d(widths[-1], config.patch_channels, 3, padding=1)

    def forward(self, z_q: Tensor) -> Tensor:
        """z_q (B, codebook_dim, h, w) -> images (B, C, H, W), not clamped."""
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
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        if config.image_size is None:
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder: config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.state_dict().items()
        }
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.pretrained_config(), indent=2) + "\n")

    def pretrained_config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {"model": "VQVAE", "format_version": FORMAT_VERSION, **self.config.to_dict()}

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> Self:
        """The model of a local model folder, in eval mode.

        Raises:
            OSError: a file cannot be read.
            ValueError: another kind of model, a newer format, or files that do not fit together.
        """
        path, weights = Path(folder, "config.json"), Path(folder, "model.safetensors")
        try:
            config = _read_config(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
        try:
            tensors = safetensors.torch.load_file(weights)
            with torch.device("meta"):  # a config may describe a network of any size
                expected = _shapes_and_kinds(cls(config).state_dict())
            found = _shapes_and_kinds(tensors)
            if odd := sorted(x[0] for x in expected.items() ^ found.items()):
                name = odd[0]
                raise ValueError(f"{name:.80} is {found.get(name)}, not {expected.get(name)}")
            model = cls(config)
            model.load_state_dict(tensors)
        except safetensors.SafetensorError as error:
            raise ValueError(f"cannot read {weights}: {error}") from error
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"{weights} does not fit {path.name}: {error}") from error
        return model.eval().to(device)


def _read_config(values: Any) -> VQVAEConfig:
    """The config that the content of a config.json describes."""
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    model, version = values.pop("model", None), values.pop("format_version", 1)
    if model != "VQVAE":
        raise ValueError(f"it holds a {model!s:.80}, but a VQVAE is needed here")
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"its format_version is {version!r:.80}, but this version of the code reads up to "
            f"{FORMAT_VERSION}; update the code"
        )
    return VQVAEConfig.create(**values)


def _shapes_and_kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        name: (tuple(tensor.shape), "float" if tensor.is_floating_point() else "integer")
        for name, tensor in tensors.items()
    }
