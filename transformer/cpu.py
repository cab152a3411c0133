"""RMSNorm and attention for CPUs, where PyTorch's own backward passes are slow.

A training step of 4 layers of 192 on 64 x 49 tokens (2 threads of a Xeon with AMX): without
`RMSNormOnCPU` 7 % longer, without attention in float32 31 % longer in bfloat16.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNormOnCPU(torch.autograd.Function):
    """x / rms(x) in float32 or float64, along the last dimension."""

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
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], eps=epsilon)
    return RMSNormOnCPU.apply(x, epsilon)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """PyTorch's own, in float32 on a CPU."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=attn_mask, is_causal=is_causal
        )
    return y.type_as(q)
