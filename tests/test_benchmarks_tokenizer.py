"""The tokenizer's benchmarks at a size that takes no time."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from utils import cli
from vqvae import VQVAEConfig


def call(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> dict:
    """Run a benchmark in this process; what it recorded."""
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    cli.run(module.main, module.make_parser())
    return json.loads(Path(f"benchmarks/results/{name}.json").read_text())["results"]


def test_operations_are_those_of_the_convolutions() -> None:
    from benchmarks.presets import operations

    config = VQVAEConfig.create(image_size=(8, 8), in_channels=1, channels=2, codebook_size=16)
    positions, wide = 4, 9 * 2 * 2  # multiplications of a 3x3 convolution from 2 to 2 channels
    encode = 9 * 16 * 2 + 4 * wide + 9 * 2 * 8 + 16 * 8
    decode = 9 * 8 * 2 + 6 * wide + 9 * 2 * 16
    found = operations(config)
    assert found["encode"] == pytest.approx(2 * positions * encode / 1e9)
    assert found["decode"] == pytest.approx(2 * positions * decode / 1e9)


def test_half_the_resolution_halves_the_cost_of_the_published_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = call(monkeypatch, "presets", "--image_size", 32, "--rounds", 0)
    assert found["vqgan-f16"]["tokens"] == found["vqgan-f16-s2d"]["tokens"] == 4
    costs = [sum(found[name]["gigaflops"].values()) for name in ("vqgan-f16", "vqgan-f16-s2d")]
    assert costs[1] < 0.6 * costs[0]


def test_every_way_of_training_is_timed_and_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lpips")
    small = ("--preset", "vqvae-small", "--image_size", 32, "--batch_size", 2, "--device", "cpu")
    found = call(monkeypatch, "tokenizer", *small, "--no-compile", "--warmup", 1, "--steps", 1)
    costs = [way["gigaflops"] for way in found["ways"].values()]
    assert len(costs) == 3
    assert costs == sorted(costs)
    for way in found["ways"].values():
        assert way["images_per_second"] > 0
        assert way["limit"] == pytest.approx(790e12 / (way["gigaflops"] * 1e9))


def test_steps_are_timed_beside_busy_processes(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = call(monkeypatch, "busy", "--batch_size", 2, "--rounds", 1, "--steps", 1)
    assert set(found) == {"GPT", "GPT, small", "tokenizer", "tokenizer, small"}
    assert all(seconds > 0 for each in found.values() for seconds in each.values())
