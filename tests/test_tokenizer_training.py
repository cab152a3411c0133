"""Options of train_vqvae.py from its flags to its files, on a dozen images."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from PIL import Image

import train_vqvae
from tests.conftest import TINY_TOKENIZER, write_images
from tests.published import make_weights
from utils import cli
from utils.data.images import ImageConfig, ImageDataset
from utils.data.sources import split_rows
from utils.distributed import ALONE
from utils.evaluation import metrics
from utils.files import read_tensors, write_folder
from utils.provenance import Provenance, load_model, model_files
from utils.training.checkpoint import find_checkpoint
from utils.training.state import TENSORS
from vqvae import PRESETS, QUANTIZERS, VQVAE, VQVAEConfig, convert
from vqvae.adversarial import AdversarialLoss
from vqvae.quantizers.codebook import CollapseMonitor

Train = Callable[..., list[dict]]
SMALL_BATCHES = ("--batch_size", "4", "--num_workers", "0")


@pytest.fixture
def data(own_folder: Path) -> Path:
    return write_images(own_folder / "data")


@pytest.fixture
def train(data: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Call the script in this process, to write to the folder out; what it logged."""

    def call(*flags: object, tiny: tuple = TINY_TOKENIZER) -> list[dict]:
        words = ("--path_to_data", data, *tiny, "--device", "cpu", *flags)
        words = ("train_vqvae.py", *words, "--output_dir", "out")
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        cli.run(train_vqvae.main, train_vqvae.make_parser())
        return [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]

    return call


def column(logged: list[dict], name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in logged if name in row}


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZERS)
def test_pictures_of_every_quantizer(name: str) -> None:
    torch.manual_seed(0)
    model = VQVAE(
        VQVAEConfig.create(
            quantizer=name, codebook_size=64, image_size=(8, 8), in_channels=1, channels=8
        )
    )
    pictures: dict[str, Image.Image] = {}
    run = argparse.Namespace(picture=lambda key, image, step: pictures.update({key: image}))
    images = torch.rand(5, 1, 8, 8)
    dataset: Any = SimpleNamespace(batches=lambda batches, _: (images[rows] for rows in batches))
    seen = train_vqvae.evaluate(model, dataset, torch.arange(5), 2, ALONE)[1]
    train_vqvae.log_pictures(run, model, seen, step=0)
    names = ("reconstructions", "code_usage", "code_embedding", "decoded_codes")
    assert pictures.keys() == {f"pictures/{name}" for name in names}
    for picture in pictures.values():
        assert min(picture.size) >= 256
        assert max(picture.size) >= 512


def test_pictures_are_there_from_the_first_step(train: Train) -> None:
    train("--max_steps", 2, "--ema_decay", 0.9)
    for name in ("reconstructions", "code_usage", "code_embedding", "decoded_codes"):
        for step in (0, 2):
            assert Path(f"out/pictures/pictures-{name}-{step:08}.png").is_file()


# --- starting from another tokenizer ------------------------------------------------------------


def test_a_converted_tokenizer_is_fine_tuned(train: Train, data: Path) -> None:
    """Lenient on the loss's keys, strict on the model's; its settings count."""
    state = make_weights("taming VQModel") | {"loss.discriminator.main.0.bias": torch.zeros(4)}
    torch.save({"state_dict": state}, "last.ckpt")
    flags = ("--from", "taming", "--checkpoint", "last.ckpt", "--image_size", 256)
    flags = (*flags, "--output_dir", "own")
    convert.main(convert.make_parser().parse_args(list(map(str, flags))))
    # 20 does not divide by the 16 of the flags' own network, which was checked all the same.
    flags = ("--init_from", "own", "--image_size", "24,40", "--max_steps", 2, "--dropout", 0.1)
    logged = train(*flags, "--commitment_cost", 0.5, tiny=SMALL_BATCHES)
    start = load_model("own", VQVAE).model
    tuned = load_model("out", VQVAE).model
    changes = {"image_size": (24, 40), "dropout": 0.1, "commitment_cost": 0.5}
    changes |= {"resampling": "bicubic", "value_range": (0.0, 255.0)}  # of its own images
    assert tuned.config.to_dict() == start.config.to_dict() | changes
    weights = tuned.state_dict()
    assert not torch.equal(weights["encoder.conv_in.weight"], state["encoder.conv_in.weight"])

    dataset = ImageDataset(data, ImageConfig(num_workers=0), size=(24, 40))
    rows = split_rows(dataset.rows, val_fraction=0.1, seed=0)[1]
    (images,) = dataset.batches([rows], torch.device("cpu"))
    with torch.no_grad():
        errors = metrics.squared_error(start.decode(start.encode(images)), images)
    assert column(logged, "val/mse")[0] == pytest.approx(float(errors.mean()), rel=1e-4)


