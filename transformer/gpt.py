"""The GPT: a decoder-only transformer over a prefix and a grid of codebook indices."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer.attention import KVCache, attend, covers, window_mask

# How the heads of one layer look at each other: q, k, v (B, heads, T, head_dim) -> the same shape.
Look = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Everything that is needed to build a `GPT`; each field with help is a flag.

    Raises:
        ValueError: a value is out of its range.
    """

    codebook_size: int  # number of codebook indices K
    num_classes: int = 0  # classes; the prefix "no class" comes on top
    latent_dim: tuple[int, int] | None = field(
        default=None,
        metadata={"help": "side, or H,W, of the latent grid; default: what the indices have"},
    )
    num_layers: int = field(default=4, metadata={"help": "transformer blocks"})
    num_heads: int = field(default=4, metadata={"help": "attention heads"})
    dim: int = field(default=192, metadata={"help": "width of the transformer"})
    positions: str = field(
        default="rotary",
        metadata={
            "help": "rotary: rotate queries and keys by row and column; "
            "learned: add an embedding for each cell",
            "choices": ("rotary", "learned"),
        },
    )
    window_size: int = field(
        default=0,
        metadata={
            "help": "each cell attends to the cells less than this many rows above and columns "
            "beside it; 0: to all earlier ones"
        },
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout after each layer"})
    class_dropout: float = field(
        default=0.1,
        metadata={"help": "share of the training images whose class is shown as 'no class'"},
    )

    def __post_init__(self) -> None:
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {self.codebook_size}")
        if self.latent_dim is not None and min(self.latent_dim) < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")
        if self.num_layers < 1 or self.num_heads < 1 or self.dim < 1:
            raise ValueError("num_layers, num_heads and dim must be at least 1")
        if self.num_classes < 0 or self.window_size < 0:
            raise ValueError("num_classes and window_size must not be negative")
        if self.dim % (4 * self.num_heads):
            raise ValueError(
                f"dim {self.dim} must be a multiple of 4 * num_heads = {4 * self.num_heads}"
            )
        for name in ("dropout", "class_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.positions not in ("rotary", "learned"):
            raise ValueError(f"positions must be rotary or learned, got {self.positions}")

    @property
    def no_class(self) -> int:
        """The prefix token that stands for "no class"; the classes are 0 .. num_classes - 1."""
        return self.num_classes


def rotary_angles(height: int, width: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Rotation angles of a 2-D rotary embedding (RoPE, arXiv 2104.09864), (1 + h*w, head_dim / 2).

    The first half of the angles turns with the row, the second with the column. The first line
    is the prefix, which is nowhere in the grid and not turned; cells count from 1.
    """
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter) / quarter)  # (head_dim / 4,)
    rows = torch.arange(1, height + 1)[:, None] * frequencies  # (h, head_dim / 4)
    columns = torch.arange(1, width + 1)[:, None] * frequencies  # (w, head_dim / 4)
    cells = torch.cat(
        [
            rows[:, None].expand(height, width, quarter),
            columns[None, :].expand(height, width, quarter),
        ],
        dim=-1,
    ).flatten(0, 1)  # (h*w, head_dim / 2)
    return torch.cat([torch.zeros(1, 2 * quarter), cells])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[..., i], x[..., i + head_dim / 2]) by the angles of `cos` and `sin`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head attention with normalised queries and keys (QK-norm, arXiv 2302.05442)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.gain = nn.Parameter(torch.ones(2, 1, 1, 1, self.head_dim))  # of queries, of keys
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, look: Look) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])  # (2, B, heads, T, d), (1, ...)
        qk = F.rms_norm(qk, (self.head_dim,), eps=1e-5) * self.gain
        if turn is not None:
            qk = rotate(qk, *turn)
        q, k = qk.type_as(v)
        return self.out(look(q, k, v[0]).transpose(1, 2).flatten(2))  # (B, T, dim)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), with about as many weights as a plain layer of width 4 * dim."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = -(-8 * config.dim // (3 * 64)) * 64  # 8/3 dim, rounded up to whole 64s
        self.gate_and_value = nn.Linear(config.dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the feed-forward layer, each added to x."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = SelfAttention(config)
        self.norm_feed_forward = nn.RMSNorm(config.dim, eps=1e-5)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, look: Look) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x), turn, look))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))


class GPT(nn.Module):
    """p(indices | class) = product over the cells, in raster order, of p(cell | earlier cells).

    The sequence is one prefix token (a class, or "no class") and the cells of the grid. The
    token at each position predicts the cell that comes next (arXiv 2012.09841, section 3.2).
    """

    PREFIX = 1  # tokens before the grid

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.latent_dim is None:
            raise ValueError("a GPT needs latent_dim")
        self.config = config
        height, width = config.latent_dim
        length = self.PREFIX + height * width
        self.prefix_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.token_embedding = nn.Embedding(config.codebook_size, config.dim)
        if config.positions == "learned":
            self.position_embedding = nn.Parameter(torch.zeros(length, config.dim))
        else:
            angles = rotary_angles(height, width, config.dim // config.num_heads)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = nn.Linear(config.dim, config.codebook_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of deviation 0.02; what ends a residual branch shrinks with the depth.

        The head starts at zero, so that the first loss is log(codebook_size) exactly.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                ends_a_branch = name.endswith(("attention.out.weight", "feed_forward.out.weight"))
                depth = 2 * self.config.num_layers if ends_a_branch else 1
                nn.init.normal_(parameter, std=0.02 * depth**-0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, prefix: Tensor, indices: Tensor) -> Tensor:
        """Logits of every cell given the prefix and the cells before it.

        Args:
            prefix: (B,) class of each image, or `config.no_class`.
            indices: (B, h, w) of `config.latent_dim`, in [0, codebook_size).

        Returns:
            (B, h*w, codebook_size): at [b, t] the logits of cell t in raster order.
        """
        if indices.shape[1:] != self.config.latent_dim:
            raise ValueError(
                f"this GPT was made for a grid of {self.config.latent_dim}, "
                f"got {tuple(indices.shape[1:])}"
            )

        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(
                q,
                k,
                v,
                grid=self.config.latent_dim,
                window=self.config.window_size,
                prefix=self.PREFIX,
            )

        x = torch.cat(
            [self.prefix_embedding(prefix)[:, None], self.token_embedding(indices.flatten(1))],
            dim=1,
        )  # (B, 1 + h*w, dim)
        x = self._run(x, 0, [look] * self.config.num_layers)
        return self.head(x[:, self.PREFIX - 1 : -1])  # the last cell predicts nothing

    def step(self, tokens: Tensor, position: int, cache: KVCache) -> Tensor:
        """Logits of the next cell, from one new token and what the cache holds of the others.

        Args:
            tokens: (B,) the prefix if `position` is 0, else the index of cell position - 1.
            position: where `tokens` stand in the sequence; all before are in the cache.
            cache: of `make_cache`, which takes the token in.

        Returns:
            (B, codebook_size), the logits of cell `position` in raster order.
        """
        embedding = self.token_embedding if position >= self.PREFIX else self.prefix_embedding
        mask = None
        if not covers(self.config.window_size, self.config.latent_dim):
            positions = torch.arange(position + 1, device=tokens.device)
            mask = window_mask(
                positions[position:],
                positions,
                width=self.config.latent_dim[1],
                window=self.config.window_size,
                prefix=self.PREFIX,
            )
        looks = [
            lambda q, k, v, layer=layer: cache.attend(layer, q, k, v, position, mask)
            for layer in range(self.config.num_layers)
        ]
        x = self._run(embedding(tokens)[:, None], position, looks)
        return self.head(x[:, 0])

    def make_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `batch_size` sequences of this model."""
        config = self.config
        weight = self.token_embedding.weight
        return KVCache(
            num_layers=config.num_layers,
            batch_size=batch_size,
            num_heads=config.num_heads,
            length=self.PREFIX + config.latent_dim[0] * config.latent_dim[1],
            head_dim=config.dim // config.num_heads,
            device=weight.device,
            dtype=weight.dtype,
        )

    def _run(self, x: Tensor, position: int, looks: list[Look]) -> Tensor:
        """Embeddings (B, n, dim) of the tokens from `position` on -> their final states."""
        here = slice(position, position + x.shape[1])
        turn = None
        if self.config.positions == "learned":
            x = x + self.position_embedding[here]
        else:
            turn = self.cos[here], self.sin[here]
        x = self.dropout(x)
        for block, look in zip(self.blocks, looks, strict=True):
            x = block(x, turn, look)
        return self.norm(x)
