"""The image tokenizer: VQVAE = Encoder + quantizer + Decoder."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from vqvae.decoder import Decoder
from vqvae.encoder import Encoder
from vqvae.quantizers import Quantized, QuantizerConfig, make_quantizer

MOST_BLOCKS = 64  # above, a config file has been tampered with


@dataclass(frozen=True)
class VQVAEConfig(QuantizerConfig):
    """Everything that is needed to build a `VQVAE`; each field with help is a flag.

    Raises:
        ValueError: a value is out of its range, or the image does not divide into cells.
    """

    image_size: tuple[int, int] | None = field(
        default=None, metadata={"help": "H or H,W in pixels; default: what the data has"}
    )
    in_channels: int | None = field(
        default=None,
        metadata={
            "help": "1 grey, 3 RGB, 4 RGB + alpha; default: what the data has",
            "choices": (1, 3, 4),
        },
    )
    patch_size: int = field(
        default=4,
        metadata={"help": "side of the pixel blocks that the stem moves into channels"},
    )
    channels: int = field(default=64, metadata={"help": "width of the first level"})
    channel_multipliers: tuple[int, ...] = field(
        default=(1,),
        metadata={
            "help": "width of each level over --channels, as 1,2,4; every level after the "
            "first halves the resolution, so f = patch_size * 2^(levels - 1)"
        },
    )
    num_res_blocks: int = field(default=1, metadata={"help": "residual blocks a level"})
    attention_levels: tuple[int, ...] = field(
        default=(),
        metadata={
            "help": "levels with attention after each residual block, as 3,4; 0 is the first"
        },
    )
    mid_blocks: int = field(
        default=1, metadata={"help": "residual blocks between the last level and the codes"}
    )
    mid_attention: bool = field(
        default=False, metadata={"help": "attention after the first of --mid_blocks"}
    )
    z_channels: int = field(
        default=0,
        metadata={
            "help": "channels that 1x1 convolutions (quant_conv) bring to --codebook_dim and back; "
            "0: no such convolutions"
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout in the residual blocks"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "channels", "num_res_blocks", "mid_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers must be 1 or more each, got {self.channel_multipliers}"
            )
        if max(self.num_res_blocks, self.mid_blocks, len(self.channel_multipliers)) > MOST_BLOCKS:
            raise ValueError(
                "num_res_blocks, mid_blocks and the number of channel_multipliers must be at most "
                f"{MOST_BLOCKS}"
            )
        levels = range(len(self.channel_multipliers))
        if not set(self.attention_levels) <= set(levels):
            raise ValueError(
                f"attention_levels must be in 0..{levels[-1]}, one of each of the "
                f"channel_multipliers, got {self.attention_levels}"
            )
        if self.z_channels < 0:
            raise ValueError(f"z_channels must not be negative, got {self.z_channels}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.image_size is not None:
            height, width = self.image_size
            if min(height, width) < 1 or height % self.downsampling or width % self.downsampling:
                f = self.downsampling
                nearest = [max(f, round(side / f) * f) for side in self.image_size]
                raise ValueError(
                    f"image_size {height},{width} is not a multiple of the downsampling factor "
                    f"{f} (patch_size {self.patch_size}, {len(self.channel_multipliers)} "
                    f"channel_multipliers); use --image_size {nearest[0]},{nearest[1]}, or a "
                    "smaller --patch_size"
                )

    @property
    def downsampling(self) -> int:
        """Pixels on a side of one latent cell, f."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def latent_dim(self) -> tuple[int, int]:
        """Rows and columns (h, w) of the latent grid."""
        if self.image_size is None:
            raise ValueError("image_size is not known yet")
        return self.image_size[0] // self.downsampling, self.image_size[1] // self.downsampling


class VQVAEOutput(NamedTuple):
    """reconstruction: (B, C, H, W); quantized: what the quantizer made of the encoding."""

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
        if config.image_size is None or config.in_channels is None:
            raise ValueError("a VQVAE needs image_size and in_channels")
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = make_quantizer(config)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Images (B, C, H, W) in [-1, 1] -> reconstruction, indices and quantizer losses."""
        quantized = self.quantizer(self.encoder(images))
        return VQVAEOutput(self.decoder(quantized.z_q), quantized)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> indices (B, h, w), int64 in [0, codebook_size).

        With a depth above 1 it is the last axis of the indices, here and in what takes them.
        """
        return self.quantizer.nearest(self.encoder(images))

    def embed(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> z_q (B, codebook_dim, h, w), what the decoder sees."""
        return self.quantizer.embed(indices)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> images (B, C, H, W), clamped to [-1, 1]."""
        return self.decoder(self.embed(indices)).clamp(-1, 1)
