"""Reconstructions and codebook statistics of a tokenizer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import train_vqvae
from utils.distributed import ALONE
from utils.figures import principal_components
from vqvae import QUANTIZERS, VQVAE, VQVAEConfig

EVERY = pytest.mark.parametrize("name", QUANTIZERS)


def make_model(name: str) -> VQVAE:
    torch.manual_seed(0)
    sizes = {"image_size": (8, 16), "in_channels": 3, "channels": 8, "dropout": 0.5}
    return VQVAE(VQVAEConfig.create(quantizer=name, codebook_size=64, **sizes))


@EVERY
def test_codes_are_what_embed_adds_up(name: str) -> None:
    quantizer = make_model(name).quantizer
    config = quantizer.options
    codes = quantizer.codes(torch.arange(config.num_codes))
    assert codes.shape == (config.num_codes, config.codebook_dim)
    indices = torch.randint(config.codebook_size, (2, 3, 5, config.depth))
    places = indices + config.codebook_size * torch.arange(config.depth)
    expected = codes[places].sum(dim=3).permute(0, 3, 1, 2)
    found = quantizer.embed(indices if config.depth > 1 else indices[..., 0])
    torch.testing.assert_close(found, expected)
    assert (quantizer.count(indices).nonzero().flatten() == places.unique()).all()


@EVERY
def test_statistics_start_with_the_most_used_codes(name: str) -> None:
    model = make_model(name)
    counts = torch.zeros(model.quantizer.options.num_codes)
    counts[[5, 9, 2]] = torch.tensor([1.0, 6.0, 3.0])
    usage, codes, decoded_codes = model.inspect_codebook(counts, 50, max_decoded=4)
    torch.testing.assert_close(usage[:4], torch.tensor([0.6, 0.3, 0.1, 0.0]))
    assert len(usage) == len(counts)
    assert torch.equal(codes[:3], model.quantizer.codes(torch.tensor([9, 2, 5])))
    assert principal_components(codes).shape == (50, 2)
    assert decoded_codes.shape == (4, 3, 4, 4)
    assert model.training
    if model.config.depth == 1:
        grids = torch.tensor([9, 2, 5])[:, None, None].expand(3, 2, 4)  # all of the latent grid
        decoded = model.eval().decode(grids)[:, :, 4:8, 8:12]
        torch.testing.assert_close(decoded_codes[:3], decoded)


def test_principal_components_have_the_largest_variances() -> None:
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    flat = torch.randn(200, 5) * torch.tensor([0.01, 3.0, 0.02, 1.0, 0.03])
    places = principal_components(flat @ turn + 7)
    expected = flat[:, [1, 3]] - flat[:, [1, 3]].mean(dim=0)
    for axis in range(2):
        correlation = torch.corrcoef(torch.stack([places[:, axis], expected[:, axis]]))[0, 1]
        assert abs(float(correlation)) > 0.98
    torch.testing.assert_close(places.std(dim=0), expected.std(dim=0), rtol=0.1, atol=0)
    again = principal_components((flat @ turn + 7).flip(0)).flip(0)
    torch.testing.assert_close(places, again, rtol=1e-4, atol=1e-4)  # no axis is mirrored


def test_principal_components_of_one_dimension() -> None:
    assert (principal_components(torch.randn(4, 1))[:, 1] == 0).all()


def test_metrics_count_every_image_once_in_batches_of_any_size() -> None:
    model = make_model("vq")
    images = torch.rand(7, 3, 8, 16) * 2 - 1
    dataset: Any = SimpleNamespace(batches=lambda batches, _: (images[rows] for rows in batches))
    values, seen = train_vqvae.evaluate(model, dataset, torch.arange(7), 3, ALONE)
    assert model.training
    model.eval()
    with torch.no_grad():
        made, quantized = model(images)
    assert values["mse"] == pytest.approx(float(F.mse_loss(made.clamp(-1, 1), images)) / 4)
    assert values["commitment_loss"] == pytest.approx(float(quantized.losses["commitment"]))
    assert torch.equal(seen.counts, model.quantizer.count(quantized.indices))
    assert torch.equal(seen.originals, images)
    torch.testing.assert_close(seen.reconstructions, made.clamp(-1, 1))
