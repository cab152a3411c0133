"""Settings of a tokenizer, and published tokenizers as presets."""

from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, Self, get_type_hints

from vqvae.quantizers import QUANTIZERS, QuantizerOptions
from vqvae.quantizers.base import check_fields, option

FORMAT_VERSION = 2  # of config.json; raised when an older version could misread it


@dataclass(frozen=True)
class VQVAEConfig:
    """Everything needed to build a `VQVAE`; `VQVAEConfig.create` takes all settings flat.

    >>> VQVAEConfig.create(quantizer="fsq", levels=(8, 5, 5, 5), image_size=(64, 64))
    """

    quantizer: str = option(
        "vq",
        "vq, ema: nearest code; cosine: by angle; gumbel: by scores; fsq, lfq: rounded; "
        "ibq: all codes learn; residual: several codes per position",
        choices=tuple(QUANTIZERS),
    )
    quantizer_options: QuantizerOptions = field(default_factory=QUANTIZERS["vq"].Options)
    image_size: tuple[int, int] | None = option(
        None, "H or H,W in pixels; default: that of the data", min=1
    )
    in_channels: int | None = option(
        None, "1 grey, 3 RGB, 4 with alpha; default: as the data", choices=(1, 3, 4)
    )
    value_range: tuple[float, float] | None = option(
        None, "values of black and white, as -1000,3000; default: the data's", min=float("-inf")
    )
    resampling: str = option(
        "", "nearest: for label maps; default: the data's", choices=("", "bicubic", "nearest")
    )
    patch_size: int = option(4, "side of the blocks moved into channels", min=1)
    channels: int = option(64, "width of the first level", min=1, max=1 << 16)
    channel_multipliers: tuple[int, ...] = option(
        (1,), "relative width of each level, as 1,2,4; each new level halves the grid", min=1
    )
    num_res_blocks: int = option(1, "residual blocks per level", min=1, max=64)
    attention_levels: tuple[int, ...] = option((), "levels with attention, as 3,4; 0 is the first")
    mid_blocks: int = option(1, "residual blocks at the lowest resolution", min=1, max=64)
    mid_attention: bool = option(False, "attention after the first of mid_blocks")
    z_channels: int = option(0, "channels before the 1x1 quant_conv; 0: no such layer", min=0)
    channels_per_group: int = option(0, "channels in a group of GroupNorm; 0: 32 groups", min=0)
    dropout: float = option(0.0, "dropout in the residual blocks", max=1, training_only=True)

    @classmethod
    def create(cls, **values: Any) -> Self:
        """A config from flat settings; a ValueError for a wrong value, or a name without effect."""
        quantizer = values.get("quantizer", cls.quantizer)
        if quantizer not in tuple(QUANTIZERS):
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {quantizer!r}")
        network = {each.name for each in fields(cls)} - {"quantizer_options"}
        options = {name: values.pop(name) for name in values.keys() - network}
        for name in sorted(options.keys() - OPTIONS[quantizer].keys()):
            if name not in OPTION_TYPES:
                raise ValueError(f"{name!r:.80} is unknown to this version")
            raise ValueError(f"{name} has no effect with the quantizer {quantizer}; leave it out")
        return cls(quantizer_options=QUANTIZERS[quantizer].Options(**options), **values)

    @classmethod
    def from_preset(cls, preset: str, **values: Any) -> Self:
        """A preset with other values; its codes give way to another quantizer, or to `levels`."""
        settings = PRESETS[preset].copy()
        quantizer = settings.get("quantizer", cls.quantizer)
        if values.get("quantizer", quantizer) != quantizer:
            settings.pop("codebook_dim", None)
        if "levels" in values:
            settings = {name: x for name, x in settings.items() if not name.startswith("codebook")}
        return cls.create(**settings | values)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The config of a config.json; a ValueError where this version reads no VQVAE from it."""
        model, version = values.pop("model", None), values.pop("format_version", 1)
        if model != "VQVAE":
            raise ValueError(f"it holds a {model!s:.80}, but a VQVAE is needed here")
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"its format_version is {version!r:.80}, but this version of the code reads up to "
                f"{FORMAT_VERSION}; update the code"
            )
        if version < 2 and values.get("quantizer") == "ibq":
            values["similarity"] = "inner_product"  # the only one there was
        return cls.create(**values)

    def to_dict(self) -> dict[str, Any]:
        """All settings flat, as `create` takes them and config.json holds them."""
        values = asdict(self)
        options = values.pop("quantizer_options")
        return {"quantizer": values.pop("quantizer"), **options, **values}

    def __post_init__(self) -> None:
        check_fields(self)
        if type(self.quantizer_options) is not QUANTIZERS[self.quantizer].Options:
            raise ValueError(f"quantizer_options are not of the quantizer {self.quantizer}")
        levels = len(self.channel_multipliers)
        if not 1 <= levels <= 16:
            raise ValueError(f"there must be 1 to 16 channel_multipliers, got {levels}")
        if not set(self.attention_levels) <= set(range(levels)):
            raise ValueError(f"attention_levels must be in 0..{levels - 1}")
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise ValueError("value_range must be two ascending numbers")
        f = self.downsampling
        if self.image_size is not None and any(n % f for n in self.image_size):
            given, nearest = self.image_size, [max(f, round(n / f) * f) for n in self.image_size]
            raise ValueError(
                f"image_size {given[0]},{given[1]} is not a multiple of the downsampling factor "
                f"{f}; use image_size {nearest[0]},{nearest[1]}, or a smaller patch_size"
            )

    @property
    def image_options(self) -> dict[str, Any]:
        """Size, channels and values of the images, as a data set takes them."""
        size, channels = self.image_size, self.in_channels
        more = {"value_range": self.value_range, "resampling": self.resampling}
        return {"size": size, "channels": channels, **more}

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def downsampling(self) -> int:
        """Pixels on a side of one latent position, f."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def latent_dim(self) -> tuple[int, int]:
        """Rows and columns (h, w) of the latent grid."""
        return self.image_size[0] // self.downsampling, self.image_size[1] // self.downsampling

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


