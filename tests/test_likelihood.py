"""A GPT finds corrupted images by their likelihood: trained on clean digits, it ranks a mixture."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.likelihood import auroc, noisy
from transformer import GPT, GPTConfig
from utils.data.sources import epoch_order
from utils.training.config import TrainingConfig
from utils.training.loop import clip_gradients, update_weights
from utils.training.optim import make_optimizer
from vqvae import VQVAE, VQVAEConfig

CODES = 32


def test_auroc() -> None:
    usual, strange = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 3.0, 0.0])
    assert auroc(usual, strange) == pytest.approx((4 + 2.5 + 0) / 12)
    assert auroc(usual, usual) == 0.5


def test_noise_replaces_a_twentieth_of_the_pixels() -> None:
    images = torch.zeros(50, 3, 32, 32)
    changed = noisy(images, torch.Generator().manual_seed(0)) != 0
    assert changed.float().mean() == pytest.approx(0.05, abs=0.005)
    assert torch.equal(changed.all(dim=1), changed.any(dim=1))


def batches(images: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Batches of 64 images, epoch by epoch."""
    order = [epoch_order(torch.arange(len(images)), seed, epoch) for epoch in range(steps)]
    yield from (images[rows] for rows in torch.cat(order).split(64)[:steps])


def fit_tokenizer(images: Tensor) -> VQVAE:
    config = VQVAEConfig.create(
        image_size=(8, 8),
        in_channels=1,
        channels=16,
        patch_size=2,
        codebook_size=CODES,
        codebook_dim=4,
    )
    model = VQVAE(config)
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=4e-3), (0.9, 0.99))
    for batch in batches(images, 120, 0):
        reconstruction, quantized = model(batch)
        loss = (reconstruction - batch).square().mean() + sum(quantized.losses.values())
        loss.backward()
        clip_gradients(optimizer, 1.0)
        update_weights(optimizer, 4e-3)
    return model.eval()


def fit_gpt(indices: Tensor) -> GPT:
    config = GPTConfig(CODES, latent_dim=(4, 4), num_layers=2, num_heads=2, dim=64, dropout=0.0)
    model = GPT(config)
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=4e-3), (0.9, 0.95))
    for batch in batches(indices, 200, 1):
        model.loss(torch.zeros(len(batch), dtype=torch.long), batch).mean().backward()
        clip_gradients(optimizer, 1.0)
        update_weights(optimizer, 4e-3)
    return model.eval()


@torch.inference_mode()
def bits(tokenizer: VQVAE, gpt: GPT, images: Tensor) -> Tensor:
    prefix = torch.full((len(images),), gpt.config.num_classes)
    return gpt.loss(prefix, tokenizer.encode(images)).mean(dim=1)


def test_noise_and_inverted_images_are_found() -> None:
    """Of the mixture 5 % are corrupted: half of these are noise and nothing else, half inverted."""
    torch.manual_seed(0)
    digits = torch.from_numpy(load_digits().images.astype(np.float32))[:, None] / 8 - 1
    train, test = digits[:1400], digits[1400:]
    tokenizer = fit_tokenizer(train)
    with torch.inference_mode():
        indices = tokenizer.encode(train)
    gpt = fit_gpt(indices.clone())
    clean, plain = test[20:], test[:20]
    corrupted = torch.cat([noisy(plain[:10], torch.Generator().manual_seed(1), 1.0), -plain[10:]])
    assert len(corrupted) / (len(clean) + len(corrupted)) == pytest.approx(0.05, abs=0.005)
    assert auroc(bits(tokenizer, gpt, clean), bits(tokenizer, gpt, corrupted)) >= 0.99
