"""Options of train_vqvae.py from its flags to its files, on a dozen images."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_vqvae
from tests.conftest import TINY_TOKENIZER, write_images
from tests.reference_vqgan import reference_weights
from utils import checkpoint, cli
from utils.data.images import ImageDataset
from utils.data.table import split_rows
from utils.training.checkpoints import find_checkpoint
from utils.training.resume import STATE
from vqvae import QUANTIZERS, VQVAE, VQVAEConfig, pretrained
from vqvae.adversary import Adversary
from vqvae.inspection import reconstruct

Train = Callable[..., list[dict]]


@pytest.fixture
def data(own_folder: Path) -> Path:
    return write_images(own_folder / "data")


@pytest.fixture
def train(data: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Call the script in this process, to write to the folder out; what it logged."""

    def call(*flags: object) -> list[dict]:
        words = ("--path_to_data", data, *TINY_TOKENIZER, "--device", "cpu", *flags)
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
    model = VQVAE(VQVAEConfig(name, 64, image_size=(8, 8), in_channels=1, channels=8))
    pictures: dict[str, Image.Image] = {}
    run = argparse.Namespace(picture=lambda key, image, step: pictures.update({key: image}))
    seen = reconstruct(model, torch.rand(5, 1, 8, 8).split(2), train_vqvae.measure, keep=4)
    train_vqvae.log_pictures(run, model, seen, step=0)
    names = ("reconstructions", "code_usage", "code_embedding", "codes_alone")
    assert pictures.keys() == {f"pictures/{name}" for name in names}
    for picture in pictures.values():
        assert min(picture.size) >= 256
        assert max(picture.size) >= 512


def test_pictures_are_there_from_the_first_step(train: Train) -> None:
    train("--max_steps", 2, "--ema_decay", 0.9)
    for name in ("reconstructions", "code_usage", "code_embedding", "codes_alone"):
        for step in (0, 2):
            assert Path(f"out/pictures/pictures-{name}-{step:08}.png").is_file()


# --- starting from another tokenizer ------------------------------------------------------------


def test_a_converted_tokenizer_is_fine_tuned(train: Train, data: Path) -> None:
    """Lenient on the loss's keys, strict on the model's; its settings count, not the flags."""
    state = reference_weights("taming") | {"loss.discriminator.main.0.bias": torch.zeros(4)}
    torch.save({"state_dict": state}, "last.ckpt")
    convert = ("--from", "taming", "--checkpoint", "last.ckpt", "--output_dir", "own")
    pretrained.main(pretrained.make_parser().parse_args(convert))
    logged = train("--init_from", "own", "--image_size", "24,40", "--max_steps", 2)
    start = checkpoint.load_model("own", VQVAE, VQVAEConfig).model
    tuned = checkpoint.load_model("out", VQVAE, VQVAEConfig).model
    assert tuned.config == replace(start.config, image_size=(24, 40))
    weights = tuned.state_dict()
    assert not torch.equal(weights["encoder.conv_in.weight"], state["encoder.conv_in.weight"])

    dataset = ImageDataset(data, size=(24, 40), num_workers=0)
    rows = split_rows(dataset.rows, val_fraction=0.1, seed=0)[1]
    seen = reconstruct(
        start, dataset.batches([rows], torch.device("cpu")), train_vqvae.measure, keep=1
    )
    expected = float(seen.sums["mse"]) / len(rows)
    assert column(logged, "val/mse")[0] == pytest.approx(expected, rel=1e-4)


def test_what_is_no_whole_tokenizer_is_no_start(
    error_of: Callable[..., str], data: Path, own_folder: Path
) -> None:
    model = VQVAE(VQVAEConfig(image_size=(24, 40), in_channels=3, channels=8))
    files = checkpoint.model_files(model, checkpoint.Provenance())
    del files["model.safetensors"]["decoder.conv_in.weight"]
    checkpoint.write_folder(own_folder / "part", files)
    flags = ("--path_to_data", data, *TINY_TOKENIZER, "--init_from")
    assert "decoder.conv_in.weight" in error_of("train_vqvae", *flags, "part")
    assert "no such model folder: nowhere" in error_of("train_vqvae", *flags, "nowhere")
    files["config.json"]["model"] = "GPT"
    checkpoint.write_folder(own_folder / "gpt", files)
    assert "holds a GPT, but a VQVAE is needed" in error_of("train_vqvae", *flags, "gpt")
    assert not Path("outputs").exists()


# --- codes that nobody uses ---------------------------------------------------------------------


@pytest.mark.parametrize("rescue", [False, True])
def test_few_codes_in_use_are_warned_of_and_restarted(
    train: Train, capsys: pytest.CaptureFixture, rescue: bool
) -> None:
    flags = ("--codebook_size", 4096, "--max_steps", 4, "--evaluate_every", 2)
    restarts: list[int] = []
    original = train_vqvae.VQVAE.__init__

    def watched(model: VQVAE, config: VQVAEConfig) -> None:
        original(model, config)
        restart = model.quantizer.restart
        model.quantizer.restart = lambda: restarts.append(1) or restart()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vqvae.VQVAE, "__init__", watched)
        train(*flags, *(["--codebook_rescue"] if rescue else []))
    printed = capsys.readouterr().out
    assert printed.count("% of the codebook is in use") == 2
    assert "--codebook_rescue" in printed
    assert printed.count("codebook rescue: all codes start anew") == rescue
    assert len(restarts) == rescue  # and none after the last step
    for folder in (Path("out/best"), find_checkpoint("out", "")):
        tensors = checkpoint.read_tensors(folder / "model.safetensors")
        assert tensors["quantizer.initialised"]  # else a fine-tuning would forget the codes


# --- the adversary ------------------------------------------------------------------------------

GAN = ("--disc_channels", 4, "--disc_start", 0.25, "--disc_warmup", 0.25, "--disc_ramp", 0.25)


def test_the_adversary_comes_in_step_by_step(train: Train) -> None:
    logged = train(
        *("--disc_weight", 0.8, *GAN, "--max_epochs", 200, "--max_steps", 200),
        *("--evaluate_every", 50, "--lecam_weight", 0.01, "--r1_weight", 0.1),
    )
    strengths = column(logged, "train/disc_strength")
    assert list(strengths) == [100, 150, 200]  # none before it starts
    assert strengths[100] == 0
    assert 0 < strengths[150] < strengths[200] <= 1
    assert list(column(logged, "train/adaptive_weight")) == [150, 200]
    for name in ("disc_loss", "disc_real", "disc_fake"):
        assert list(column(logged, f"train/{name}")) == [100, 150, 200]
    errors = column(logged, "val/mse")
    assert errors[50] == errors[100] != errors[150]  # alone, from a tokenizer that stands still
    tensors = checkpoint.read_tensors(find_checkpoint("out", "") / STATE)
    assert any(name.startswith("adversary.") for name in tensors)


def test_without_weight_there_is_no_adversary(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("an adversary was built")

    monkeypatch.setattr(Adversary, "__init__", refuse)
    logged = train("--disc_weight", 0, *GAN, "--max_steps", 2)
    assert not any("disc" in key or "advers" in key for row in logged for key in row)
    assert not list(Path("out").rglob("a*.safetensors"))


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
    assert "--lpips_weights" in error
    assert not Path("outputs").exists()
    assert not Path("mlflow.db").exists()
