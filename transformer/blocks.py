"""What the GPT is built from: attention with normalised queries and keys, and SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer.positions import rotate

if TYPE_CHECKING:
    from transformer.config import GPTConfig

EPSILON = 1e-5  # of all norms, as LlamaGen's

# Attention of one layer: q (B, heads, T, head_dim), k, v (B, kv_heads, T, head_dim) -> like q.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Normalise(torch.autograd.Function):
    """x / rms(x) on a CPU, where PyTorch's own takes two to three times as long in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype, x = x.dtype, x if x.dtype == torch.float64 else x.float()
        scale = x.square().mean(dim=-1, keepdim=True).add_(EPSILON).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(dim=-1, keepdim=True)  # what would only stretch x
        return torch.addcmul(gradient, y, along, value=-1).mul_(scale).to(ctx.dtype)


def normalise(x: Tensor) -> Tensor:
    """x over its root mean square, along the last dimension (RMSNorm, arXiv 1910.07467)."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], eps=EPSILON)
    return _Normalise.apply(x)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, by `normalise`."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape and type."""
        return (normalise(x) * self.weight).type_as(x)


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
        self.gain = nn.Parameter(torch.ones(2, 1, 1, 1, self.head_dim)) if config.qk_norm else None
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, attend: Attend) -> Tensor:
        """States (B, T, dim) -> (B, T, dim).

        Args:
            x: of T tokens.
            turn: cos and sin of their rotary angles, (T, head_dim / 2) each or (B, 1, T,
                head_dim / 2); None: they are not rotated.
            attend: what each of them sees.
        """
        queries, keys, values = self.heads
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk, v = qkv.split([queries + keys, values], dim=1)  # (B, heads + kv_heads, T, d), ...
        if self.gain is not None:
            of_queries, of_keys = self.gain.flatten(1)
            gain = [of_queries.expand(queries, 1, -1), of_keys.expand(keys, 1, -1)]
            qk = normalise(qk) * torch.cat(gain)
        if turn is not None:
            qk = rotate(qk, *turn)
        q, k = qk.split([queries, keys], dim=1)
        return self.out(attend(q.type_as(v), k.type_as(v), v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.out = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """States (..., dim) -> (..., dim)."""
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the feed-forward layer, each added to x."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(config.dim)
        self.attention = SelfAttention(config)
        self.norm_feed_forward = RMSNorm(config.dim)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, attend: Attend) -> Tensor:
        """States (B, T, dim) -> (B, T, dim); see `SelfAttention` for the arguments."""
        x = x + self.dropout(self.attention(self.norm_attention(x), turn, attend))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))
