"""Muon beside AdamW: which parameters go where, how far a step leads, and that both learn."""

import math

import pytest
import torch
import torch.nn.functional as F

from transformer import GPT, GPTConfig
from utils.distributed import Distributed, autocast
from utils.training.config import TrainingConfig
from utils.training.loop import (
    GROWTH_STEPS,
    Schedule,
    TrainState,
    clip_gradients,
    optimizer_step,
    update_weights,
)
from utils.training.optim import Muon, make_optimizer, orthogonalize

RATE, DECAY = 0.01, 0.5


def make_gpt() -> GPT:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "num_heads": 2, "dim": 32}
    return GPT(GPTConfig(codebook_size=8, latent_dim=(5, 4), dropout=0.0, **shape))


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    """Muon's step is a matrix without preferred directions; AdamW's first one has +-rate only."""
    model = make_gpt()
    config = TrainingConfig(learning_rate=RATE, weight_decay=DECAY)
    optimizer = make_optimizer(model, config, (0.9, 0.95), model.linear_maps())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter).sign()
    norm = clip_gradients(optimizer, 1.0)
    update_weights(optimizer, RATE)
    assert norm == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())))
    maps = model.linear_maps()
    chosen = {id(parameter) for parameter in maps}
    assert len(chosen) == 8  # qkv, out, gate and value, out of each of two blocks
    for name, value in model.named_parameters():
        assert value.grad is None
        decayed = id(value) in chosen or name == "head.weight"
        moved = value.detach() - before[name] * (1 - RATE * DECAY if decayed else 1)
        if id(value) in chosen:
            # Singular values of about 1, times 0.2 sqrt(longer side): the RMS of AdamW's steps.
            for part in moved.split(maps[value]):  # queries, keys, values, gate: each by itself
                size = torch.linalg.svdvals(part) / (RATE * 0.2 * max(part.shape) ** 0.5)
                assert 0.6 < size.median() < size.max() < 1.4, name
        else:
            torch.testing.assert_close(moved.abs(), torch.full_like(moved, RATE), rtol=1e-2, atol=0)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12, 5), (1, 4, 16)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonalize(matrices) @ vh.mT  # diagonal, in the basis of these vectors
    values = rotated.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min() < values.max() < 1.25
    torch.testing.assert_close(rotated, torch.diag_embed(values), rtol=0, atol=1e-4)


def test_a_cpu_orthogonalizes_in_the_precision_of_the_weights() -> None:
    """In bfloat16, which many CPUs emulate, a step takes more than ten times as long."""
    matrices = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(matrices.double())
    torch.testing.assert_close(orthogonalize(matrices).double(), exact, rtol=0, atol=1e-4)


def test_stacked_maps_step_as_if_each_were_a_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 24, 8, generator=generator)
    stacked = torch.nn.Parameter(weight.clone())
    apart = [torch.nn.Parameter(x.clone()) for x in weight.split([8, 16])]
    optimizers = [
        Muon({stacked: [8, 16]}, RATE, DECAY),
        Muon({parameter: [len(parameter)] for parameter in apart}, RATE, DECAY),
    ]
    for _ in range(3):
        stacked.grad = gradient.clone()
        for parameter, part in zip(apart, gradient.split([8, 16]), strict=True):
            parameter.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stacked.detach(), torch.cat([x.detach() for x in apart]))


def test_without_matrices_it_is_adamw() -> None:
    model = make_gpt()
    assert type(make_optimizer(model, TrainingConfig(), (0.9, 0.95))) is torch.optim.AdamW


def test_the_learning_rate_reaches_all_parts() -> None:
    model = make_gpt()
    optimizer = make_optimizer(model, TrainingConfig(), (0.9, 0.95), model.linear_maps())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    clip_gradients(optimizer, 1.0)
    update_weights(optimizer, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_it_learns_a_rule_of_rows() -> None:
    """Every position repeats the one above it: only the first row has any information."""
    model = make_gpt()
    config = TrainingConfig(learning_rate=1e-2)
    optimizer = make_optimizer(model, config, (0.9, 0.95), model.linear_maps())
    for _ in range(80):
        indices = torch.randint(0, 8, (32, 1, 4)).expand(-1, 5, 4)
        logits = model.logits(torch.zeros(32, dtype=torch.long), indices)
        loss = F.cross_entropy(logits.flatten(0, 1), indices.flatten())
        loss.backward()
        clip_gradients(optimizer, 1.0)
        update_weights(optimizer, 1e-2)
    assert loss.item() < 0.75 * math.log(8)


def test_the_loss_scale_of_fp16_changes_no_step_and_halves_after_an_overflow() -> None:
    config = TrainingConfig(batch_size=2, precision="fp16")
    schedule, alone = Schedule(config, 8, 2), Distributed(0, 1, torch.device("cpu"))
    weights, states = [], []
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1)
        optimizers = {"optimizer": make_optimizer(net, config, (0.9, 0.95))}
        state = TrainState(config, schedule, alone, net, optimizers, {"precision": precision})
        loss = net(torch.arange(3.0)).mean()
        (loss * state.loss_scale).backward()
        assert optimizer_step(state, torch.arange(2), {"loss": loss.detach()})
        weights.append(net.weight.detach().clone())
        states.append(state)
    assert torch.equal(*weights)
    assert [state.loss_scale for state in states] == [1, 2**16]
    net.weight.grad = torch.full_like(net.weight, math.inf)
    assert not optimizer_step(state, torch.arange(2), {"loss": torch.ones(())})
    assert torch.equal(net.weight, weights[1])
    assert net.weight.grad is None
    assert (state.loss_scale, state.progress.skipped) == (2**15, 0)
    assert state.checkpoint.files()["training.json"]["progress"]["loss_scale"] == 2**15
    for step in range(GROWTH_STEPS):
        assert state.loss_scale == 2**15, step
        net.weight.grad = torch.zeros_like(net.weight)
        assert optimizer_step(state, torch.arange(2), {"loss": torch.ones(())})
    assert state.loss_scale == 2**16


def test_gradients_in_fp16_are_nearly_those_in_fp32() -> None:
    grids, found = torch.randint(8, (4, 5, 4), generator=torch.Generator().manual_seed(0)), []
    for precision, scale in (("fp32", 1), ("fp16", 2**16)):
        model = make_gpt()
        with autocast(torch.device("cpu"), precision):
            loss = model.loss(torch.zeros(4, dtype=torch.long), grids).mean()
        (loss * scale).backward()
        found.append(model.head.weight.grad / scale)
    torch.testing.assert_close(*found, rtol=0.02, atol=1e-4)
