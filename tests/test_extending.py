"""The worked examples of docs/architecture.md: each diff applies, touches few files, and works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.reading import ROOT, tracked

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


class Example(NamedTuple):
    title: str
    diff: str
    check: str


def examples() -> list[Example]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    pattern = r"^## ([^\n]+)\n(?:(?!^## ).)*?```diff\n(.*?)```\s+```python\n(.*?)```"
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
        code += f"# {example.title}\n{example.check}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
