"""Settings of a tokenizer, and published tokenizers as presets."""

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass
from types import MappingProxyType
from typing import Any, Self, get_type_hints

from vqvae.quantizers import QUANTIZERS, QuantizerOptions, make_options
from vqvae.quantizers.base import check_types, option

FORMAT_VERSION = 1  # of config.json; raised when an older version could misread it
MAX_BLOCKS = 64  # more only occur in a config file that was tampered with


@dataclass(frozen=True)
class VQVAEConfig:
    """Everything needed to build a `VQVAE`; `VQVAEConfig.create` takes all settings flat.

    >>> VQVAEConfig.create(quantizer="fsq", levels=(8, 5, 5, 5), image_size=(64, 64))

    Raises:
        ValueError: a value is out of its range, or does not divide the image into latent positions.
    """

    quantizer: str = option(
        "vq",
        "vq: nearest code by distance; ema: the same, codes as moving averages; cosine: by angle, "
        "on the unit sphere; gumbel: the encoder scores the codes; fsq: each dimension rounded; "
        "lfq: each dimension one bit; ibq: all codes learn at once; residual: several codes per "
        "latent position",
        choices=tuple(QUANTIZERS),
    )
    quantizer_options: QuantizerOptions = field(default_factory=QUANTIZERS["vq"].Options)
    image_size: tuple[int, int] | None = option(
        None, "H or H,W in pixels; default: that of the data"
    )
    in_channels: int | None = option(
        None, "1 grey, 3 RGB, 4 RGB + alpha; default: those of the data", choices=(1, 3, 4)
    )
    patch_size: int = option(4, "side of the pixel blocks that the stem moves into channels")
    channels: int = option(64, "width of the first level")
    channel_multipliers: tuple[int, ...] = option(
        (1,),
        "width of each level relative to channels, as 1,2,4; every level after the first halves "
        "the resolution, so f = patch_size * 2^(levels - 1)",
    )
    num_res_blocks: int = option(1, "residual blocks per level")
    attention_levels: tuple[int, ...] = option(
        (), "levels with attention after each residual block, as 3,4; 0 is the first"
    )
    mid_blocks: int = option(1, "residual blocks between the last level and the quantizer")
    mid_attention: bool = option(False, "attention after the first of mid_blocks")
    z_channels: int = option(
        0,
        "channels that 1x1 convolutions (quant_conv) map to codebook_dim and back; 0: no such "
        "convolutions",
    )
    dropout: float = option(0.0, "dropout in the residual blocks", training_only=True)

    @classmethod
    def create(cls, **values: Any) -> Self:
        """A config from flat settings: of the network, and options of its quantizer.

        Raises:
            ValueError: a name that is unknown or has no effect, or a value of another type.
        """
        names = {each.name for each in fields(cls)} - {"quantizer_options"}
        if unknown := sorted(values.keys() - names - OPTION_TYPES.keys()):
            raise ValueError(f"{unknown[0]!r:.80} is unknown to this version")
        network = check_types(cls, {name: values[name] for name in names & values.keys()})
        options = {name: value for name, value in values.items() if name not in names}
        chosen = make_options(network.get("quantizer", cls.quantizer), options)
        return cls(quantizer_options=chosen, **network)

    @classmethod
    def from_preset(cls, preset: str, **values: Any) -> Self:
        """A preset with other values; its codes give way to another quantizer, or to `levels`."""
        settings = dict(PRESETS[preset])
        if values.get("quantizer", cls.quantizer) != settings.get("quantizer", cls.quantizer):
            settings.pop("codebook_dim", None)
        if "levels" in values:
            settings = {name: x for name, x in settings.items() if not name.startswith("codebook")}
        return cls.create(**settings | values)

    def to_dict(self) -> dict[str, Any]:
        """All settings flat, as `create` takes them and config.json holds them."""
        values = asdict(self)
        options = values.pop("quantizer_options")
        return {"quantizer": values.pop("quantizer"), **options, **values}

    def __post_init__(self) -> None:
        if type(self.quantizer_options) is not QUANTIZERS[self.quantizer].Options:
            raise ValueError(f"quantizer_options are not of the quantizer {self.quantizer}")
        for name in ("patch_size", "channels", "num_res_blocks", "mid_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers must be 1 or more each, got {self.channel_multipliers}"
            )
        if max(self.num_res_blocks, self.mid_blocks, len(self.channel_multipliers)) > MAX_BLOCKS:
            raise ValueError(
                "num_res_blocks, mid_blocks and the number of channel_multipliers must be at most "
                f"{MAX_BLOCKS}"
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
        f = self.downsampling
        if self.image_size is not None and any(n < 1 or n % f for n in self.image_size):
            height, width = self.image_size
            nearest = [max(f, round(side / f) * f) for side in self.image_size]
            raise ValueError(
                f"image_size {height},{width} is not a multiple of the downsampling factor {f} "
                f"(patch_size {self.patch_size}, {len(levels)} channel_multipliers); use "
                f"image_size {nearest[0]},{nearest[1]}, or a smaller patch_size"
            )

    @property
    def downsampling(self) -> int:
        """Pixels on a side of one latent position, f."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def latent_dim(self) -> tuple[int, int]:
        """Rows and columns (h, w) of the latent grid."""
        if self.image_size is None:
            raise ValueError("image_size is not known yet")
        return self.image_size[0] // self.downsampling, self.image_size[1] // self.downsampling

    @property
    def patch_channels(self) -> int:
        """Channels of the pixel blocks, C * patch_size^2."""
        if self.in_channels is None:
            raise ValueError("in_channels is not known yet")
        return self.in_channels * self.patch_size**2

    @property
    def codebook_size(self) -> int:
        """Number of codes K, of each depth."""
        return self.quantizer_options.codebook_size

    @property
    def codebook_dim(self) -> int:
        """Dimension D of a code."""
        return self.quantizer_options.codebook_dim

    @property
    def depth(self) -> int:
        """Codes per latent position."""
        return self.quantizer_options.depth

    @property
    def num_codes(self) -> int:
        """Codes of all depths together."""
        return self.quantizer_options.num_codes


OPTIONS = {name: {x.name: x for x in fields(q.Options)} for name, q in QUANTIZERS.items()}
OPTION_TYPES = {k: v for q in QUANTIZERS.values() for k, v in get_type_hints(q.Options).items()}


def all_options() -> type:
    """The options of all quantizers as the optional fields of one dataclass, for a common help.

    Values that were given go to `VQVAEConfig.create`, which refuses those of other quantizers.
    """
    every = {name: each for options in OPTIONS.values() for name, each in options.items()}
    return make_dataclass(
        "AllOptions",
        [
            (name, OPTION_TYPES[name] | None, option(None, **_describe(name, each)))
            for name, each in every.items()
        ],
    )


def _describe(name: str, last: Field) -> dict[str, Any]:
    """Metadata of an option; its description tells which quantizers have it, and their defaults."""
    owners = {quantizer: x[name] for quantizer, x in OPTIONS.items() if name in x}
    only = f"; {', '.join(owners)} only" if len(owners) < len(OPTIONS) else ""
    defaults: dict[str, list[str]] = {}  # value -> the quantizers that have it
    for quantizer, each in owners.items():
        value = each.default
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        defaults.setdefault(shown, []).append(quantizer)
    shown = "; ".join(f"{', '.join(names)}: {value}" for value, names in defaults.items())
    default = shown if len(defaults) > 1 else next(iter(defaults))
    description = f"{last.metadata['help']}{only} (default: {default})"
    return {"description": description, "choices": last.metadata.get("choices")}


def training_only() -> set[str]:
    """Settings that change neither the shapes of the weights nor what a trained model computes."""
    every = [*fields(VQVAEConfig), *(x for options in OPTIONS.values() for x in options.values())]
    return {each.name for each in every if each.metadata.get("training_only")}


# What taming-transformers' VQGANs and LlamaGen's tokenizer share.
_VQGAN = {
    "patch_size": 1,
    "channels": 128,
    "num_res_blocks": 2,
    "mid_blocks": 2,
    "mid_attention": True,
    "z_channels": 256,
    "codebook_size": 16384,
}
_TAMING = {**_VQGAN, "quantizer": "vq", "codebook_dim": 256}

# Settings of `VQVAEConfig.create`; others have their defaults. "-s2d" is for space to depth: 2x2
# pixels are moved into channels, which replaces the level at full resolution.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "vqvae-small": {},
        "vqgan-f8": {**_TAMING, "channel_multipliers": (1, 1, 2, 4), "attention_levels": (3,)},
        "vqgan-f8-s2d": {
            **_TAMING,
            "patch_size": 2,
            "channel_multipliers": (1, 2, 4),
            "attention_levels": (2,),
        },
        "vqgan-f16": {**_TAMING, "channel_multipliers": (1, 1, 2, 2, 4), "attention_levels": (4,)},
        "vqgan-f16-s2d": {
            **_TAMING,
            "patch_size": 2,
            "channel_multipliers": (1, 2, 2, 4),
            "attention_levels": (3,),
        },
        "llamagen-f16": {
            **_VQGAN,
            "channel_multipliers": (1, 1, 2, 2, 4),
            "attention_levels": (4,),
            "quantizer": "cosine",
            "codebook_dim": 8,
        },
    }
)