def test_what_is_no_whole_tokenizer_is_no_start(
    error_of: Callable[..., str], data: Path, own_folder: Path
) -> None:
    model = VQVAE(VQVAEConfig.create(image_size=(24, 40), in_channels=3, channels=8))
    files = model_files(model, Provenance())
    del files["model.safetensors"]["decoder.conv_in.weight"]
    write_folder(own_folder / "part", files)
    flags = ("--path_to_data", data, *SMALL_BATCHES, "--init_from")
    assert "decoder.conv_in.weight" in error_of("train_vqvae", *flags, "part")
    assert "no such model folder: nowhere" in error_of("train_vqvae", *flags, "nowhere")
    files["config.json"]["model"] = "GPT"
    write_folder(own_folder / "gpt", files)
    assert "holds a GPT, but a VQVAE is needed" in error_of("train_vqvae", *flags, "gpt")
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--codebook_size", 17), "--codebook_size 17 contradicts start, where it is 16"),
        (("--no-mid_attention", "--channels", 4), "--channels 4 contradicts start, where it is 8"),
        (("--image_size", 30), "image_size 30,30 is not a multiple .* use image_size 32,32"),
        (("--preset", "vqgan-f8"), "--preset cannot be combined with --init_from"),
    ],
)
def test_flags_that_contradict_the_start_are_refused(
    error_of: Callable[..., str], data: Path, own_folder: Path, flags: tuple, complaint: str
) -> None:
    """They were ignored, and a size that does not divide was a traceback."""
    model = VQVAE(
        VQVAEConfig.create(image_size=(24, 40), in_channels=3, channels=8, codebook_size=16)
    )
    write_folder(own_folder / "start", model_files(model, Provenance()))
    words = ("--path_to_data", data, *SMALL_BATCHES, "--init_from", "start", *flags)
    assert re.search(complaint, error_of("train_vqvae", *words))
    assert not Path("outputs").exists()


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_every_quantizer(preset: str, name: str) -> None:
    """Those of large codes refused fsq and lfq, whose dimension follows from their number."""
    words = ["--path_to_data", "x", "--preset", preset, "--quantizer", name]
    flags = train_vqvae.make_parser().parse_args([*words, "--channels", "4"])
    _, config = train_vqvae.read_start(train_vqvae.StartConfig(), flags)
    with torch.device("meta"):
        VQVAE(replace(config, image_size=(32, 32), in_channels=1))
    assert config.codebook_size == PRESETS[preset].get("codebook_size", 512)
    if name == PRESETS[preset].get("quantizer"):
        assert config.codebook_dim == PRESETS[preset]["codebook_dim"]


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("", 1e-3),
        ("--preset vqvae-small", 1e-3),
        ("--preset vqgan-f16", 1e-4),
        ("--preset vqgan-f16 --learning_rate 1e-3", 1e-3),
    ],
)
def test_presets_change_the_default_of_the_learning_rate(words: str, rate: float) -> None:
    flags = train_vqvae.make_parser().parse_args(["--path_to_data", "x", *words.split()])
    assert train_vqvae.read_configs(flags)[0].learning_rate == rate


