"""What train.py says of the GPT that it made."""

import sys
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import TINY_GPT
from utils import cli
from utils.data.indices import IndicesMeta, write_indices
from utils.data.sources import Row

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses


@pytest.mark.parametrize(("learning_rate", "learns"), [(0.01, True), (1e-7, False)])
def test_a_gpt_that_learned_nothing_is_told_apart(
    learning_rate: float,
    learns: bool,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its samples were noise, and nothing was said."""
    grids = torch.randint(0, 8, (40, 1, 4), generator=torch.Generator().manual_seed(0)) // 5
    grids = grids.expand(-1, 4, -1).clone()  # all rows repeat the first
    grids[0, 0, 0] = 15
    rows = [Row(f"{n}.png", "", "val" if n % 4 == 0 else "train") for n in range(40)]
    write_indices("indices", grids, rows, IndicesMeta(16, (4, 4)))
    flags = ("--max_epochs", 10, "--device", "cpu", "--learning_rate", learning_rate)
    command = ["train.py", "--path_to_data", "indices", *TINY_GPT, *map(str, flags)]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", "out"])
    cli.run(train.main, train.make_parser())
    said = capsys.readouterr().out
    assert ("no better than the unigram baseline" in said) == (not learns)
    assert ("smaller --codebook_size" in said) == (not learns)
    assert "transformer_generation.py --model_path out" in said.splitlines()[-1]
    assert Path("out/best/vocabulary.json").is_file()
