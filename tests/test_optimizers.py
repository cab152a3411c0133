"""Muon beside AdamW: which parameters go where, how far a step leads, and that both learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from transformer import GPT, GPTConfig
from utils.training.config import TrainingConfig
from utils.training.optim import make_optimizer, optimizer_step

RATE, DECAY = 0.01, 0.5


def make_gpt() -> GPT:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "num_heads": 2, "dim": 32}
    return GPT(GPTConfig(codebook_size=8, latent_dim=(5, 4), dropout=0.0, **shape))


def matrices(model: GPT) -> list[torch.nn.Parameter]:
    return [p for p in model.blocks.parameters() if p.dim() == 2]


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    """Muon's step is a matrix without preferred directions; AdamW's first one has +-rate only."""
    model = make_gpt()
    config = TrainingConfig(learning_rate=RATE, weight_decay=DECAY)
    optimizer = make_optimizer(model, config, (0.9, 0.95), matrices(model))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter).sign()
    norm = optimizer_step(optimizer, RATE, max_grad_norm=1.0)
    assert norm == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())))
    chosen = {id(parameter) for parameter in matrices(model)}
    assert len(chosen) == 8  # qkv, out, gate and value, out of each of two blocks
    for name, value in model.named_parameters():
        assert value.grad is None
        decayed = id(value) in chosen or name == "head.weight"
        moved = value.detach() - before[name] * (1 - RATE * DECAY if decayed else 1)
        if id(value) in chosen:
            # Singular values of about 1, times 0.2 sqrt(longer side): the RMS of AdamW's steps.
            size = torch.linalg.svdvals(moved) / (RATE * 0.2 * max(value.shape) ** 0.5)
            assert 0.4 < size.min() < size.max() < 1.4, name
        else:
            torch.testing.assert_close(moved.abs(), torch.full_like(moved, RATE), rtol=1e-2, atol=0)


def test_without_matrices_it_is_adamw() -> None:
    model = make_gpt()
    assert type(make_optimizer(model, TrainingConfig(), (0.9, 0.95))) is torch.optim.AdamW


def test_the_learning_rate_reaches_all_parts() -> None:
    model = make_gpt()
    optimizer = make_optimizer(model, TrainingConfig(), (0.9, 0.95), matrices(model))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer_step(optimizer, 0.0, max_grad_norm=1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_it_learns_a_rule_of_rows() -> None:
    """Every position repeats the one above it: only the first row has any information."""
    model = make_gpt()
    config = TrainingConfig(learning_rate=1e-2)
    optimizer = make_optimizer(model, config, (0.9, 0.95), matrices(model))
    for _ in range(80):
        indices = torch.randint(0, 8, (32, 1, 4)).expand(-1, 5, 4)
        logits = model.logits(torch.zeros(32, dtype=torch.long), indices)
        loss = F.cross_entropy(logits.flatten(0, 1), indices.flatten())
        loss.backward()
        optimizer_step(optimizer, 1e-2, max_grad_norm=1.0)
    assert loss.item() < 0.75 * math.log(8)
