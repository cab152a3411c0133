"""Options of the GPT: rotary base, tied weights, codes as embeddings and for smoothed labels."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.test_kv_cache import CODES, make_model, some_input, step_by_step
from transformer import GPT, GPTConfig
from transformer.rope import rotary_cos_sin

SHAPE = {"latent_dim": (3, 4), "num_layers": 1, "num_heads": 2, "dim": 32, "dropout": 0.0}


def test_a_lower_base_rotates_more() -> None:
    """The slowest of 8 frequencies turns by base^(-7/8) a row; the first one always by 1."""
    for base in (100.0, 10_000.0):
        cos, _ = rotary_cos_sin(torch.tensor([[1.0, 0.0]]), 32, base)
        expected = [math.cos(base ** (-i / 8)) for i in range(8)]
        assert cos[0, :8].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_base_and_tied_weights_hold_with_the_cache_and_in_larger_grids() -> None:
    """A grid three times as high is continued as a crop: a row of it depends on the base alike."""
    for options in ({"rope_base": 10000.0}, {"tie_embeddings": True}):
        model, usual = make_model((3, 4), window=2, **options), make_model((3, 4), window=2)
        prefix, indices = some_input(model)
        logits = model.logits(prefix, indices)
        cached = step_by_step(model, prefix, indices, model.make_cache(3))
        torch.testing.assert_close(cached, logits, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(logits, usual.logits(prefix, indices))


def test_tied_weights_are_one_parameter_saved_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = GPT(GPTConfig(50, tie_embeddings=True, **SHAPE))
    free = GPT(GPTConfig(50, **SHAPE))
    assert sum(x.numel() for x in free.parameters()) - 50 * 32 == sum(
        x.numel() for x in tied.parameters()
    )
    assert float(tied.head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    tied.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path).double()
    with torch.no_grad():
        again.token_embedding.weight += 1
    assert torch.equal(again.head.weight, again.token_embedding.weight)
    prefix, indices = torch.zeros(2, dtype=torch.long), torch.randint(50, (2, 3, 4))
    again.loss(prefix, indices).sum().backward()
    assert again.token_embedding.weight.grad.abs().sum() > 0


def test_embeddings_start_with_the_distances_of_the_codes() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(200, start_from_codebook=True, **SHAPE | {"dim": 512}))
    codes = torch.randn(200, 8) * 3 + 5
    model.use_codebook(codes)
    weight = model.token_embedding.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=1e-4)
    pairs = torch.stack([torch.pdist(weight), torch.pdist(codes)])
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.95
    assert torch.equal(model.head.weight, torch.zeros_like(model.head.weight))


def test_smoothed_labels_are_the_neighbours_of_the_code_in_training_only() -> None:
    """Against the cross-entropy with whole distributions as targets."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(30, label_smoothing=0.2, **SHAPE))
    torch.nn.init.normal_(model.head.weight, std=0.3)
    codes = torch.randn(30, 4)
    model.use_codebook(codes)
    prefix, indices = torch.zeros(2, dtype=torch.long), torch.randint(30, (2, 3, 4))
    square = (codes[:, None] - codes).square().sum(dim=2)
    nearest = square.argsort(dim=1)[:, 1:9]
    scale = square.gather(1, nearest).mean()
    targets = 0.8 * torch.eye(30)
    shares = torch.exp(-square.gather(1, nearest) / scale)
    targets.scatter_add_(1, nearest, 0.2 * shares / shares.sum(dim=1, keepdim=True))
    logits = model.logits(prefix, indices)
    expected = F.cross_entropy(
        logits.transpose(1, 2), targets[indices.flatten(1)].transpose(1, 2), reduction="none"
    )
    torch.testing.assert_close(model.loss(prefix, indices), expected)
    model.eval()
    plain = F.cross_entropy(logits.transpose(1, 2), indices.flatten(1), reduction="none")
    torch.testing.assert_close(model.loss(prefix, indices), plain)


def test_what_needs_single_codes_is_refused_for_several() -> None:
    for option in ({"start_from_codebook": True}, {"label_smoothing": 0.1}):
        with pytest.raises(ValueError, match="need depth 1"):
            GPTConfig(CODES, depth=2, **option)
