"""What the blocks compute with gradients of their own, against the plain way."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from transformer.blocks import RMSNorm, normalise
from transformer.positions import rotate


def test_norm_and_its_gradient() -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(normalise(x), F.rms_norm(x, (8,), eps=1e-5))
    assert gradcheck(normalise, (x,))
    module = RMSNorm(8).double()
    torch.nn.init.normal_(module.weight)
    torch.testing.assert_close(module(x), F.rms_norm(x, (8,), module.weight, 1e-5))


def test_rotation_and_its_gradient() -> None:
    angles = torch.randn(5, 4, dtype=torch.float64)
    turn = angles.cos(), angles.sin()
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    y = rotate(x, *turn)
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)
    torch.testing.assert_close(torch.complex(*y.chunk(2, dim=-1)), pairs)
    assert gradcheck(lambda x: rotate(x, *turn), (x,))


def test_bfloat16_is_computed_in_float32() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    turn = torch.randn(5, 4).cos(), torch.randn(5, 4).sin()
    y = rotate(normalise(x), *turn)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, rotate(normalise(x.float()), *turn))
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_angles_of_more_tokens_than_there_are_do_not_turn_them() -> None:
    turn = torch.zeros(3, 4), torch.zeros(3, 4)
    with pytest.raises(RuntimeError):
        rotate(torch.zeros(2, 1, 8), *turn)
