"""What is measured during a training, and which model it keeps."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import TINY_GPT, TINY_TOKENIZER, write_images
from utils import cli
from utils.cli import UserError
from utils.evaluation import features, metrics
from utils.evaluation.features import DecodedImages
from utils.training.config import sign_of

Call = Callable[..., str]


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "TRAINING_IMAGES", 500)


def call(name: str, *arguments: object) -> None:
    import importlib

    module, before = importlib.import_module(name), sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        cli.run(module.main, module.make_parser())
    finally:
        sys.argv = before


def curve(folder: str, key: str) -> list[float]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.mark.usefixtures("store")
def test_trainings_log_ssim_and_the_distance_of_samples(
    error_of: Call, capsys: pytest.CaptureFixture
) -> None:
    data = write_images(Path("data"), count=30)
    flags = ("--path_to_data", data, *TINY_TOKENIZER, "--val_fraction", 0.4)
    call("train_vqvae", *flags, "--max_epochs", 3, "--best_metric", "ssim", "--output_dir", "t")
    ssim = curve("t", "val/ssim")
    assert len(ssim) == 4
    assert curve("t", "val/best_ssim") == pytest.approx([max(ssim[1:])], rel=1e-3)

    call("quantize_dataset", "--model_dir", "t", "--path_to_data", data, "--output_dir", "i")
    used = len(np.unique(np.load("i/indices.npy")))  # not in percent of what 30 images can use
    assert f": {used} of 16 codes in use, " in capsys.readouterr().out
    flags = ("--path_to_data", "i", *TINY_GPT, "--max_epochs", 2)
    evaluated = ("--model_dir", "t", "--fd_samples", 10, "--best_metric", "fd_classifier")
    capsys.readouterr()
    call("train", *flags, *evaluated, "--output_dir", "g")
    said = capsys.readouterr()
    found = re.search(r"classifier: (\d+\.\d%) of the labels of 10 held-out images", said.out)
    assert said.out.count(f"% of the right class (real images: {found[1]})") == 3
    assert "warning: the Frechet distance of 10 images" in said.err
    distances = curve("g", "val/fd_classifier")
    assert len(distances) == 3
    assert all(distance > 0 for distance in distances)
    assert curve("g", "val/best_fd_classifier") == pytest.approx([min(distances[1:])])
    call("train", *flags, "--model_dir", "t", "--output_dir", "p")
    assert curve("p", "val/bits_per_token") == curve("g", "val/bits_per_token")  # it only looks on

    error = error_of("train", *flags, "--fd_samples", 10)
    assert "--fd_samples needs the tokenizer" in error
    error = error_of("train", *flags, "--model_dir", "t", "--fd_samples", 1)
    assert "leaves 1 validation images" in error
    error = error_of("train", *flags, "--best_metric", "fd_classifier")
    assert "fd_classifier is not measured here; use bits_per_token" in error


def test_which_metrics_are_better_when_lower() -> None:
    assert sign_of("mse", metrics.SIGNS) == 1
    assert [sign_of(x, metrics.SIGNS) for x in ("ssim", "psnr", "codebook_usage")] == [-1] * 3
    with pytest.raises(UserError, match="--best_metric fid is not measured here; use mse, ssim"):
        sign_of("fid", metrics.SIGNS)


def test_decoded_images_have_eight_bits() -> None:
    config = SimpleNamespace(in_channels=1, downsampling=2)
    tokenizer = SimpleNamespace(decode=lambda x: torch.full((len(x), 1, 2, 2), 0.3), config=config)
    images = DecodedImages(torch.zeros(5, 1, 1), (), tokenizer)
    (batch,) = images.batches([torch.arange(3)], torch.device("cpu"))
    steps = (batch + 1) * 127.5
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert batch.shape == (3, 1, 2, 2)
