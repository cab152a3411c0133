"""The worked examples of docs/architecture.md: each diff applies, touches few files, and works."""

import contextlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.reading import ROOT, tracked
from tests.forks import run_forked

IMPORTS = """
import tempfile
from pathlib import Path
import torch
from PIL import Image
from transformer import GPT, GPTConfig, SamplingParams
from transformer.distribution import probabilities
from utils.data.sources import read_rows
from utils.evaluation.metrics import image_metrics
from vqvae import VQVAE, VQVAEConfig
folder = Path(tempfile.mkdtemp(dir="."))
"""
FILES = {  # edited or added
    "Add a quantizer": 2,
    "Add a logit filter": 1,
    "Change the transformer block": 1,
    "Add a data source": 1,
    "Add a metric": 1,
}


CHECKS = {
    "Add a quantizer": """
config = VQVAEConfig.create(quantizer="bsq", codebook_dim=6, image_size=(8, 8), in_channels=3)
tokenizer = VQVAE(config).eval()
indices = tokenizer.encode(torch.rand(2, 3, 8, 8) * 2 - 1)
assert indices.shape == (2, 2, 2) and indices.max() < 64
assert torch.allclose(tokenizer.embed(indices).norm(dim=1), torch.ones(2, 2, 2))
""",
    "Add a logit filter": """
logits = torch.tensor([[3.0, 2.9, -1.0, -1.0]])
kept = probabilities(logits, SamplingParams(top_n_sigma=1)) > 0
assert kept.tolist() == [[True, True, False, False]]
""",
    "Change the transformer block": """
model = GPT(GPTConfig(16, latent_dim=(2, 2), num_layers=2, num_heads=2, dim=16)).eval()
grid = torch.zeros(1, 2, 2, dtype=torch.long)
loss = model.loss(torch.zeros(1, dtype=torch.long), grid)
assert torch.allclose(loss, torch.full((1, 4), 16.0).log())
""",
    "Add a data source": r"""
for name in ("cat", "dog"):
    (folder / name).mkdir()
    Image.new("RGB", (8, 8)).save(folder / name / "1.png")
(folder / "pets.txt").write_text("cat/1.png\ndog/1.png\n")
assert [(row.image_path, row.label) for row in read_rows(folder / "pets.txt")] == [
    ("cat/1.png", "cat"),
    ("dog/1.png", "dog"),
]
""",
    "Add a metric": """
black, white = torch.full((2, 1, 4, 4), -1.0), torch.ones(2, 1, 4, 4)
assert image_metrics(black, white)["mae"].tolist() == [1, 1]
""",
}


class Example(NamedTuple):
    title: str
    diff: str


def examples() -> list[Example]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    pattern = r"^## ([^\n]+)\n(?:(?!^## ).)*?```diff\n(.*?)```"
    return [Example(*found) for found in re.findall(pattern, text, re.DOTALL | re.MULTILINE)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the source, without tests and benchmarks."""
    for path in tracked():
        if not path.startswith(("tests/", "benchmarks/")):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def apply(diff: str, folder: Path, *flags: str) -> None:
    command = ["git", "apply", *flags, "-"]
    done = subprocess.run(
        command, input=diff, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_page_has_all_examples() -> None:
    touched = {
        example.title: len(re.findall(r"^\+\+\+ ", example.diff, re.MULTILINE))
        for example in examples()
    }
    assert touched == FILES


def test_the_examples_work(copy: Path) -> None:
    """Each diff applies to the source as it is; then all are applied, and checked together."""
    for example in examples():
        apply(example.diff, copy, "--check")
    code = IMPORTS
    for example in examples():
        apply(example.diff, copy)
        code += CHECKS[example.title]
    with contextlib.chdir(copy):
        run_forked("-c", code, check=True)
