"""evaluate.py reconstructions, samples and --compare, on scikit-learn's digits."""

import csv
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import write_images
from utils import checkpoint, cli, tracking
from utils.data.indices import IndicesMeta, write_indices
from utils.data.table import Row
from utils.datasets import write_digits
from utils.evaluation import classifier
from vqvae import VQVAE, VQVAEConfig

Call = Callable[..., str]
CODES, GRID = 16, (4, 4)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of a folder of digits, with CSVs of its first hundreds beside it."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    with (folder / "digits.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    for name, part in {"train": rows[:600], "test": rows[600:800], "other": rows[800:950]}.items():
        lines = [["image_path", "label"], *(row[:2] for row in part)]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    return folder


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "SEEN", 4000)


@pytest.fixture
def tokenizer(own_folder: Path) -> Path:
    """A tokenizer of digits that nobody trained."""
    torch.manual_seed(0)
    sizes = {"channels": 8, "codebook_size": CODES, "codebook_dim": 4, "patch_size": 2}
    model = VQVAE(VQVAEConfig(image_size=(8, 8), in_channels=1, **sizes))
    files = checkpoint.model_files(model, checkpoint.Provenance())
    checkpoint.write_folder(own_folder / "tokenizer", files)
    return own_folder / "tokenizer"


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Call:
    """Call evaluate.py in this process; what it printed."""

    def call(*arguments: object) -> str:
        module = importlib.import_module("evaluate")
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        capsys.readouterr()
        cli.run(module.main, module.make_parser())
        return capsys.readouterr().out

    return call


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def value(record: dict, key: str) -> float:
    return record["figures"][key]["value"]


def samples_flags(digits: Path, images: str) -> tuple[object, ...]:
    return (
        *("samples", "--images", digits / images, "--path_to_data", digits / "train.csv"),
        *("--path_to_test", digits / "test.csv", "--device", "cpu"),
    )


