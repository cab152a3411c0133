"""The benchmark of the GPU runs: at a tiny size, on a CPU."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from transformer import GPT, GPTConfig


def test_the_gpu_benchmark_runs(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    small = ["--side", 3, "--large_side", 4, "--codebook_size", 32, "--batch_size", 4]
    fast = ["--draw_batch", 4, "--rounds", 2, "--warm_up", 1, "--no-compile", "--size", "tiny"]
    flags = gpu.make_parser().parse_args([*map(str, small + fast), "--device", "cpu"])
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py"])
    gpu.main(flags)
    results = json.loads((own_folder / "benchmarks/results/gpu.json").read_text())["results"]
    assert len(results) == 3
    for values in results.values():
        assert all(value > 0 for value in values.values())


def test_arithmetic_of_a_token() -> None:
    """Six a weight that multiplies; the embedding and the prefix are looked up."""
    config = GPTConfig(32, latent_dim=(1, 1), num_layers=1, num_heads=1, dim=16, hidden_dim=24)
    weights = 4 * 16 * 16 + 3 * 16 * 24 + 16 * 32 + 2 * 16 + 2 * 16  # and gains
    assert gpu.flops_a_token(GPT(config)) == 6 * weights + 12 * 16
