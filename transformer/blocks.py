"""What the GPT is built from: attention with normalised queries and keys, and SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn, ones

from transformer.positions import rotate

if TYPE_CHECKING:
    from transformer.config import GPTConfig

# How one layer looks back: q (B, heads, T, head_dim), k, v (B, kv_heads, T, head_dim) -> like q.
Look = Callable[[Tensor, Tensor, Tensor], Tensor]


class SelfAttention(nn.Module):
    """Multi-head attention with normalised queries and keys (QK-norm, arXiv 2302.05442).

    With fewer heads of keys and values than of queries, these share them in equal groups
    (grouped-query attention, arXiv 2305.13245), and the cache shrinks accordingly.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.heads) * self.head_dim, bias=False)
        # of queries, of keys
        self.gain = nn.Parameter(ones(2, 1, 1, 1, self.head_dim)) if config.qk_norm else None
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, look: Look) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, heads, T, d), (B, kv_heads, T, d), ...
        if self.gain is not None:
            q = F.rms_norm(q, (self.head_dim,), eps=1e-5) * self.gain[0]
            k = F.rms_norm(k, (self.head_dim,), eps=1e-5) * self.gain[1]
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        return self.out(look(q.type_as(v), k.type_as(v), v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.out = nn.Linear(config.hidden_dim, config.dim, bias=False)

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
