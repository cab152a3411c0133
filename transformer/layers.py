"""Layers of the GPT: RMSNorm, attention, feed-forward layer, block and head."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transformer.config import GPTConfig
from transformer.rope import eager_on_cpu, rotate

EPSILON = 1e-5  # of all norms, as in LlamaGen
MAX_LOGITS = 1 << 26  # beyond, the loss computes them in chunks
NEIGHBOURS = 8  # of a code, for label smoothing
Rotary = tuple[Tensor, Tensor]  # cos and sin, (T, head_dim / 2) or (B, 1, T, head_dim / 2)
# Attention of one layer: q (B, heads, T, head_dim), k, v (B, kv_heads, T, head_dim) -> like q.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class RMSNormOnCPU(torch.autograd.Function):
    """x / rms(x) in float32 or float64, along the last dimension.

    With PyTorch's own backward pass, a training step of 4 layers of 192 takes 7 % longer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> Tensor:
        ctx.dtype, x = x.dtype, x if x.dtype == torch.float64 else x.float()
        scale = x.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(dim=-1, keepdim=True)  # what would only stretch x
        x = torch.addcmul(gradient, y, along, value=-1).mul_(scale)
        return x.to(ctx.dtype), None


def rms_norm(x: Tensor, epsilon: float) -> Tensor:
    """x over its root mean square, along the last dimension (RMSNorm, arXiv 1910.07467)."""
    if torch.is_grad_enabled() and eager_on_cpu(x):  # without, it would slow sampling
        return RMSNormOnCPU.apply(x, epsilon)
    return F.rms_norm(x, x.shape[-1:], eps=epsilon)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` that keeps the type of its input, see `rms_norm`."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape and type."""
        return (rms_norm(x, EPSILON) * self.weight).type_as(x)


class LoRALinear(nn.Linear):
    """y = W x + up down x (LoRA, arXiv 2106.09685), with a frozen W; `up` starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight  # (out, in)
        self.down = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """States (..., in) -> (..., out)."""
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Also a plain layer's weights; the update keeps its values then."""
        for name in ("down", "up"):
            state.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state, prefix, *rest)


class SelfAttention(nn.Module):
    """Multi-head attention with normalised queries and keys (QK-norm, arXiv 2302.05442).

    Where heads of keys and values are fewer, equal groups of queries share them (arXiv 2305.13245).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.heads) * self.head_dim, bias=False)
        self.gain = nn.Parameter(torch.ones(2, 1, 1, 1, self.head_dim)) if config.qk_norm else None
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        """States (B, T, dim) -> (B, T, dim)."""
        queries, keys, values = self.heads
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk, v = qkv.split_with_sizes([queries + keys, values], 1)  # (B, heads + kv_heads, T, d)
        if self.gain is not None:
            of_queries, of_keys = self.gain.flatten(1)
            gain = [of_queries.expand(queries, 1, -1), of_keys.expand(keys, 1, -1)]
            qk = rms_norm(qk, EPSILON) * torch.cat(gain)
        if rotary is not None:
            qk = rotate(qk, *rotary)
        q, k = qk.split_with_sizes([queries, keys], dim=1)
        return self.out(attend(q.type_as(v), k.type_as(v), v).transpose(1, 2).flatten(2))


class GateOnCPU(torch.autograd.Function):
    """silu(gate) * value of x (..., 2 * hidden_dim), whose gradient is written in one piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, activated = ctx.saved_tensors
        (gate, value), y = x.chunk(2, dim=-1), torch.empty_like(x)
        of_gate, of_value = y.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=of_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return y


class SwiGLU(nn.Module):
    """Feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.out = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """States (..., dim) -> (..., dim)."""
        x = self.gate_and_value(x)
        if torch.is_grad_enabled() and eager_on_cpu(x):
            return self.out(GateOnCPU.apply(x))
        gate, value = x.chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class VectorProjection(nn.Module):
    """Vectors of another model to states, by an MLP as in LlamaGen (arXiv 2406.06525)."""

    def __init__(self, length: int, vector_dim: int, dim: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(length, vector_dim) * vector_dim**-0.5)
        self.hidden = nn.Linear(vector_dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, length * vector_dim) -> (B, length, dim); `null` replaces infinite ones."""
        x = x.unflatten(1, self.null.shape).to(self.null)
        x = torch.where(x.isinf(), self.null, x)
        return self.out(F.gelu(self.hidden(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the feed-forward layer, each added to x."""

    checkpointed = True  # where a training saves memory by `checkpoint_activations`

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = RMSNorm(config.dim)
        self.attention = SelfAttention(config)
        self.norm_feed_forward = RMSNorm(config.dim)
        self.feed_forward = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        """States (B, T, dim) -> (B, T, dim)."""
        x = x + self.dropout(self.attention(self.norm_attention(x), rotary, attend))
        return x + self.dropout(self.feed_forward(self.norm_feed_forward(x)))


class Head(nn.Linear):
    """Hidden states to logits, one linear map per depth, or to the loss in chunks."""

    def __init__(self, dim: int, codebook_size: int, depth: int = 1) -> None:
        super().__init__(dim, depth * codebook_size, bias=False)
        self.codebook_size, self.depth, self.smoothing = codebook_size, depth, 0.0
        self.register_buffer("neighbours", None, persistent=False)
        self.register_buffer("shares", None, persistent=False)

    def smooth_labels(self, codes: Tensor, smoothing: float) -> None:
        """In training, spread this part of the loss over the nearest of the codes (K, D).

        The shares of the neighbours fall with their distances d: softmax(-d^2 / mean of d^2).
        """
        self.smoothing, count = smoothing, min(NEIGHBOURS, len(codes) - 1)
        nearest = [torch.cdist(x, codes).topk(count + 1, largest=False) for x in codes.split(1024)]
        distances, self.neighbours = (torch.cat(x)[:, 1:] for x in zip(*nearest, strict=True))
        self.shares = (-distances.square() / distances.square().mean()).softmax(dim=1)

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, *, depth: int | None = None
    ) -> Tensor:
        """Logits (B, n, K), or the cross-entropy (B, n) of `targets` (B, n) in nats, float32.

        The states `hidden` (B, n, dim) predict all depths of n / depth positions in turn, or all
        (..., dim) the given `depth`: logits (..., K).
        """
        weights = self.weight.chunk(self.depth)  # (K, dim) each
        if depth is not None:
            return F.linear(hidden, weights[depth])
        parts = zip(hidden.unflatten(1, (-1, self.depth)).unbind(2), weights, strict=True)
        if targets is None:
            results = [F.linear(x, weight) for x, weight in parts]
        else:
            indices = targets.unflatten(1, (-1, self.depth)).unbind(2)
            results = [self._loss(*part, x) for part, x in zip(parts, indices, strict=True)]
        return torch.stack(results, dim=2).flatten(1, 2)

    def _loss(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Of states (B, t, dim) of one depth; in chunks where the logits would be large."""

        def nats(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = F.linear(hidden, weight).float()
            loss = F.cross_entropy(logits, targets, reduction="none")
            if not (self.training and self.smoothing):
                return loss
            near = logits.gather(1, self.neighbours[targets]) * self.shares[targets]
            return torch.lerp(loss, logits.logsumexp(dim=1) - near.sum(dim=1), self.smoothing)

        hidden, indices = hidden.flatten(0, 1), targets.flatten()
        chunks = math.ceil(len(hidden) * len(weight) / MAX_LOGITS)
        if chunks <= 1:
            return nats(hidden, indices).view(targets.shape)
        # The backward pass computes the logits of each chunk again.
        losses = [
            checkpoint(nats, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(hidden.chunk(chunks), indices.chunk(chunks), strict=True)
        ]
        return torch.cat(losses).view(targets.shape)
