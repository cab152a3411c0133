"""evaluate.py reconstructions, samples and --compare, on scikit-learn's digits."""

import csv
import importlib
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_images
from tests.test_transformer_generation import call
from utils import addresses, provenance, tracking
from utils.data.images import ImageDataset
from utils.data.indices import IndicesMeta, write_indices
from utils.data.sources import Row
from utils.evaluation import features, metrics, report
from utils.evaluation.inputs import PixelImages
from utils.files import sha256, write_folder
from utils.provenance import Provenance, Split, Stage, model_files
from vqvae import VQVAE, VQVAEConfig

Call = Callable[..., str]
CODES, GRID = 16, (4, 4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A short training of each classifier, once for all tests, and few resamples."""
    monkeypatch.setattr(features, "TRAINING_IMAGES", 4000)
    monkeypatch.setattr(features, "CACHE", cache)
    monkeypatch.setattr(metrics, "FRECHET_REPLICATES", 10)


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer of digits that nobody trained."""
    torch.manual_seed(0)
    sizes = {"channels": 8, "codebook_size": CODES, "codebook_dim": 4, "patch_size": 2}
    model = VQVAE(VQVAEConfig.create(image_size=(8, 8), in_channels=1, **sizes))
    write_folder(folder / "tokenizer", model_files(model, Provenance()))
    return folder / "tokenizer"


@pytest.fixture
def tokenizer(own_folder: Path) -> Path:
    return make_tokenizer(own_folder)


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def value(record: dict, key: str) -> float:
    return record["metrics"][key]["value"]


def samples_flags(digits: Path, images: str) -> tuple[object, ...]:
    return (
        *("samples", "--images", digits / images, "--path_to_data", digits / "train.csv"),
        *("--path_to_test", digits / "test.csv", "--device", "cpu"),
    )


def test_real_images_as_samples_are_as_good_as_real_ones(evaluate: Call, digits: Path) -> None:
    printed = evaluate(*samples_flags(digits, "other.csv"), "--output_dir", "real")
    record = read("real/samples.json")
    fd, real = record["metrics"]["fd_classifier"], record["metrics"]["real_fd_classifier"]
    assert fd["low"] < real["high"]
    assert real["low"] < fd["high"]
    assert value(record, "label_agreement") > 0.9
    assert value(record, "copies_pixels") <= value(record, "real_copies_pixels") + 0.03
    assert value(record, "precision") > 0.5
    assert "fd_classifier" in printed
    assert "fid" not in printed
    with Path("real/samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == record["protocol"]["images"] == 150
    assert rows[0]["nearest_in_pixels"].startswith("digits/")
    right = sum(row["classified_as"] == row["label"] for row in rows) / 150
    assert right == pytest.approx(value(record, "label_agreement"))
    wanted = {"path_to_data_sha256", "network_sha256", "seed", "versions", "features", "size"}
    assert wanted <= set(record["protocol"])
    assert Path("real/closest_pairs_pixels.png").is_file()


def test_copies_of_training_images_are_called_so(evaluate: Call, digits: Path) -> None:
    evaluate(*samples_flags(digits, "train.csv"), "--output_dir", "copied")
    record = read("copied/samples.json")
    assert value(record, "copies_pixels") == value(record, "copies_features") == 1
    assert value(record, "real_copies_pixels") < 0.05
    assert value(record, "nearest_pixels") == 0
    assert value(record, "precision") > value(record, "real_precision") - 0.1


def test_indices_are_decoded_and_their_tokens_compared(
    evaluate: Call, digits: Path, tokenizer: Path
) -> None:
    digest = sha256(tokenizer / "model.safetensors")
    rows = [Row(f"{n}.png", str(n % 10), "") for n in range(40)]
    meta = IndicesMeta(CODES, GRID, tokenizer_sha256=digest)
    write_indices("sampled", torch.randint(CODES, (40, *GRID)), rows, meta)
    evaluate(
        *("samples", "--indexes_path", "sampled", "--model_dir", tokenizer, "--device", "cpu"),
        *("--path_to_data", digits / "digits.csv", "--output_dir", "found"),
    )
    record = read("found/samples.json")
    assert value(record, "token_divergence") > value(record, "real_token_divergence") >= 0
    assert value(record, "fd_classifier") > 3 * value(record, "real_fd_classifier")
    # The tokenizer, which nobody trained, costs most of it.
    assert value(record, "reconstructed_fd_classifier") > 3 * value(record, "real_fd_classifier")
    assert value(record, "reconstructed_label_agreement") < value(record, "real_label_agreement")


@pytest.mark.usefixtures("store")
def test_reconstructions_are_measured_logged_and_compared(
    evaluate: Call, digits: Path, tokenizer: Path
) -> None:
    run = tracking.Run(Path("home"), stage="tokenizer", run_name="t")
    run.close()
    flags = ("--model_dir", tokenizer, "--path_to_data", digits / "test.csv", "--device", "cpu")
    trained = ("--features", "classifier", "--path_to_train", digits / "train.csv")
    for folder in ("first", "second"):
        evaluate(
            *("reconstructions", *flags, *trained, "--output_dir", folder, "--run_id", run.run_id)
        )
    record = read("first/reconstructions.json")
    assert 0 < value(record, "mse") < 1
    assert value(record, "rfd_classifier") > 0
    assert value(record, "real_label_agreement") > value(record, "label_agreement")
    assert value(record, "bits_per_pixel") == 4 * 16 / 64
    with Path("first/reconstructions.csv").open(newline="") as file:
        errors = [float(row["mse"]) for row in csv.DictReader(file)]
    assert sum(errors) / 200 == pytest.approx(value(record, "mse"), rel=1e-4)

    compared = evaluate("--compare", "first", "second")
    assert "larger" not in compared
    assert compared.count("within the noise") == len(record["metrics"])
    assert compared == evaluate("--compare", run.run_id, "second/reconstructions.json")
    lines = Path("second/reconstructions.csv").read_text().splitlines()
    better = [lines[0]]
    for line in lines[1:]:
        fields = line.split(",")
        fields[2] = str(float(fields[2]) * 0.99)  # a little, but in every image
        better.append(",".join(fields))
    Path("second/reconstructions.csv").write_text("\n".join(better) + "\n")
    record["metrics"]["mse"]["value"] *= 0.99
    Path("second/reconstructions.json").write_text(json.dumps(record))
    lines = evaluate("--compare", "first", "second").splitlines()
    assert [line.split()[0] for line in lines if "larger" in line] == ["mse"]


def test_samples_go_into_an_npz_and_come_back(
    evaluate: Call, digits: Path, tokenizer: Path
) -> None:
    """That of OpenAI's guided-diffusion: its evaluator reads arr_0, (N, H, W, 3)."""
    rows = [Row(f"{n}.png", "", "") for n in range(20)]
    meta = IndicesMeta(CODES, GRID, tokenizer_sha256=sha256(tokenizer / "model.safetensors"))
    write_indices("sampled", torch.randint(CODES, (20, *GRID)), rows, meta)
    call(
        "vqvae.images_from_indexes", "--indexes_path", "sampled", "--model_dir", tokenizer, "--npz"
    )
    with np.load("sampled-images/samples.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]
        pixels = arrays["arr_0"]
    files = (Image.open(f"sampled-images/{number:05}.png") for number in range(20))
    assert np.array_equal(pixels, np.stack([np.asarray(x.convert("RGB")) for x in files]))
    assert (pixels.shape, pixels.dtype) == ((20, 8, 8, 3), np.uint8)
    name = Path("sampled-images/samples.npz").absolute()
    words = (*samples_flags(digits, str(name)), "--model_dir", tokenizer)
    assert "fd_classifier" in evaluate(*words, "--output_dir", "found")
    flags = Namespace(image_size=None, kind="samples")
    record = read("found/samples.json")
    assert record["protocol"]["samples_sha256"] == sha256(name)
    assert record["protocol"]["images"] == 20
    rows = [torch.arange(20)]
    (there,) = ImageDataset("sampled-images/images.csv", channels=1).batches(
        rows, torch.device("cpu")
    )
    (back,) = PixelImages(flags, name, 1).batches(rows, torch.device("cpu"))
    assert torch.equal(there, back)


def test_an_npz_that_holds_no_samples(error_of: Call, digits: Path) -> None:
    good = np.zeros((12, 8, 8, 3), np.uint8)
    np.savez("good.npz", good)
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:-200])
    Path("text.npz").write_text("no archive")
    np.savez("other.npz", mu=good)
    np.savez("float.npz", good / 2)
    np.savez("grey.npz", good[..., 0])
    np.savez("pickle.npz", np.array([{}], dtype=object))
    flags = ("samples", "--path_to_data", digits / "train.csv", "--images")
    for name in ("cut", "text", "other", "float", "grey", "pickle"):
        error = error_of("evaluate", *flags, f"{name}.npz")
        assert f"{name}.npz is not a valid .npz of samples, arr_0 of uint8 (N, H, W, 3)" in error
    error = error_of("evaluate", *flags, "good.npz", "--image_size", 16)
    assert "--image_size cannot be combined with an .npz" in error


def sampled(
    folder: Path, digits: Path, count: int, run_id: str = "", split: Split | None = None
) -> Path:
    """A folder as images_from_indexes.py writes it, of the first digits of other.csv."""
    folder.mkdir(parents=True)
    with (digits / "other.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    lines = ["image_path,label"]
    for number, row in enumerate(rows):
        shutil.copy(digits / row["image_path"], folder / f"{number:05}.png")
        lines.append(f"{number:05}.png,{row['label']}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    chain = (
        Stage("tokenizer", "python t.py", sha256="aa"),
        Stage("gpt", "python g.py", sha256="bb"),
        Stage("samples", "python s.py", run_id=run_id),
    )
    info = provenance.png_info(chain, split) if split else None
    Image.new("L", (8, 8)).save(folder / "grid.png", pnginfo=info)
    return folder


@pytest.mark.usefixtures("store")
def test_evaluations_are_in_the_run_of_the_gpt(evaluate: Call, digits: Path) -> None:
    """Also of samples that are evaluated beside each other, as in the README."""
    run = tracking.Run(Path("outputs/gpt"), stage="gpt", run_name="g", inputs={"data.csv": "ab"})
    run.close()
    for name in ("images", "others"):
        images = sampled(Path("outputs", name), digits, 40, run.run_id, Split(0.1, 0))
        evaluate(*samples_flags(digits, images.resolve()))
    records = [Path(f"outputs/gpt/evaluation/outputs-{name}") for name in ("images", "others")]
    assert all((place / "samples.json").is_file() for place in records)
    for name in ("images", "others"):
        assert (addresses.fetch(f"runs:/{run.run_id}/evaluation/outputs-{name}")).is_dir()
    compared = evaluate("--compare", run.run_id, "outputs/gpt")
    assert compared.startswith("outputs-images/samples\n")
    assert "outputs-others/samples\n" in compared
    protocol = read(records[0] / "samples.json")["protocol"]
    assert (protocol["tokenizer_sha256"], protocol["gpt_sha256"]) == ("aa", "bb")
    assert protocol["training_images"] == 600
    assert protocol["split"] == {"held_out": "path_to_test"}
    assert {"samples_sha256", "network_sha256"} <= protocol.keys()
    assert "torch" in protocol["versions"]


def test_held_out_is_what_the_training_held_out(
    evaluate: Call, error_of: Call, digits: Path, tokenizer: Path
) -> None:
    """Without a word it was sampled by seed 0, whatever the training had seen."""
    flags = ("--path_to_data", digits / "train.csv", "--device", "cpu", "--output_dir", "found")
    images = ("samples", "--images", sampled(Path("told"), digits, 40, split=Split(0.5, 7)))
    evaluate(*images, *flags)
    protocol = read("found/samples.json")["protocol"]
    assert (protocol["split"]["val_fraction"], protocol["split"]["seed"]) == (0.5, 7)
    assert protocol["training_images"] == 300
    images = ("samples", "--images", sampled(Path("untold"), digits, 40))
    error = error_of("evaluate", *images, *flags)
    assert "nothing says which images" in error
    for remedy in ("--path_to_test", "--model_dir", "a column split"):
        assert remedy in error
    evaluate(*images, *flags, "--model_dir", tokenizer)
    assert read("found/samples.json")["protocol"]["split"]["val_fraction"] == 0.1


def test_what_can_be_trained_on_can_be_evaluated(
    evaluate: Call, digits: Path, tokenizer: Path
) -> None:
    """The flags for odd data sets were missing."""
    data = write_images(Path("outside"), count=8, size=(8, 8))
    Path("inside").mkdir()
    lines = [line if not n else f"../outside/{line}" for n, line in enumerate(data.open())]
    Path("inside/data.csv").write_text("".join(lines) + "broken.png,a\n")
    Path("inside/broken.png").write_text("no picture")
    flags = ("--model_dir", tokenizer, "--path_to_data", "inside/data.csv", "--device", "cpu")
    odd = ("--allow_outside_paths", "--skip_bad_images", 1, "--num_workers", 0)
    evaluate("reconstructions", *flags, *odd, "--max_pixels", 64)
    place = Path("outputs/tokenizer/evaluation/inside-data")
    assert read(place / "reconstructions.json")["protocol"]["images"] == 8
    assert "broken.png" in (place / "skipped-path_to_data.csv").read_text()


def some_of(digits: Path, name: str, first: int, counts: dict[str, int]) -> Path:
    """A CSV of so many digits of each label, starting with the first-th of each."""
    with (digits / "digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["image_path,label"]
    for label, count in counts.items():
        own = [row["image_path"] for row in rows if row["label"] == label]
        lines += [f"{path},{label}" for path in own[first : first + count]]
    (digits / name).write_text("\n".join(lines) + "\n")
    return digits / name


@pytest.mark.parametrize(
    ("samples", "warned"),
    [({"0": 30, "1": 30}, True), ({"0": 54, "1": 6}, False), ({"1": 60}, True)],
)
def test_another_mix_of_classes_is_named(
    capfd: pytest.CaptureFixture, digits: Path, samples: dict, warned: bool
) -> None:
    """It raised the distance of real images, which then looked like bad samples."""
    some_of(digits, "uneven.csv", 0, {"0": 90, "1": 10})
    some_of(digits, "uneven-test.csv", 90, {"0": 45, "1": 5})
    flags = ("samples", "--images", some_of(digits, "mix.csv", 60, samples), "--device", "cpu")
    flags = (*flags, "--path_to_data", digits / "uneven.csv", "--output_dir", "found")
    module = importlib.import_module("evaluate")
    words = map(str, (*flags, "--path_to_test", digits / "uneven-test.csv"))
    module.main(module.make_parser().parse_args(list(words)))
    mix = read("found/samples.json")["protocol"]["class_mix"]
    share = samples.get("0", 0) / sum(samples.values())
    assert mix["0"] == pytest.approx([share, 0.9])
    said = capfd.readouterr().err
    assert ("have other shares of classes" in said) == warned
    if warned:
        assert f"0 {share:.0%} against 90%" in said
        assert "more)" not in said  # of two classes, both are named


@pytest.mark.usefixtures("store")
def test_metrics_have_the_same_keys_in_every_run(evaluate: Call, digits: Path) -> None:
    """They were named after folders, so that no column compared two runs."""
    import mlflow

    found = []
    for name in ("first", "second"):
        run = tracking.Run(Path("outputs", name), stage="gpt", run_name=name, inputs={"d.csv": ""})
        run.close()
        images = sampled(Path("outputs", f"{name}-images"), digits, 40, run.run_id, Split(0.1, 0))
        evaluate(*samples_flags(digits, images.resolve()))
        found.append(mlflow.get_run(run.run_id).data.metrics)
    keys = [{key for key in metrics if not key.startswith("system/")} for metrics in found]
    assert keys[0] == keys[1]
    assert {"test/fd_classifier", "test/real_fd_classifier", "test/precision"} <= keys[0]


def test_two_tables_of_one_name_stay_apart(evaluate: Call, digits: Path, tokenizer: Path) -> None:
    """The second evaluation took the place of the first."""
    for folder in ("cats", "dogs"):
        data = write_images(Path(folder), count=6, size=(8, 8))
        evaluate("reconstructions", "--model_dir", tokenizer, "--path_to_data", data)
    found = {path.parent.name for path in Path("outputs").rglob("reconstructions.json")}
    assert found == {"cats-data", "dogs-data"}


def test_a_classifier_says_how_good_it_is_on_images_that_did_not_teach_it(
    evaluate: Call, digits: Path, tokenizer: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ("reconstructions", "--model_dir", tokenizer, "--path_to_data", digits / "test.csv")
    flags = (*flags, "--device", "cpu", "--features", "classifier", "--output_dir", "found")
    for same in ((), ("--path_to_train", digits / "test.csv")):
        printed = evaluate(*flags, *same)
        assert "classifier: trained on these very images" in printed
        assert "label_agreement" not in read("found/reconstructions.json")["metrics"]
    for _ in range(2):  # the second time from the cache
        printed = evaluate(*flags, "--path_to_train", digits / "train.csv")
        share = read("found/reconstructions.json")["metrics"]["real_label_agreement"]["value"]
        said = f"classifier: {share:.1%} of the labels of 200 held-out images right"
        assert said in printed
    assert "held-out images right" in evaluate(*samples_flags(digits, "other.csv"))


def test_too_few_images_for_a_frechet_distance(
    evaluate: Call, digits: Path, capsys: pytest.CaptureFixture
) -> None:
    images = sampled(Path("few"), digits, 40)
    module = importlib.import_module("evaluate")
    words = map(str, samples_flags(digits, images.resolve()))
    module.main(module.make_parser().parse_args([*words, "--num_workers", "0"]))
    said = capsys.readouterr().err.splitlines()
    warnings = [line for line in said if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "40 images by the 128 features of classifier is mostly noise" in warnings[0]
    figures = read("evaluation/" + report.name_of(images) + "/samples.json")["metrics"]
    for key, one in figures.items():
        if "kd_" not in key:
            assert one["low"] >= 0, key
        if key.removeprefix("real_") in ("precision", "recall", "coverage", "label_agreement"):
            assert one["high"] <= 1, key