def test_levels_override_the_codebook_of_a_preset() -> None:
    words = "--path_to_data x --preset vqgan-f16 --quantizer fsq --levels 8,5,5,5"
    _, config = train_vqvae.read_start(
        train_vqvae.StartConfig(), train_vqvae.make_parser().parse_args(words.split())
    )
    assert (config.codebook_size, config.codebook_dim) == (1000, 4)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--lecam_weight 0.1", "--lecam_weight has no effect without --disc_weight above 0"),
        (
            "--no-disc_adaptive_schedule",
            "--disc_adaptive_schedule has no effect without --disc_weight",
        ),
        (
            "--disc_weight 1 --no-disc_adaptive_schedule --disc_bound 1",
            "has no effect without --disc_adaptive_schedule;",
        ),
        ("--lpips_network alex", "--lpips_network has no effect without --perceptual_weight"),
        (
            "--quantizer fsq --commitment_cost 1",
            "commitment_cost has no effect with the quantizer fsq",
        ),
        ("--quantizer lfq --dead_code_threshold 0.1", "has no effect with the quantizer lfq"),
        (
            "--quantizer lfq --reset_codebook_on_collapse",
            "on_collapse has no effect with the quantizer lfq",
        ),
        ("--l2_weight nan", "l2_weight must be at least 0, got nan"),
        ("--disc_weight inf", "disc_weight must be"),
        ("--learning_rate inf", "learning_rate must be below inf"),
        ("--weight_decay inf", "weight_decay must be below inf"),
    ],
)
def test_flags_without_effect_or_meaning_are_refused(
    error_of: Callable[..., str], data: Path, flags: str, complaint: str
) -> None:
    error = error_of("train_vqvae", "--path_to_data", data, *SMALL_BATCHES, *flags.split())
    assert re.search(complaint, error)
    assert not Path("outputs").exists()


# --- codes out of use ----------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_a_collapse_is_reported_and_the_codes_are_reset_also_across_a_resume(
    train: Train, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    monkeypatch.setattr(CollapseMonitor, "LOW_USAGE", 101.0)
    monkeypatch.setattr(CollapseMonitor, "INDICES_PER_CODE", 0)
    flags = ("--evaluate_every", 2, *(["--reset_codebook_on_collapse"] if reset else []))
    train(*flags, "--max_steps", 6)
    train(*flags, "--max_steps", 10, "--resume", "out")
    printed = capsys.readouterr().out
    assert printed.count("% of the codes are in use") == 5
    for number in (1, 2, 3):  # after steps 2, 4 and 8; the others are the last of a training
        assert printed.count(f"codebook reset {number} of 3") == reset
    for folder in (Path("out/best"), find_checkpoint("out", "")):
        tensors = read_tensors(folder / "model.safetensors")
        assert tensors["quantizer.initialised"]  # otherwise fine-tuning would discard the codes


# --- the adversary ------------------------------------------------------------------------------

GAN = ("--disc_channels", 4, "--disc_start", 0.25, "--disc_warmup", 0.25, "--disc_ramp", 0.25)


def test_the_adversary_comes_in_step_by_step(train: Train) -> None:
    logged = train(
        *("--disc_weight", 0.8, *GAN, "--max_epochs", 100, "--max_steps", 100),
        *("--evaluate_every", 25, "--lecam_weight", 0.01, "--r1_weight", 0.1),
    )
    strengths = column(logged, "train/disc_strength")
    assert list(strengths) == [50, 75, 100]  # none before it starts
    assert strengths[50] == 0
    assert 0 < strengths[75] < strengths[100] <= 1
    assert list(column(logged, "train/adaptive_weight")) == [75, 100]
    for name in ("disc_loss", "disc_real", "disc_fake"):
        assert list(column(logged, f"train/{name}")) == [50, 75, 100]
    errors = column(logged, "val/mse")
    assert errors[25] == errors[50] != errors[75]  # discriminator only: the generator is frozen
    tensors = read_tensors(find_checkpoint("out", "") / TENSORS)
    assert any(name.startswith("adversary.") for name in tensors)


