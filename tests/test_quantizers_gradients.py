"""Gradients of the quantizers against formulas written down independently."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.test_quantizers import make
from vqvae import QUANTIZERS
from vqvae.quantizers.base import entropy, straight_through
from vqvae.quantizers.codebook import codebook_entropy_loss
from vqvae.quantizers.vector import rotation


def test_straight_through_hands_the_gradient_on_unchanged() -> None:
    z_e, z_q, grad = torch.randn(3, 7, 4)
    z_e.requires_grad_()
    result = straight_through(z_e, z_q)
    assert torch.equal(result, z_q)
    result.backward(grad)
    assert torch.equal(z_e.grad, grad)


def test_rotation_hands_on_the_gradient_turned_and_scaled() -> None:
    z_e, z_q, grad = torch.randn(3, 7, 4, dtype=torch.double)
    z_e.requires_grad_()
    result = rotation(z_e, z_q)
    assert torch.equal(result, z_q)
    result.backward(grad)
    for row in range(7):
        e, q = z_e[row].detach(), z_q[row]
        # The plane rotation by the angle between e and q, from an orthonormal basis of the plane.
        u = e / e.norm()
        v = q - (q @ u) * u
        v = v / v.norm()
        cosine = (q @ u) / q.norm()
        sine = (1 - cosine**2).sqrt()
        turn = torch.eye(4, dtype=torch.double)
        turn += (cosine - 1) * (u.outer(u) + v.outer(v)) + sine * (v.outer(u) - u.outer(v))
        matrix = q.norm() / e.norm() * turn
        assert torch.allclose(matrix @ e, q)
        assert torch.allclose(z_e.grad[row], matrix.T @ grad[row])


@pytest.mark.parametrize(
    "name", [name for name, q in QUANTIZERS.items() if hasattr(q.Options, "gradient")]
)
def test_rotation_is_an_option_that_leaves_the_decoded_codes(name: str) -> None:
    made = []
    for gradient in ("straight_through", "rotation"):
        torch.manual_seed(0)
        quantizer = make(name, codebook_size=16, gradient=gradient).eval()
        z_e = torch.randn(2, 8, 3, 3, requires_grad=True)
        quantizer(z_e).z_q.sin().sum().backward()
        made.append((quantizer(z_e).z_q.detach(), z_e.grad))
    assert torch.equal(made[0][0], made[1][0])
    assert not torch.allclose(made[0][1], made[1][1])


@pytest.mark.parametrize("name", ["vq", "cosine"])
def test_losses_move_codes_and_encoder_apart(name: str) -> None:
    quantizer = make(name, codebook_size=16, commitment_cost=0.5).eval()
    z_e = torch.randn(2, 8, 3, 3, requires_grad=True)
    losses = quantizer(z_e).losses
    losses["codebook"].backward(retain_graph=True)
    assert z_e.grad is None
    assert quantizer.embedding.weight.grad.abs().sum() > 0
    quantizer.embedding.weight.grad = None
    losses["commitment"].backward()
    assert quantizer.embedding.weight.grad is None
    assert z_e.grad.abs().sum() > 0
    assert torch.allclose(losses["commitment"], 0.5 * losses["codebook"])


def test_index_backpropagation_is_the_gradient_of_the_softened_index() -> None:
    torch.manual_seed(0)
    quantizer = make("ibq", codebook_size=16)
    quantizer.initialised.fill_(True)
    vectors, grad = torch.randn(2, 9, 8)
    vectors.requires_grad_()
    z_q, _, _ = quantizer.quantize(vectors)
    z_q.backward(grad)
    found = vectors.grad.clone(), quantizer.embedding.weight.grad.clone()

    other, codebook = (
        x.detach().clone().requires_grad_() for x in (vectors, quantizer.embedding.weight)
    )
    logits = other @ codebook.T
    soft = logits.softmax(dim=1)
    index = F.one_hot(logits.argmax(dim=1), 16) + soft - soft.detach()
    (index @ codebook).backward(grad)
    assert torch.allclose(found[0], other.grad, atol=1e-6)
    assert torch.allclose(found[1], codebook.grad, atol=1e-6)
    assert (found[1].abs().sum(dim=1) > 0).all()  # every code learns


def test_gumbel_is_the_straight_through_gumbel_softmax() -> None:
    torch.manual_seed(0)
    quantizer = make("gumbel", codebook_size=16)
    vectors, grad = torch.randn(2, 9, 8)
    vectors.requires_grad_()
    torch.manual_seed(7)
    z_q, indices, _ = quantizer.quantize(vectors)
    z_q.backward(grad)
    found = vectors.grad.clone(), quantizer.embedding.weight.grad.clone()

    vectors.grad, quantizer.embedding.weight.grad = None, None
    torch.manual_seed(7)
    index = F.gumbel_softmax(quantizer.proj(vectors), tau=1.0, hard=True)
    assert torch.equal(index.argmax(dim=1), indices)
    (index @ quantizer.embedding.weight).backward(grad)
    assert torch.allclose(found[0], vectors.grad, atol=1e-6)
    assert torch.allclose(found[1], quantizer.embedding.weight.grad, atol=1e-6)


def test_fsq_gradient_is_that_of_the_bound_without_the_rounding() -> None:
    quantizer = make("fsq", levels=(8, 5))
    vectors = torch.randn(9, 2, requires_grad=True)
    quantizer.quantize(vectors)[0].sum().backward()
    levels, halves = torch.tensor([8.0, 5.0]), torch.tensor([4.0, 2.0])
    spread = (levels - 1) * 1.001 / 2
    shift = torch.tensor([math.atanh(0.5 / float(spread[0])), 0.0])
    expected = spread * (1 - (vectors.detach() + shift).tanh().square()) / halves
    assert torch.allclose(vectors.grad, expected)


def test_entropy_of_known_assignments() -> None:
    sure = torch.eye(4) * 100
    one, mean = entropy(sure)
    assert float(one) == pytest.approx(0, abs=1e-6)
    assert float(mean) == pytest.approx(math.log(4), abs=1e-6)
    one, mean = entropy(torch.zeros(3, 4))
    assert float(one) == pytest.approx(math.log(4), abs=1e-6)
    one, mean = entropy(sure[:1].expand(5, -1))
    assert float(mean) == pytest.approx(0, abs=1e-6)


def test_the_entropy_of_a_code_out_of_reach_has_a_finite_gradient() -> None:
    """Its share was exactly 0, and the slope of x log x there made every weight NaN."""
    logits = torch.tensor([[0.0, 1.0, -500.0]], requires_grad=True)
    one, mean = entropy(logits)
    (one - mean).backward()
    assert logits.grad.isfinite().all()


def test_codebook_entropy_is_that_of_the_softmax_of_distances() -> None:
    vectors, codebook = torch.randn(20, 4), torch.randn(6, 4)
    distances = torch.cdist(vectors, codebook).square()
    shares = (-distances / (0.01 * codebook.square().sum(dim=1).mean())).softmax(dim=1)
    one = torch.special.entr(shares).sum(dim=1).mean()
    expected = one - torch.special.entr(shares.mean(dim=0)).sum()
    assert torch.allclose(codebook_entropy_loss(vectors, codebook), expected, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 12])
def test_lfq_entropy_is_exact_for_one_group_and_a_bound_for_more(bits: int) -> None:
    torch.manual_seed(0)
    quantizer = make("lfq", codebook_size=2**bits)
    vectors = torch.randn(30, bits)
    corners = quantizer.lookup(torch.arange(2**bits))
    logits = -(vectors[:, None] - corners).square().sum(dim=2)
    one, mean = entropy(logits)
    found = quantizer.entropy_loss(vectors)
    if bits <= quantizer.GROUP:
        assert torch.allclose(found, one - mean, atol=1e-4)
    else:
        assert found < one - mean
