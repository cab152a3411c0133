"""The tokenizer: shapes on any grid, a round trip, and a training that works."""

import pytest
import torch
import torch.nn.functional as F

from vqvae import QUANTIZERS, VQVAE, VQVAEConfig


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("size", "patch_size", "multipliers", "grid"),
    [
        ((24, 40), 4, (1,), (6, 10)),
        ((24, 40), 1, (1, 2), (12, 20)),
        ((16, 16), 2, (1, 1, 2, 2), (1, 1)),
        ((8, 64), 1, (1,), (8, 64)),
    ],
)
def test_shapes(channels: int, size: tuple, patch_size: int, multipliers: tuple, grid: tuple):
    config = VQVAEConfig(
        image_size=size,
        in_channels=channels,
        patch_size=patch_size,
        channels=8,
        channel_multipliers=multipliers,
        codebook_size=16,
    )
    assert config.latent_dim == grid
    model = VQVAE(config).eval()
    images = torch.rand(2, channels, *size) * 2 - 1
    reconstruction, quantized = model(images)
    assert reconstruction.shape == images.shape
    assert quantized.indices.shape == (2, *grid)
    indices = model.encode(images)
    assert indices.equal(quantized.indices)
    torch.testing.assert_close(model.decode(indices), reconstruction.clamp(-1, 1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": (25, 40)},
        {"codebook_size": 1},
        {"channel_multipliers": ()},
        {"channel_multipliers": (1, 0)},
        {"dropout": 1.0},
        {"commitment_cost": -1.0},
        {"quantizer": "nearest"},
        {"channels": 0},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VQVAEConfig(**{"in_channels": 3, **wrong})


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_it_learns(quantizer: str) -> None:
    """Mosaics of eight kinds of tile, which 32 codes can hold: most of the error goes."""
    torch.manual_seed(0)
    config = VQVAEConfig(
        image_size=(8, 12),
        in_channels=1,
        patch_size=2,
        channels=16,
        codebook_size=32,
        codebook_dim=4,
        quantizer=quantizer,
    )
    model = VQVAE(config)
    tiles = torch.rand(8, 4)[torch.randint(0, 8, (128, 4, 6))] * 2 - 1
    images = F.pixel_shuffle(tiles.permute(0, 3, 1, 2), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        reconstruction, quantized = model(images)
        loss = F.mse_loss(reconstruction, images) + sum(quantized.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = F.mse_loss(model.eval().decode(model.encode(images)), images)
    assert error < 0.2 * images.var()
