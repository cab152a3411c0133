"""Flags and data that evaluate.py refuses, each in one line."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from tests.conftest import write_images
from tests.test_evaluate import Call, make_tokenizer, samples_flags
from utils import tracking


@pytest.fixture
def tokenizer(own_folder: Path) -> Path:
    return make_tokenizer(own_folder)


def test_samples_come_from_one_place(error_of: Call, digits: Path) -> None:
    flags = ("--path_to_data", digits / "train.csv")
    assert "either --images or --indexes_path" in error_of("evaluate", "samples", *flags)
    indices = ("--indexes_path", "sampled")
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
    assert "has only 1 images; give 2 or more" in error
    write_images(Path("five"), count=5, size=(8, 8))
    flags = ("samples", "--images", "five/data.csv", "--path_to_data", digits / "train.csv")
    assert "has only 5 images; give 6 or more" in error_of("evaluate", *flags)


def test_labels_where_they_are_needed(error_of: Call, digits: Path) -> None:
    lines = (digits / "train.csv").read_text().splitlines()
    (digits / "bare.csv").write_text("\n".join(line.split(",")[0] for line in lines) + "\n")
    flags = ("samples", "--images", digits / "other.csv", "--path_to_data", digits / "bare.csv")
    error = error_of("evaluate", *flags, "--path_to_test", digits / "test.csv")
    assert "needs a class for every image" in error


@pytest.mark.usefixtures("store")
def test_runs_that_are_unknown_or_of_another_stage(error_of: Call, digits: Path) -> None:
    flags = (*samples_flags(digits, "other.csv"), "--run_id")
    assert "no MLflow run 'nothing'" in error_of("evaluate", *flags, "nothing")
    run = tracking.Run(Path("home"), stage="tokenizer", run_name="t")
    run.close()
    assert "is that of a tokenizer" in error_of("evaluate", *flags, run.run_id)
    assert "cannot fetch" in error_of("evaluate", "--compare", "nothing", run.run_id)


def test_weights_that_are_not_there(error_of: Call, digits: Path, tokenizer: Path) -> None:
    flags = (*samples_flags(digits, "other.csv"), "--feature_weights", "nowhere.pth")
    assert "--feature_weights needs --features" in error_of("evaluate", *flags)
    assert "cannot use nowhere.pth" in error_of("evaluate", *flags, "--features", "inception")
    flags = ("--model_dir", tokenizer, "--path_to_data", digits / "test.csv")
    error = error_of(
        "evaluate", "reconstructions", *flags, "--lpips", "alex", "--lpips_weights", "nowhere.pth"
    )
    assert "LPIPS needs the weights of alex" in error


def test_evaluations_that_cannot_be_compared(error_of: Call, evaluate: Call) -> None:
    Path("empty").mkdir()
    assert "no evaluation at empty" in error_of("evaluate", "--compare", "empty", "empty")
    assert "nothing to do" in error_of("evaluate")
    content = {"metrics": {}, "protocol": {"images": 10}}
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "samples.json").write_text(json.dumps(content))
        content["protocol"]["images"] = 20
    assert "images is 10 against 20" in error_of("evaluate", "--compare", "a", "b")
    Path("b/samples.json").write_text("{}")
    assert "is not a valid evaluation" in error_of("evaluate", "--compare", "a", "b")


def test_flags_that_would_be_ignored(error_of: Call, digits: Path, tokenizer: Path) -> None:
    """They were, without a word."""
    flags = ("reconstructions", "--model_dir", tokenizer, "--path_to_data", digits / "test.csv")
    error = error_of("evaluate", *flags, "--lpips_weights", "x.pth")
    assert "--lpips_weights belongs to --lpips" in error
    for others in ((), ("--features", "inception")):
        error = error_of("evaluate", *flags, *others, "--path_to_train", digits / "train.csv")
        assert "--path_to_train belongs to --features classifier" in error
    error = error_of("evaluate", "--compare", "a", "b", *flags)
    assert "--compare reads two evaluations and makes none" in error
    flags = ("samples", "--path_to_data", digits / "train.csv", "--model_dir", tokenizer)
    error = error_of("evaluate", *flags, "--indexes_path", "sampled", "--image_size", 8)
    assert "--image_size cannot be combined with --indexes_path" in error


def test_the_flag_that_names_what_is_not_there(
    error_of: Call, digits: Path, tokenizer: Path
) -> None:
    """It was always --path_to_data that was blamed."""
    flags = ("samples", "--path_to_data", digits / "train.csv", "--images")
    Path("empty").mkdir()
    for wrong in ("outputs/nowhere", "empty"):
        error = error_of("evaluate", *flags, wrong)
        assert f"no images at {wrong}; --images takes" in error
    error = error_of("evaluate", *flags, digits / "other.csv", "--path_to_test", "no.csv")
    assert "no such CSV file: no.csv; --path_to_test takes" in error
    flags = ("reconstructions", "--model_dir", tokenizer, "--path_to_data")
    trained = ("--features", "classifier", "--path_to_train", "no.csv")
    error = error_of("evaluate", *flags, digits / "test.csv", *trained)
    assert "no such CSV file: no.csv; --path_to_train takes" in error
    assert "no.csv; --path_to_data takes" in error_of("evaluate", *flags, "no.csv")


def test_weights_of_lpips_that_are_of_another_network(
    error_of: Call, digits: Path, tokenizer: Path
) -> None:
    pytest.importorskip("lpips")
    torch.save({"features.0.weight": torch.zeros(3)}, "other.pth")
    flags = ("reconstructions", "--model_dir", tokenizer, "--path_to_data", digits / "test.csv")
    error = error_of("evaluate", *flags, "--lpips", "alex", "--lpips_weights", "other.pth")
    assert "LPIPS needs the weights of alex, which other.pth does not hold" in error
    assert error.endswith("pass its path as lpips_weights, or do without LPIPS")


def test_debug_stands_before_or_after_the_subcommand_and_nothing_is_abbreviated(
    capsys: pytest.CaptureFixture,
) -> None:
    parser = importlib.import_module("evaluate").make_parser()
    flags = ["reconstructions", "--model_dir", "t", "--path_to_data", "d.csv"]
    assert parser.parse_args(["--debug", *flags]).debug
    assert parser.parse_args([*flags, "--debug"]).debug
    assert not parser.parse_args(flags).debug
    with pytest.raises(SystemExit):
        parser.parse_args([*flags, "--feat", "classifier"])
    assert "unrecognized arguments: --feat" in capsys.readouterr().err
