"""Configuration of a GPT: its flags, and the named sizes."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args, get_type_hints

# num_layers, num_heads, dim, hidden_dim; B, L and XL are LlamaGen's (arXiv 2406.06525).
SIZES = {
    "tiny": (4, 4, 192, 512),
    "small": (8, 6, 384, 1024),
    "B": (12, 12, 768, 2048),
    "L": (24, 16, 1024, 2816),
    "XL": (36, 20, 1280, 3584),
}
MAX_LAYERS = 1000  # above, a config file has been tampered with
FORMAT_VERSION = 1  # of config.json


@dataclass(frozen=True)
class GPTConfig:
    """Everything that a `GPT` is built from; each field with help is a flag.

    Raises:
        ValueError: a value is out of its range.
    """

    codebook_size: int  # number of codebook indices K
    depth: int = 1  # indices per latent position (residual quantization)
    num_classes: int = 0  # without "no class", which has an embedding as well
    condition_codebook_size: int = 0  # of a conditioning grid before the image's; 0: none
    condition_latent_dim: tuple[int, int] | None = None  # its rows and columns
    latent_dim: tuple[int, int] | None = field(
        default=None,
        metadata={"help": "side, or H,W, of the latent grid; default: that of the indices"},
    )
    size: str = field(
        default="tiny",
        metadata={
            "help": "preset for the dimensions below; each flag overrides it: "
            + ", ".join(f"{name} {shape[0]} x {shape[2]}" for name, shape in SIZES.items()),
            "choices": tuple(SIZES),
        },
    )
    num_layers: int = field(default=0, metadata={"help": "transformer blocks; 0: --size's"})
    num_heads: int = field(default=0, metadata={"help": "attention heads; 0: --size's"})
    num_kv_heads: int = field(
        default=0, metadata={"help": "heads of keys and values; 0: as many as --num_heads"}
    )
    dim: int = field(default=0, metadata={"help": "width of the transformer; 0: --size's"})
    hidden_dim: int = field(
        default=0,
        metadata={"help": "width of its feed-forward layers; 0: --size's, or 8/3 of another --dim"},
    )
    positions: str = field(
        default="rotary",
        metadata={
            "help": "rotary: rotate queries and keys by row and column; "
            "learned: add an embedding of each position",
            "choices": ("rotary", "learned"),
        },
    )
    window_size: int = field(
        default=0,
        metadata={
            "help": "each latent position attends to those less than this many rows above and "
            "columns beside it; 0: to all earlier ones"
        },
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout after each layer"})
    class_dropout: float = field(
        default=0.1,
        metadata={"help": "fraction of training images whose class is replaced by 'no class'"},
    )
    condition_dropout: float = field(
        default=0.1,
        metadata={"help": "fraction of training images whose condition, if any, is dropped"},
    )
    order_anneal: tuple[float, float] | None = field(
        default=None,
        metadata={
            "help": "fractions of the training, as 0.5,0.75: random orders up to the first, raster "
            "order from the second on, a falling mix between (RAR); default: raster order",
            "metavar": "START,END",
        },
    )

    qk_norm: bool = True  # LlamaGen has neither this
    blank_prefix: bool = False  # nor a class token with a rotary angle: its keys are zeros

    def __post_init__(self) -> None:
        num_layers, num_heads, num_kv_heads, dim, hidden_dim = self._shape()
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {self.codebook_size}")
        if self.latent_dim is not None and min(self.latent_dim) < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")
        if min(num_layers, num_heads, num_kv_heads, dim, hidden_dim) < 1:
            raise ValueError(
                "num_layers, num_heads, num_kv_heads, dim and hidden_dim must be at least 1"
            )
        if num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers must be at most {MAX_LAYERS}, got {num_layers}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}"
            )
        if self.num_classes < 0 or self.window_size < 0:
            raise ValueError("num_classes and window_size must not be negative")
        if dim % (4 * num_heads):
            raise ValueError(f"dim {dim} must be a multiple of 4 * num_heads = {4 * num_heads}")
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")
        if bool(self.condition_codebook_size) != (self.condition_latent_dim is not None):
            raise ValueError("condition_codebook_size and condition_latent_dim go together")
        if self.order_anneal is not None:
            if not 0 <= self.order_anneal[0] <= self.order_anneal[1] <= 1:
                raise ValueError(f"order_anneal must rise within [0, 1], got {self.order_anneal}")
            if self.window_size:
                raise ValueError(
                    f"order_anneal needs window_size 0, got {self.window_size}: a random order "
                    "has no rows above"
                )
        for name in ("dropout", "class_dropout", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.positions not in ("rotary", "learned"):
            raise ValueError(f"positions must be rotary or learned, got {self.positions}")

    def _shape(self) -> tuple[int, int, int, int, int]:
        """num_layers, num_heads, num_kv_heads, dim and hidden_dim, each 0 replaced by its value."""
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {tuple(SIZES)}, got {self.size}")
        num_layers, num_heads, dim, hidden_dim = SIZES[self.size]
        if self.dim not in (0, dim):
            # About as many weights as a plain layer of width 4 * dim, in whole 64s.
            hidden_dim = -(-8 * self.dim // (3 * 64)) * 64
        num_heads = self.num_heads or num_heads
        return (
            self.num_layers or num_layers,
            num_heads,
            self.num_kv_heads or num_heads,
            self.dim or dim,
            self.hidden_dim or hidden_dim,
        )

    def resolve_defaults(self) -> "GPTConfig":
        """This config with the dimensions that are 0 replaced by those of `size`."""
        names = ("num_layers", "num_heads", "num_kv_heads", "dim", "hidden_dim")
        shape: dict[str, Any] = dict(zip(names, self._shape(), strict=True))
        return replace(self, **shape)

    def to_json(self) -> dict[str, Any]:
        """The content of config.json."""
        return {"model": "GPT", "format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Any) -> "GPTConfig":
        """The config that the content of a config.json describes.

        Raises:
            ValueError: another kind of model, a newer format, or a value of a wrong type.
        """
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        model, version = values.pop("model", None), values.pop("format_version", 1)
        if model != "GPT":
            raise ValueError(f"it holds a {model!s:.80}, but a GPT is needed here")
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"its format_version is {version!r:.80}, but this version of the code reads up to "
                f"{FORMAT_VERSION}; update the code"
            )
        types = get_type_hints(cls)
        for name, value in values.items():
            kind = types.get(name)
            if isinstance(value, list):  # a pair, which is always optional
                fits = len(value) == 2 and {int, float}.issuperset(map(type, value))
                fits = fits and type(None) in get_args(kind)
            else:
                fits = type(value) in (kind, *get_args(kind)) or (type(value), kind) == (int, float)
            if not fits:
                raise ValueError(f"{name:.80} is {value!r:.80}: unknown, or of a wrong type")
        pairs: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in values.items()
        }
        return cls(**pairs)

    @property
    def no_class(self) -> int:
        """The prefix token that stands for "no class"; the classes are 0 .. num_classes - 1."""
        return self.num_classes

    @property
    def no_condition(self) -> int:
        """The index at every position of a condition that is not given."""
        return self.condition_codebook_size

    @property
    def prefix_length(self) -> int:
        """P, tokens before the grid: the class and the indices of the condition."""
        return 1 + math.prod(self.condition_latent_dim or (0,))

    @property
    def head_dim(self) -> int:
        """Width of one attention head, of a config whose defaults are resolved."""
        return self.dim // self.num_heads

    @property
    def has_absolute_positions(self) -> bool:
        """Whether some embedding table has one row per latent position of the trained grid."""
        return self.positions == "learned" or self.order_anneal is not None

    def grid_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the indices of a grid of `size`: (h, w), or (h, w, depth) if depth > 1."""
        return size if self.depth == 1 else (*size, self.depth)
