"""The plan of a training, against models that are really built."""

import pytest

from tests.conftest import run_script
from transformer import GPT, GPTConfig
from utils import plan

CONFIG = GPTConfig(64, latent_dim=(6, 5), num_layers=4, num_heads=2, dim=32)


def test_parameters_and_activations_are_those_of_the_model() -> None:
    assert plan.parameters_of(CONFIG) == sum(x.numel() for x in GPT(CONFIG).parameters())
    measured = plan.saved_bytes(CONFIG, 6) - plan.saved_bytes(CONFIG, 2)
    logits, norms = 4 * 30 * 64, 31 * 4 * (2 * 4 * 32 + 2 * 2 * 32)  # inputs, on a GPU
    on_cpu = plan.activation_bytes(CONFIG) + logits - norms
    assert on_cpu == pytest.approx(measured / 4, rel=0.05)


def test_memory_falls_with_more_gpus_where_parameters_are_sharded() -> None:
    one, many = (plan.memory(CONFIG, 0, n, "fsdp", ema=False) for n in (1, 64))
    assert many < one / 2
    blocks = sum(x.numel() for x in GPT(CONFIG).blocks.parameters())
    gathered = 12 * blocks / 4 + 10 * (plan.parameters_of(CONFIG) - blocks)
    assert one == plan.parameters_of(CONFIG) * 16 + gathered
    few, more = (plan.memory(CONFIG, x, 8, "ddp", ema=True) for x in (8, 9))
    assert more - few == pytest.approx(plan.activation_bytes(CONFIG) + 14 * 30 * 64, rel=0.01)


def test_a_plan_is_printed() -> None:
    words = ("--size", "tiny", "--latent_dim", "7", "--images", 6e4, "--epochs", 10, "--gpus", 2)
    out = run_script("utils/plan.py", *words, "--batch_size", 64).stdout
    assert "9,375 of 64 images" in out
    assert "GiB for 32 images" in out
    assert "operations" in out
