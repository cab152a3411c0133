"""The classifier of a data set, and the features of images in it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from utils.cli import UserError
from utils.data import download
from utils.data.images import ImageConfig, ImageDataset
from utils.data.sources import Row, split_rows
from utils.evaluation import distances, features
from utils.evaluation.features import (
    DecodedImages,
    ImageSet,
    Settings,
    extract_features,
    train_classifier,
)
from utils.evaluation.metrics import frechet_distance, resample

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, 128, 0)


def fake(channels: int) -> Any:
    """A tokenizer whose grids of indices are the images."""
    config = SimpleNamespace(in_channels=channels, downsampling=1)
    return SimpleNamespace(decode=lambda grids: grids[:, None].float(), config=config)


def target_of(names: tuple[str, ...], rows: list[Row]) -> torch.Tensor | None:
    network = features.FeatureNetwork("classifier", torch.nn.Identity(), "", names)
    return features.class_targets(network, rows, "samples.csv")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    folder = tmp_path_factory.mktemp("digits")
    download.write_images(folder, "digits", download.digits())
    return ImageDataset(folder / "digits.csv", ImageConfig(num_workers=0))


def test_it_learns_digits_and_real_halves_are_near(
    digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small distance between halves, within whose interval another sample of halves lies."""
    monkeypatch.setattr(features, "TRAINING_IMAGES", 12_000)
    train, held_out = split_rows(digits.rows, val_fraction=0.1, seed=0)
    before = torch.get_rng_state()
    network = train_classifier(ImageSet(digits, train), "digits", SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    seen = extract_features(network, ImageSet(digits, held_out), SETTINGS, "held out")
    assert seen.features.shape == (len(held_out), 128)
    assert seen.pixels.shape == (len(held_out), 64)
    classes = features.class_targets(network, ImageSet(digits, held_out).rows, "digits")
    weights = resample(len(held_out), 0)
    assert features.label_agreement(seen, classes, weights).value > 0.95

    everything = extract_features(network, ImageSet(digits, train), SETTINGS, "training").features
    values, intervals = [], []
    for trial in range(2):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(trial))
        halves = everything[order[:700]], everything[order[700:1400]]
        pair = resample(700, 0), resample(700, 1)
        found = frechet_distance(*halves, pair)
        values.append(found.value)
        intervals.append(found.interval)
    low, high = intervals[0]
    assert low <= values[1] <= high
    black = torch.full((100, 1, 8, 8), -1.0)
    blank = network.network(black)[0].detach()
    pair = resample(700, 0), resample(100, 1)
    assert values[0] < 0.05 * frechet_distance(everything[:700], blank, pair).value


def test_it_is_kept_and_found_again(digits: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "TRAINING_IMAGES", 256)
    part, other = (ImageSet(digits, torch.arange(count)) for count in (300, 299))
    first = train_classifier(part, "digits", SETTINGS).protocol
    assert len(list(Path("outputs/cache").iterdir())) == 1

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as context:
        context.setattr(features, "fit_classifier", fail)
        assert train_classifier(part, "digits", SETTINGS).protocol == first
    assert train_classifier(part, "digits", SETTINGS._replace(seed=1)).protocol != first
    assert train_classifier(other, "digits", SETTINGS).protocol != first
    assert len(list(Path("outputs/cache").iterdir())) == 3


def test_metrics_are_named_after_the_network() -> None:
    assert distances.key("fd", "classifier") == "fd_classifier"
    assert distances.key("fd", "inception") == "fid"
    assert distances.key("precision", "inception") == "precision"


def test_large_images_are_shrunk() -> None:
    model = features.Classifier(3, 2).eval()
    images = torch.rand(2, 3, 100, 70)
    found, logits = model(images)
    assert (found.shape, logits.shape) == ((2, 128), (2, 2))
    assert features.shrink(images).shape == (2, 3, 32, 22)
    assert torch.equal(model(features.shrink(images))[0], found)


def test_training_ends_when_accuracy_no_longer_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    """It always took 180,000 images."""
    monkeypatch.setattr(features, "CHECK_IMAGES", 256)
    labels = torch.arange(200) % 2  # of black and white images
    images = (255 * labels[:, None, None, None]).expand(-1, 1, 8, 8).to(torch.uint8)
    model = features.Classifier(1, 2)
    used = 0

    def count(_: object, inputs: tuple[torch.Tensor]) -> None:
        nonlocal used
        used += len(inputs[0])

    handle = model.register_forward_pre_hook(count)
    features.fit_classifier(model, images, labels, seed=0)
    assert used < 5000
    handle.remove()
    assert (model.eval()(images / 127.5 - 1)[1].argmax(dim=1) == labels).all()


def test_labels_that_are_missing_single_or_unknown(digits: ImageDataset) -> None:
    rows, grids = digits.rows[:4], torch.zeros(4, 8, 8)
    for labels in (["0", "1", "2", ""], ["0", "0", "0", "0"]):
        labelled = [row._replace(label=label) for row, label in zip(rows, labels, strict=True)]
        images = DecodedImages(grids, labelled, fake(1))
        with pytest.raises(UserError, match="a class for every image, two classes or more"):
            train_classifier(ImageSet.whole(images), "data.csv", SETTINGS)
    with pytest.raises(UserError, match=r"on the labels 0, 1, 2, 3 of samples\.csv"):
        target_of(("8", "9"), rows)
    assert target_of((), rows) is target_of(("8", "9"), [Row("0.png", "", "")]) is None


def test_classes_without_training_images_do_not_count(capsys: pytest.CaptureFixture) -> None:
    rows = [Row(f"{n}.png", label, "") for n, label in enumerate("aab?")]
    targets = target_of(("a", "b"), rows)
    assert targets.tolist() == [0, 0, 1, features.UNKNOWN]
    warning = capsys.readouterr().err
    assert "leaves out 1 of 4 images of samples.csv" in warning
    assert warning.strip().endswith("without training images: ?")
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = features.Features(logits, logits, logits=logits)
    assert features.label_agreement(found, targets, resample(4, 0)).value == pytest.approx(2 / 3)


def test_classes_of_few_training_images_are_named(capsys: pytest.CaptureFixture) -> None:
    rows = [Row(f"{n}.png", "a" if n < 20 else "b", "") for n in range(23)]
    images = DecodedImages(torch.rand(23, 8, 8), rows, fake(1))
    train_classifier(ImageSet.whole(images), "data.csv", SETTINGS)
    assert "fewer than 10 training images" in (warning := capsys.readouterr().err)
    assert "b (3)" in warning
    assert "a (" not in warning


def test_images_that_are_compared_are_new_to_the_classifier(digits: ImageDataset) -> None:
    part = ImageSet(digits, torch.arange(10, 100))
    known, others = features.reserve(part, 20, 0)
    assert len(known.row_numbers) == 20
    together = torch.cat([known.row_numbers, others.row_numbers])
    assert torch.equal(together.sort().values, part.row_numbers)
    assert len(features.reserve(part, 80, 0)[0].row_numbers) == 30  # a third at most
