"""Configuration of a GPT: its flags and named sizes; its prefix.

The prefix is (B,) where a model takes only a class, else (B, P): the class, the indices of another
grid, the condition, in raster order (arXiv 2012.09841, section 3.2), the vectors of another model,
the embeddings (arXiv 2406.06525), and the text tokens of a caption (arXiv 2102.12092). Each of
these parts has a value for "not given": one more token, and infinity for vectors.
"""

import math
import operator
import types
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

# num_layers, num_heads, dim, hidden_dim; B, L and XL are LlamaGen's (arXiv 2406.06525).
SIZES = {
    "tiny": (4, 4, 192, 512),
    "small": (8, 6, 384, 1024),
    "B": (12, 12, 768, 2048),
    "L": (24, 16, 1024, 2816),
    "XL": (36, 20, 1280, 3584),
}
FORMAT_VERSION = 1  # of config.json
LIMITS = {
    "min": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "max": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field that is a flag with this help; `check_fields` checks `choices` and `LIMITS`."""
    return field(default=default, metadata={"help": text, **metadata})


def check_fields(config: Any) -> None:
    """A ValueError for a wrong type, choice or limit; a list, as in JSON, becomes a tuple."""
    hints = get_type_hints(type(config))
    for each in fields(config):
        name, value = each.name, getattr(config, each.name)
        if value is None and each.default is None:
            continue
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(config, name, value)
        kind = hints[name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = get_args(kind)[0]
        kinds = get_args(kind) or (kind,)
        parts = value if isinstance(value, tuple) else (value,)
        fits = len(kinds) == len(parts) and all(
            isinstance(x, (int, float) if wanted is float else wanted)
            and isinstance(x, bool) == (wanted is bool)
            for x, wanted in zip(parts, kinds, strict=True)
        )
        if not fits:
            wanted = getattr(kind, "__name__", kind)
            raise ValueError(f"{name} must be of type {wanted}, got {value!r:.80}")
        choices = each.metadata.get("choices", (value,))
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value:.80}")
        for key, (words, holds) in LIMITS.items():
            limit = each.metadata.get(key)
            if limit is not None and not all(holds(x, limit) for x in parts):
                raise ValueError(f"{name} must be {words} {limit}, got {value}")


class PrefixPart(NamedTuple):
    """What an image is generated from: `length` tokens or vectors; of `null` alone: "not given"."""

    name: str
    length: int
    null: Any  # the highest token, or infinity
    dropout: float  # fraction of training images without it
    dim: int = 0  # numbers of a vector; 0: tokens

    @property
    def layer(self) -> str:
        """The name of its embeddings, or of the projection of its vectors, in a GPT."""
        names = {"class": "prefix_embedding", "embeddings": "embeddings_projection"}
        return names.get(self.name, f"{self.name}_embedding")

    @property
    def width(self) -> int:
        """How many of the P numbers of a prefix are its tokens or vectors."""
        return self.length * max(self.dim, 1)


@dataclass(frozen=True)
class GPTConfig:
    """Everything that a `GPT` is built from; each field with help is a flag."""

    codebook_size: int = field(metadata={"min": 2})  # number of codebook indices K
    depth: int = field(default=1, metadata={"min": 1})  # indices per latent position
    num_classes: int = field(default=0, metadata={"min": 0})  # this token is "no class"
    condition_codebook_size: int = 0  # of the grid before the image's; this index is "not given"
    condition_latent_dim: tuple[int, int] | None = None  # its rows and columns
    embeddings_shape: tuple[int, int] | None = None  # vectors of an image, and numbers of each
    caption_vocabulary_size: int = 0  # text tokens; the one after them pads, and is "not given"
    latent_dim: tuple[int, int] | None = option(
        None, "side or H,W of the latent grid; default: that of the indices", min=1
    )
    size: str = option(
        "tiny",
        "preset for the dimensions below; each flag overrides it: "
        + ", ".join(f"{name} {shape[0]} x {shape[2]}" for name, shape in SIZES.items()),
        choices=tuple(SIZES),
    )
    num_layers: int = option(0, "transformer blocks; 0: from size", min=0, max=1000)
    num_heads: int = option(0, "attention heads; 0: from size", min=0)
    num_kv_heads: int = option(0, "heads of keys and values; 0: as many as num_heads", min=0)
    dim: int = option(0, "width of the transformer; 0: from size", min=0)
    hidden_dim: int = option(0, "width of feed-forward layers; 0: from size, or 8/3 dim", min=0)
    positions: str = option(
        "both", "rotary or learned embeddings, or both", choices=("both", "rotary", "learned")
    )
    rope_base: float = option(
        100.0, "rotary base, lower for smaller grids; LlamaGen: 10,000", above=1, below=math.inf
    )
    tie_embeddings: bool = option(False, "the head uses the weights of the token embeddings")
    start_from_codebook: bool = option(False, "token embeddings start as projected codes")
    label_smoothing: float = option(
        0.0, "part of the loss spread over the nearest codes; needs a tokenizer", min=0, below=1
    )
    window_size: int = option(
        0, "attend to less than this many rows above and columns beside; 0: to all", min=0
    )
    dropout: float = option(0.1, "dropout after each layer", min=0, below=1)
    class_dropout: float = option(0.1, "how often the class is dropped", min=0, below=1)
    condition_dropout: float = option(0.1, "how often the condition is dropped", min=0, below=1)
    embeddings_dropout: float = option(0.1, "how often the embeddings are dropped", min=0, below=1)
    caption_dropout: float = option(0.1, "how often the caption is dropped", min=0, below=1)
    caption_length: int | None = option(
        None, "tokens of a caption; 0: ignored; default: the longest, up to 64", metavar="N", min=0
    )
    text_weight: float = option(
        0.0, "weight of a loss on the text tokens", min=0, below=math.inf, needs="caption_length"
    )
    order_anneal: tuple[float, float] | None = option(
        None,
        "fractions of the training, as 0.5,0.75: random orders up to the first, a falling "
        "mix up to the second, then raster order (RAR); 1,1: always, for any order; default: never",
        metavar="START,END",
        min=0,
        max=1,
    )

    # Of a grid whose positions a fine-tuning rescaled: rotary coordinates per row and per column.
    position_scale: tuple[float, float] = (1.0, 1.0)
    qk_norm: bool = True  # LlamaGen has neither this
    blank_prefix: bool = False  # nor a class token with a rotary angle: its keys are zeros

    def __post_init__(self) -> None:
        check_fields(self)
        # Dimensions of 0 become those of `size`.
        names = "num_layers", "num_heads", "dim", "hidden_dim"
        defaults = dict(zip(names, SIZES[self.size], strict=True))
        if self.dim not in (0, defaults["dim"]):
            # About as many weights as a plain layer of width 4 * dim, in whole 64s.
            defaults["hidden_dim"] = -(-8 * self.dim // (3 * 64)) * 64
        defaults |= {"num_kv_heads": self.num_heads or defaults["num_heads"], "caption_length": 0}
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        heads, kv_heads, dim = self.num_heads, self.num_kv_heads, self.dim
        if heads % kv_heads:
            raise ValueError(f"num_heads {heads} must be a multiple of num_kv_heads {kv_heads}")
        if dim % (4 * heads):
            raise ValueError(f"dim {dim} must be a multiple of 4 * num_heads = {4 * heads}")
        if self.needs_codebook and self.depth > 1:
            raise ValueError("start_from_codebook and label_smoothing need depth 1")
        if self.order_anneal is not None:
            if self.order_anneal[0] > self.order_anneal[1]:
                raise ValueError(f"order_anneal must rise, got {self.order_anneal}")
            if self.window_size:
                raise ValueError("order_anneal needs window_size 0: there are no rows above")

    @classmethod
    def from_json(cls, values: Any) -> "GPTConfig":
        """The config of a config.json; a TypeError or ValueError where it describes no GPT."""
        values = dict(values)
        model, version = values.pop("model", None), values.pop("format_version", 1)
        if model != "GPT":
            raise ValueError(f"it holds a {model!s:.80}, but a GPT is needed here")
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(f"format_version {version!r:.80} is too new; update this code")
        return cls(**values)

    @property
    def needs_codebook(self) -> bool:
        """Whether a training begins with `GPT.use_codebook`."""
        return self.start_from_codebook or self.label_smoothing > 0

    @property
    def prefix_parts(self) -> list[PrefixPart]:
        """The class, then condition, embeddings and caption where the GPT takes them."""
        condition = math.prod(self.condition_latent_dim or (0,))
        length, dim = self.embeddings_shape or (0, 0)
        parts: tuple[tuple[Any, ...], ...] = (
            ("class", 1, self.num_classes, self.class_dropout),
            ("condition", condition, self.condition_codebook_size, self.condition_dropout),
            ("embeddings", length, math.inf, self.embeddings_dropout, dim),
            ("caption", self.caption_length, self.caption_vocabulary_size, self.caption_dropout),
        )
        return [PrefixPart(*part) for part in parts if part[1]]

    @property
    def any_order(self) -> bool:
        """Whether all of the training is in random orders, so that any order can be sampled."""
        return self.order_anneal == (1, 1)

    @property
    def prefix_length(self) -> int:
        """Elements of a sequence before the grid, one for each token or vector of the prefix."""
        return sum(part.length for part in self.prefix_parts)

    def split_prefix(self, prefix: Tensor) -> list[tuple[PrefixPart, Tensor]]:
        """The parts of a prefix (B, P), each with its tokens, int64, or vectors (B, width)."""
        prefix, parts = prefix.reshape(len(prefix), -1), self.prefix_parts
        widths = [part.width for part in parts]
        if prefix.shape[1] != sum(widths):
            raise ValueError(f"the prefix must have P = {sum(widths)}, got {prefix.shape[1]}")
        values = zip(parts, prefix.split(widths, dim=1), strict=True)
        return [(part, x if part.dim else x.long()) for part, x in values]

    def null_prefix(self, prefix: Tensor, names: str = "") -> Tensor:
        """A prefix with the parts of these names, as class,caption, "not given"; default: all."""
        known = [part.name for part in self.prefix_parts]
        chosen = names.split(",") if names else known
        if unknown := {*chosen} - {*known}:
            raise ValueError(f"the prefix has {', '.join(known)}, but no part {min(unknown)}")
        parts = [
            torch.full_like(x, part.null) if part.name in chosen else x
            for part, x in self.split_prefix(prefix)
        ]
        return torch.cat(parts, dim=1).view_as(prefix)

    def drop_conditioning(self, prefix: Tensor) -> Tensor:
        """Drop each part of the prefix of some images, for guidance.

        Each part is dropped from its `dropout` of the images: all parts together in half of the
        smallest fraction, each alone in the rest; those overlap where fractions sum to more than 1.
        """
        chance = torch.rand(len(prefix), 1).to(prefix.device)
        start = together = min(part.dropout for part in self.prefix_parts) / 2
        parts = []
        for part, x in self.split_prefix(prefix):
            alone = (chance - start) % (1 - together) < part.dropout - together
            parts.append(x.masked_fill((chance < together) | alone, part.null))
            start += part.dropout - together
        return torch.cat(parts, dim=1).view_as(prefix)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    def check_guide(self, other: "GPTConfig") -> None:
        """A ValueError for a GPT of other indices or another prefix, which cannot guide this."""
        names = ("codebook_size", "depth", "latent_dim", "num_classes", "condition_codebook_size")
        others = ("condition_latent_dim", "embeddings_shape", "caption_vocabulary_size")
        for name in (*names, *others, "caption_length", "any_order"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own != theirs:
                raise ValueError(f"the guide has {name} {theirs}, but the model has {name} {own}")

    def orders_are_final(self, progress: float) -> bool:
        """Whether the orders from a fraction `progress` of the training on are those of its end."""
        return self.order_anneal is None or self.any_order or progress >= self.order_anneal[1]

    def grid_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the indices of a grid of `size`: (h, w), or (h, w, depth) if depth > 1."""
        return size if self.depth == 1 else (*size, self.depth)


def make_prefix(classes: Tensor, *parts: Tensor | None) -> Tensor:
    """Classes (B,), conditions (B, hc, wc), embeddings (B, L, D), captions (B, L) -> the prefix.

    It is int64, or float32 with embeddings: exact for tokens up to 2^24. A part that the model does
    not take is None, or omitted.
    """
    given = [part.flatten(1) for part in parts if part is not None]
    given = [part.float() if part.is_floating_point() else part.to(classes) for part in given]
    return torch.cat([classes[:, None], *given], dim=1) if given else classes


@dataclass(frozen=True)
class FineTuningConfig:
    """What a training of a GPT starts from, and which weights it changes."""

    init_from: str = option("", "GPT to start from: its weights and shape, with a new optimiser")
    grid_positions: str = option(
        "interpolate",
        "positions of a grid of another size: compressed into the former range, or beyond it",
        choices=("interpolate", "extrapolate"),
        needs="init_from",
    )
    reset_embeddings: bool = option(
        False, "new embeddings and head, for indices of another tokenizer", needs="init_from"
    )
    freeze: str = option(
        "",
        "weights that are not trained, by the beginning of their names: blocks.0,blocks.1,head",
        metavar="NAME,...",
        needs="init_from",
    )
    lora_rank: int = option(
        0,
        "train only updates of this rank to the blocks (LoRA), merged when saved; 0: all weights",
        min=0,
        needs="init_from",
    )

    def __post_init__(self) -> None:
        check_fields(self)
