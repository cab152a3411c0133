"""Gradients of the quantizers against formulas written down independently."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_quantizers import make
from vqvae import QUANTIZERS
from vqvae.quantizers import Quantizer, QuantizerOptions
from vqvae.quantizers.base import straight_through
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


@pytest.mark.parametrize("similarity", ["distance", "inner_product"])
def test_index_backpropagation_is_the_gradient_of_the_softened_index(similarity: str) -> None:
    torch.manual_seed(0)
    quantizer = make("ibq", codebook_size=16, similarity=similarity, softmax_temperature=0.5)
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
    if similarity == "distance":
        distances = (other[:, None] - codebook).square().sum(dim=2)
        logits = -distances / distances.detach().mean(dim=1, keepdim=True)
    soft = (logits / 0.5).softmax(dim=1)
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
    with torch.no_grad():
        quantizer.initialise(torch.randn(40, 8))
        noise = quantizer.noise(torch.zeros(9, 16))
    quantizer.end_step()
    quantizer.step.zero_()
    z_q, indices, _ = quantizer.quantize(vectors)
    z_q.backward(grad)
    found = vectors.grad.clone(), quantizer.embedding.weight.grad.clone()

    vectors.grad, quantizer.embedding.weight.grad = None, None
    soft = (quantizer.proj(vectors) + noise).softmax(dim=1)
    index = F.one_hot(soft.argmax(dim=1), 16) + soft - soft.detach()
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


def entropy_loss(logits: Tensor) -> Tensor:
    """Written down independently: the mean entropy minus that of the mean."""
    shares = logits.softmax(dim=1)
    one = torch.special.entr(shares).sum(dim=1).mean()
    return one - torch.special.entr(shares.mean(dim=0)).sum()


class Logits(Quantizer):
    """Vectors are the logits of their assignments."""

    def entropy_logits(self, vectors: Tensor) -> list[Tensor]:
        return [vectors]


def test_entropy_of_known_assignments() -> None:
    sure, loss = torch.eye(4) * 100, Logits(QuantizerOptions()).entropy_loss
    assert float(loss(sure)) == pytest.approx(-math.log(4), abs=1e-6)
    assert float(loss(torch.zeros(3, 4))) == pytest.approx(0, abs=1e-6)
    assert float(loss(sure[:1].expand(5, -1))) == pytest.approx(0, abs=1e-6)
    logits = torch.randn(7, 5, dtype=torch.double, requires_grad=True)
    (found,) = torch.autograd.grad(loss(logits), logits)
    (expected,) = torch.autograd.grad(entropy_loss(logits), logits)
    torch.testing.assert_close(found, expected)


def test_the_entropy_of_a_code_out_of_reach_has_a_finite_gradient() -> None:
    """Its share was exactly 0, and the slope of x log x there made every weight NaN."""
    logits = torch.tensor([[0.0, 1.0, -500.0]], requires_grad=True)
    Logits(QuantizerOptions()).entropy_loss(logits).backward()
    assert logits.grad.isfinite().all()


def test_codebook_entropy_is_that_of_the_softmax_of_distances() -> None:
    quantizer, vectors = make("vq", codebook_size=6, codebook_dim=4), torch.randn(20, 4)
    codebook = quantizer.codebook.detach()
    logits = -torch.cdist(vectors, codebook).square() / (0.01 * codebook.square().sum(dim=1).mean())
    assert torch.allclose(quantizer.entropy_loss(vectors), entropy_loss(logits), atol=1e-5)


@pytest.mark.parametrize("bits", [4, 12])
def test_lfq_entropy_is_exact_for_one_group_and_a_bound_for_more(bits: int) -> None:
    torch.manual_seed(0)
    quantizer = make("lfq", codebook_size=2**bits)
    vectors = torch.randn(30, bits)
    corners = quantizer.lookup(torch.arange(2**bits))
    expected = entropy_loss(-(vectors[:, None] - corners).square().sum(dim=2))
    found = quantizer.entropy_loss(vectors)
    if bits <= quantizer.GROUP:
        assert torch.allclose(found, expected, atol=1e-4)
    else:
        assert found < expected
