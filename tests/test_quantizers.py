"""Every quantizer of the table keeps the contract; the losses are those of the paper."""

import pytest
import torch
import torch.nn.functional as F

from vqvae import QUANTIZERS
from vqvae.quantizers import nearest_codes

SIZE, DIM = 16, 4


@pytest.fixture(params=sorted(QUANTIZERS))
def quantizer(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return QUANTIZERS[request.param](SIZE, DIM)


def encodings(batch: int = 8, height: int = 3, width: int = 5) -> torch.Tensor:
    return torch.randn(batch, DIM, height, width, generator=torch.Generator().manual_seed(1))


def test_nearest_codes_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codebook = torch.randn(101, 3), torch.randn(17, 3)
    expected = torch.cdist(vectors, codebook).argmin(dim=1)
    assert nearest_codes(vectors, codebook).equal(expected)
    monkeypatch.setattr("vqvae.quantizers.CHUNK", 40)  # two vectors at a time
    assert nearest_codes(vectors, codebook).equal(expected)


def test_embed_gives_what_the_decoder_saw(quantizer: torch.nn.Module) -> None:
    for training in (True, False):
        quantizer.train(training)
        z_q, indices, _ = quantizer(encodings())
        assert quantizer.embed(indices).equal(z_q)
        assert indices.shape == (8, 3, 5)
        assert 0 <= indices.min() <= indices.max() < SIZE


def test_each_vector_gets_its_nearest_code(quantizer: torch.nn.Module) -> None:
    quantizer.eval()
    z_e = encodings()
    indices = quantizer(z_e).indices
    assert indices.equal(quantizer.nearest(z_e))
    vectors = quantizer.place(z_e.permute(0, 2, 3, 1).flatten(0, 2))
    assert indices.flatten().equal(torch.cdist(vectors, quantizer.codebook).argmin(dim=1))


def test_encoding_a_code_gives_the_code(quantizer: torch.nn.Module) -> None:
    indices = torch.arange(SIZE).view(1, 4, 4)
    assert quantizer.eval().nearest(quantizer.embed(indices)).equal(indices)


def test_the_gradient_goes_straight_through(quantizer: torch.nn.Module) -> None:
    """d z_q / d z_e is the identity, after the normalisation where there is one."""
    quantizer.eval()
    z_e = encodings().requires_grad_()
    weights = torch.randn(z_e.shape)
    (gradient,) = torch.autograd.grad((quantizer(z_e).z_q * weights).sum(), z_e)
    placed = quantizer.place(z_e.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    (expected,) = torch.autograd.grad((placed * weights).sum(), z_e)
    torch.testing.assert_close(gradient, expected)


def test_beta_is_on_the_encoders_term() -> None:
    """The codebook term moves only the codes, the commitment term only the encoder, times beta."""
    for beta in (0.25, 2.0):
        quantizer = QUANTIZERS["vq"](SIZE, DIM, commitment_cost=beta).eval()
        z_e = encodings().requires_grad_()
        z_q, _, losses = quantizer(z_e)
        error = F.mse_loss(z_e, z_q.detach())
        torch.testing.assert_close(losses["codebook"], error)
        torch.testing.assert_close(losses["commitment"], beta * error)
        weight = quantizer.embedding.weight
        commitment = torch.autograd.grad(
            losses["commitment"], [z_e, weight], retain_graph=True, allow_unused=True
        )
        codebook = torch.autograd.grad(losses["codebook"], [z_e, weight], allow_unused=True)
        torch.testing.assert_close(commitment[0], beta * 2 * (z_e - z_q.detach()) / z_e.numel())
        assert commitment[1] is None
        assert codebook[0] is None
        assert codebook[1].abs().sum() > 0


def test_codes_start_on_the_data(quantizer: torch.nn.Module) -> None:
    """Far from the origin a random codebook would have one nearest code for everything."""
    z_e = encodings(batch=64) * 0.1 + torch.randn(1, DIM, 1, 1) * 5
    quantizer.train()(z_e)
    assert len(quantizer.eval()(z_e).indices.unique()) > SIZE / 2


def test_dead_codes_are_revived() -> None:
    torch.manual_seed(0)
    shares = {}
    for revive_below in (0.0, 0.1):
        quantizer = QUANTIZERS["vq"](SIZE, DIM, revive_below=revive_below)
        quantizer.initialised.fill_(True)
        with torch.no_grad():
            quantizer.embedding.weight.fill_(100.0)
            quantizer.embedding.weight[0] = 0
        for _ in range(300):
            indices = quantizer(encodings(batch=64)).indices
        shares[revive_below] = len(indices.unique()) / SIZE
    assert shares[0.0] == 1 / SIZE
    assert shares[0.1] > 0.8


def test_arithmetic_stays_in_float32_under_autocast(quantizer: torch.nn.Module) -> None:
    z_e = encodings()
    expected = quantizer.eval()(z_e)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, indices, _ = quantizer(z_e)
    assert z_q.dtype == torch.float32
    assert indices.equal(expected.indices)
