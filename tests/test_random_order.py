"""Training in random orders: what counts as the best model, and when patience runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from tests.conftest import TINY_GPT
from tests.test_transformer_generation import call


def test_nothing_counts_before_the_raster_phase(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience could end a training in random orders, whose best model then never saw the raster.

    Here every evaluation is worse than the one before.
    """
    seen = []

    def worse(*arguments: object) -> torch.Tensor:
        seen.append(len(seen) + 1.0)
        return torch.full((2, 2), seen[-1])

    monkeypatch.setattr(train, "evaluate", worse)
    Path("indices.txt").write_text("0 1 2 3\n" * 40)
    flags = ("--path_to_data", "indices.txt", "--device", "cpu", "--output_dir", "gpt", *TINY_GPT)
    steps = ("--max_epochs", 9, "--max_steps", 8, "--evaluate_every", 1, "--patience", 1)
    call("train", *flags, *steps, "--order_anneal", "0.5,0.75")
    lines = [json.loads(line) for line in Path("gpt/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "val/bits_per_token" in line]
    # From step 6 on all is in raster order; step 7 is worse.
    assert steps == list(range(8))
    assert max(line.get("val/best_bits_per_token", 0) for line in lines) == seen[6]