def test_without_weight_there_is_no_adversary(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("an adversary was built")

    monkeypatch.setattr(AdversarialLoss, "__init__", refuse)
    logged = train("--disc_weight", 0, "--max_steps", 2)
    assert not any("disc" in key or "advers" in key for row in logged for key in row)
    assert not list(Path("out").rglob("a*.safetensors"))


def test_a_compiled_tokenizer_has_an_adversary(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adaptive weight goes through the graph a second time, of which buffers were gone."""
    # Without the C++ compiler at the end, which takes a minute and has no part in it.
    traced = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(VQVAE, "compile", traced)
    flags = (
        "--disc_weight",
        0.8,
        "--disc_channels",
        4,
        "--no-disc_adaptive_schedule",
        "--disc_start",
        0,
    )
    logged = train(*flags, "--compile", "--max_steps", 2)
    assert column(logged, "train/adaptive_weight")[2] > 0
    assert functorch_config.donated_buffer  # of other models in this process


def test_the_baseline_is_evaluated_right_before_joint_training(
    train: Train, capsys: pytest.CaptureFixture
) -> None:
    """Where no evaluation fell between, it had nothing to compare with, and saw nothing."""
    flags = ("--disc_weight", 0.8, "--disc_channels", 4, "--max_steps", 20, "--evaluate_every", 20)
    shares = ("--disc_start", 0.25, "--disc_warmup", 0.25, "--disc_ramp", 0.5)
    logged = train(*flags, *shares, "--max_epochs", 50)
    errors = column(logged, "val/mse")
    assert list(errors) == [0, 10, 20]
    assert column(logged, "val/disc_baseline")[20] == pytest.approx(errors[10])
    assert "20 steps apart, but the adversarial loss ramps up" in capsys.readouterr().out


# --- the perceptual loss ------------------------------------------------------------------------


def test_lpips_is_trained_on_with_weights_from_a_file(train: Train, own_folder: Path) -> None:
    pytest.importorskip("lpips")
    from torchvision.models import alexnet

    features = alexnet().features.state_dict()
    torch.save({f"features.{name}": value for name, value in features.items()}, "alex.pth")
    logged = train(
        *("--image_size", 64, "--max_steps", 1, "--perceptual_weight", 1),
        *("--lpips_network", "alex", "--lpips_weights", "alex.pth"),
    )
    assert column(logged, "train/perceptual_loss")[1] > 0


def test_images_that_are_too_small_for_lpips(
    error_of: Callable[..., str], data: Path, own_folder: Path
) -> None:
    """It was a traceback of the loop, when a run stood in MLflow."""
    pytest.importorskip("lpips")
    from torchvision.models import alexnet

    features = alexnet().features.state_dict()
    torch.save({f"features.{name}": value for name, value in features.items()}, "alex.pth")
    lpips = ("--perceptual_weight", 1, "--lpips_network", "alex", "--lpips_weights", "alex.pth")
    error = error_of("train_vqvae", "--path_to_data", data, *SMALL_BATCHES, *lpips)
    assert "LPIPS with lpips_network alex needs images of at least 31x31 pixels" in error
    assert not Path("outputs").exists()


def test_without_internet_lpips_asks_for_its_weights_before_anything_is_begun(
    error_of: Callable[..., str], data: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lpips")

    def no_internet(*arguments: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(own_folder))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_internet)
    error = error_of("train_vqvae", "--path_to_data", data, "--perceptual_weight", 1)
    assert "https://download.pytorch.org/models/vgg16" in error
    assert "lpips_weights" in error
    assert not Path("outputs").exists()
    assert not Path("mlflow.db").exists()