def test_real_images_as_samples_are_as_good_as_real_ones(evaluate: Call, digits: Path) -> None:
    printed = evaluate(*samples_flags(digits, "other.csv"), "--output_dir", "real")
    record = read("real/samples.json")
    fd, real = record["figures"]["fd_classifier"], record["figures"]["real_fd_classifier"]
    assert fd["low"] < real["high"]
    assert real["low"] < fd["high"]
    assert value(record, "label_agreement") > 0.9
    assert value(record, "copies_pixels") <= value(record, "real_copies_pixels") + 0.03
    assert value(record, "precision") > 0.5
    assert "FD (classifier)" in printed
    assert "FID" not in printed
    with Path("real/samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == record["protocol"]["images"] == 150
    assert rows[0]["nearest_in_pixels"].startswith("digits/")
    wanted = {"path_to_data_sha256", "network_sha256", "seed", "versions", "features", "size"}
    assert wanted <= set(record["protocol"])
    assert Path("real/closest_pairs_pixels.png").is_file()


def test_copies_of_training_images_are_called_so(evaluate: Call, digits: Path) -> None:
    evaluate(*samples_flags(digits, "train.csv"), "--output_dir", "copied")
    record = read("copied/samples.json")
    assert value(record, "copies_pixels") == value(record, "copies_features") == 1
    assert value(record, "real_copies_pixels") < 0.05
    assert value(record, "nearest_pixels") == 0
    assert value(record, "precision") > 0.9


def test_indices_are_decoded_and_their_tokens_compared(
    evaluate: Call, digits: Path, tokenizer: Path
) -> None:
    sha256 = checkpoint.sha256(tokenizer / "model.safetensors")
    rows = [Row(f"{n}.png", str(n % 10), "") for n in range(40)]
    meta = IndicesMeta(CODES, GRID, tokenizer_sha256=sha256)
    write_indices("drawn", torch.randint(CODES, (40, *GRID)), rows, meta)
    evaluate(
        *("samples", "--indexes_path", "drawn", "--model_dir", tokenizer, "--device", "cpu"),
        *("--path_to_data", digits / "digits.csv", "--output_dir", "found"),
    )
    record = read("found/samples.json")
    assert value(record, "token_divergence") > value(record, "real_token_divergence") >= 0
    assert value(record, "fd_classifier") > 3 * value(record, "real_fd_classifier")
    assert Path("found/token_frequencies.png").is_file()


def test_reconstructions_are_measured_logged_and_compared(
    evaluate: Call, digits: Path, tokenizer: Path
) -> None:
    run = tracking.Run(Path("home"), stage="tokenizer", run_name="t")
    run.close()
    flags = ("--model_dir", tokenizer, "--path_to_data", digits / "test.csv", "--device", "cpu")
    taught = ("--features", "classifier", "--path_to_train", digits / "train.csv")
    for folder in ("first", "second"):
        evaluate(
            *("reconstructions", *flags, *taught, "--output_dir", folder, "--run_id", run.run_id)
        )
    record = read("first/reconstructions.json")
    assert 0 < value(record, "mse") < 1
    assert value(record, "rfd_classifier") > 0
    assert value(record, "real_label_agreement") > value(record, "label_agreement")
    assert value(record, "bits_per_pixel") == 4 * 16 / 64
    assert set(record["by_label"]) == set("0123456789")
    with Path("first/reconstructions.csv").open(newline="") as file:
        errors = [float(row["mse"]) for row in csv.DictReader(file)]
    assert sum(errors) / 200 == pytest.approx(value(record, "mse"), rel=1e-4)

    compared = evaluate("--compare", "first", "second")
    assert "larger" not in compared
    assert compared.count("within the noise") == len(record["figures"])
    assert compared == evaluate("--compare", run.run_id, "second/reconstructions.json")
    lines = Path("second/reconstructions.csv").read_text().splitlines()
    better = [lines[0]]
    for line in lines[1:]:
        cells = line.split(",")
        cells[2] = str(float(cells[2]) * 0.99)  # a little, but in every image
        better.append(",".join(cells))
    Path("second/reconstructions.csv").write_text("\n".join(better) + "\n")
    record["figures"]["mse"]["value"] *= 0.99
    Path("second/reconstructions.json").write_text(json.dumps(record))
    lines = evaluate("--compare", "first", "second").splitlines()
    assert [line.split()[0] for line in lines if "larger" in line] == ["mse"]


# --- what a user can get wrong ------------------------------------------------------------------


def test_samples_come_from_one_place(error_of: Call, digits: Path) -> None:
    flags = ("--path_to_data", digits / "train.csv")
    assert "either --images or --indexes_path" in error_of("evaluate", "samples", *flags)
    indices = ("--indexes_path", "drawn")
    assert "add --model_dir" in error_of("evaluate", "samples", *flags, *indices)


def test_sizes_that_do_not_fit(error_of: Call, digits: Path) -> None:
    write_images(Path("large"), labels="01")
    flags = ("samples", "--images", "large/data.csv", "--path_to_data", digits / "train.csv")
    error = error_of("evaluate", *flags, "--path_to_test", digits / "test.csv")
    assert "8x8" in error
    assert "24x40" in error
    assert "--image_size" in error


def test_too_few_images(error_of: Call, digits: Path, tokenizer: Path) -> None:
    data = write_images(Path("few"), count=1)
    error = error_of(
        "evaluate", "reconstructions", "--model_dir", tokenizer, "--path_to_data", data
    )
    assert "has only 1 of the at least 2 images" in error
    write_images(Path("five"), count=5, size=(8, 8))
    flags = ("samples", "--images", "five/data.csv", "--path_to_data", digits / "train.csv")
    assert "has only 5 of the at least 6 images" in error_of("evaluate", *flags)


def test_labels_where_they_are_needed(error_of: Call, digits: Path) -> None:
    lines = (digits / "train.csv").read_text().splitlines()
    (digits / "bare.csv").write_text("\n".join(line.split(",")[0] for line in lines) + "\n")
    flags = ("samples", "--images", digits / "other.csv", "--path_to_data", digits / "bare.csv")
    error = error_of("evaluate", *flags, "--path_to_test", digits / "test.csv")
    assert "600 of 600 images have no label" in error


def test_runs_that_are_unknown_or_of_another_stage(
    error_of: Call, digits: Path, tokenizer: Path
) -> None:
    flags = (*samples_flags(digits, "other.csv"), "--run_id")
    assert "no MLflow run 'nothing'" in error_of("evaluate", *flags, "nothing")
    run = tracking.Run(Path("home"), stage="tokenizer", run_name="t")
    run.close()
    assert "is that of a tokenizer" in error_of("evaluate", *flags, run.run_id)
    assert "cannot fetch" in error_of("evaluate", "--compare", "nothing", run.run_id)


def test_weights_that_are_not_there(error_of: Call, digits: Path, tokenizer: Path) -> None:
    flags = (*samples_flags(digits, "other.csv"), "--feature_weights", "nowhere.pth")
    assert "belongs to --features" in error_of("evaluate", *flags)
    assert "no weights" in error_of("evaluate", *flags, "--features", "inception")
    flags = ("--model_dir", tokenizer, "--path_to_data", digits / "test.csv")
    error = error_of(
        "evaluate", "reconstructions", *flags, "--lpips", "alex", "--lpips_weights", "nowhere.pth"
    )
    assert "LPIPS needs the weights of alex" in error


def test_evaluations_that_cannot_be_compared(error_of: Call, evaluate: Call) -> None:
    Path("empty").mkdir()
    assert "no evaluation at empty" in error_of("evaluate", "--compare", "empty", "empty")
    assert "nothing to do" in error_of("evaluate")
    content = {"figures": {}, "protocol": {"images": 10}}
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "samples.json").write_text(json.dumps(content))
        content["protocol"]["images"] = 20
    assert "images is 10 against 20" in error_of("evaluate", "--compare", "a", "b")
    Path("b/samples.json").write_text("{}")
    assert "is no evaluation" in error_of("evaluate", "--compare", "a", "b")
