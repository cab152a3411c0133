"""What CPUs compute in a way of their own, against PyTorch's way."""

import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from transformer.attention import scaled_dot_product_attention
from transformer.layers import GateOnCPU, RMSNorm, rms_norm
from transformer.rope import rotary_cos_sin, rotate


def test_norm_and_its_gradient() -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, 1e-5), F.rms_norm(x, (8,), eps=1e-5))
    assert gradcheck(lambda x: rms_norm(x, 1e-5), (x,))
    module = RMSNorm(8).double()
    torch.nn.init.normal_(module.weight)
    torch.testing.assert_close(module(x), F.rms_norm(x, (8,), module.weight, 1e-5))


def test_bfloat16_is_computed_in_float32() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    y = rms_norm(x, 1e-5)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, rms_norm(x.float(), 1e-5))
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    q = torch.randn(1, 2, 9, 8, dtype=torch.bfloat16)
    y = scaled_dot_product_attention(q, q, q, is_causal=True)
    q = q.float()
    expected = scaled_dot_product_attention(q, q, q, is_causal=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16())


def test_rotation_and_its_gradient() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True).transpose(1, 2)
    cos, sin = rotary_cos_sin(torch.rand(3, 2, dtype=torch.float64), 8, 100.0)
    a, b = x.chunk(2, dim=-1)
    expected = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected)
    assert gradcheck(lambda x: rotate(x, cos, sin), (x,))


def test_gate_and_its_gradient() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    gate, value = x.chunk(2, dim=-1)
    torch.testing.assert_close(GateOnCPU.apply(x), F.silu(gate) * value)
    assert gradcheck(GateOnCPU.apply, (x,))