OPTIONS = {name: {x.name: x for x in fields(q.Options)} for name, q in QUANTIZERS.items()}
OPTION_TYPES = {k: v for q in QUANTIZERS.values() for k, v in get_type_hints(q.Options).items()}


def all_options() -> type:
    """The options of all quantizers as the optional fields of one dataclass, for a common help.

    Values that were given go to `VQVAEConfig.create`, which refuses those of other quantizers.
    """
    merged = []
    for name, kind in OPTION_TYPES.items():
        owners = [quantizer for quantizer, options in OPTIONS.items() if name in options]
        defaults: dict[str, list[str]] = {}  # value -> the quantizers that have it
        for quantizer in owners:
            value = getattr(QUANTIZERS[quantizer].Options(), name)
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            defaults.setdefault(shown, []).append(quantizer)
        default = "; ".join(f"{', '.join(names)}: {value}" for value, names in defaults.items())
        metadata = dict(OPTIONS[owners[-1]][name].metadata)
        only = f"; {', '.join(owners)} only" if len(owners) < len(OPTIONS) else ""
        text = f"{metadata.pop('help')}{only} (default: {default if len(defaults) > 1 else shown})"
        merged.append((name, kind | None, option(None, text, **metadata)))
    return make_dataclass("AllOptions", merged)


def training_only() -> set[str]:
    """Settings that change neither the shapes of the weights nor what a trained model computes."""
    every = [*fields(VQVAEConfig), *(x for options in OPTIONS.values() for x in options.values())]
    return {each.name for each in every if each.metadata.get("training_only")}


def _vqgan(*multipliers: int, dim: int = 256, **settings: Any) -> dict[str, Any]:
    """What taming-transformers' VQGANs and LlamaGen's tokenizer share."""
    shared = {
        "patch_size": 1,
        "channels": 128,
        "channel_multipliers": multipliers,
        "num_res_blocks": 2,
        "attention_levels": (len(multipliers) - 1,),
        "mid_blocks": 2,
        "mid_attention": True,
        "z_channels": 256,
        "codebook_size": 16384,
        "codebook_dim": dim,
    }
    return shared | settings


# Settings of `VQVAEConfig.create`; others have their defaults. "-s2d" is for space to depth: 2x2
# pixels are moved into channels, which replaces the level at full resolution.
PRESETS: dict[str, dict[str, Any]] = {
    "vqvae-small": {},
    "vqgan-f8": _vqgan(1, 1, 2, 4, quantizer="gumbel", codebook_size=8192),
    "vqgan-f8-s2d": _vqgan(1, 2, 4, patch_size=2, quantizer="gumbel", codebook_size=8192),
    "vqgan-f16": _vqgan(1, 1, 2, 2, 4),
    "vqgan-f16-s2d": _vqgan(1, 2, 2, 4, patch_size=2),
    "llamagen-f16": _vqgan(1, 1, 2, 2, 4, dim=8, quantizer="cosine"),
}
