"""The classifier that a data set's own labels teach, and what is seen through it."""

from pathlib import Path

import pytest
import torch

from utils.cli import UserError
from utils.data.images import ImageDataset
from utils.data.table import split_rows
from utils.datasets import write_digits
from utils.evaluation import bootstrap, classifier
from utils.evaluation import sample_quality as quality
from utils.evaluation.distances import frechet_distance
from utils.evaluation.features import look, taught_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return ImageDataset(folder / "digits.csv", num_workers=0)


def test_it_learns_digits_and_real_halves_are_near(
    digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small distance between halves, within whose interval another draw of halves lies."""
    monkeypatch.setattr(classifier, "SEEN", 12_000)
    train, held_out = split_rows(digits.rows, val_fraction=0.1, seed=0)
    before = torch.get_rng_state()
    network = taught_network(digits, train, "digits", CPU, 0)
    assert torch.equal(torch.get_rng_state(), before)
    seen = look(network, digits, held_out, CPU, 64, "held out")
    assert seen.features.shape == (len(held_out), 128)
    assert seen.pixels.shape == (len(held_out), 64)
    classes = classifier.targets(
        [digits.rows[row] for row in held_out.tolist()], network.class_names, "digits"
    )
    weights = bootstrap.resample(len(held_out), 0)
    assert quality.agreement(seen, classes, weights).value > 0.95

    everything = look(network, digits, train, CPU, 256, "training").features
    values, intervals = [], []
    for trial in range(2):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(trial))
        halves = everything[order[:700]], everything[order[700:1400]]
        pair = bootstrap.resample(700, 0), bootstrap.resample(700, 1)
        found = frechet_distance(*halves, pair)
        values.append(found.value)
        intervals.append(found.interval)
    low, high = intervals[0]
    assert low <= values[1] <= high
    black = torch.full((100, 1, 8, 8), -1.0)
    blank = network.network(black)[0].detach()
    pair = bootstrap.resample(700, 0), bootstrap.resample(100, 1)
    assert values[0] < 0.05 * frechet_distance(everything[:700], blank, pair).value


def test_it_is_kept_and_found_again(digits: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "SEEN", 256)
    rows = torch.arange(300)
    first = taught_network(digits, rows, "digits", CPU, 0)
    assert len(list(Path("outputs/cache").iterdir())) == 1

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as context:
        context.setattr(classifier, "train", fail)
        again = taught_network(digits, rows, "digits", CPU, 0)
    assert again.sha256 == first.sha256
    assert taught_network(digits, rows, "digits", CPU, 1).sha256 != first.sha256
    assert taught_network(digits, rows[:299], "digits", CPU, 0).sha256 != first.sha256
    assert len(list(Path("outputs/cache").iterdir())) == 3


def test_figures_are_named_after_the_classifier(digits: ImageDataset) -> None:
    from utils.evaluation.features import FeatureNetwork
    from utils.evaluation.record import title

    keys = FeatureNetwork("classifier", torch.nn.Identity(), "").keys
    assert title(keys["frechet"]) == "FD (classifier)"
    assert title(f"real_{keys['frechet']}") == "real FD (classifier)"
    assert title(f"r{keys['frechet']}") == "rFD (classifier)"
    assert title("fid") == "FID"
    assert title("mse") == "mse"


def test_large_images_are_shrunk(digits: ImageDataset) -> None:
    model = classifier.Classifier(classifier.ClassifierConfig(3, ("a", "b"))).eval()
    features, logits = model(torch.rand(2, 3, 100, 70))
    assert (features.shape, logits.shape) == ((2, 128), (2, 2))


def test_labels_that_are_missing_single_or_unknown(digits: ImageDataset) -> None:
    rows = digits.rows[:4]
    with pytest.raises(UserError, match="1 of 4 images have no label"):
        classifier.class_names([*rows[:3], rows[3]._replace(label="")], "data.csv")
    with pytest.raises(UserError, match="two classes"):
        classifier.class_names([rows[0], rows[0]], "data.csv")
    with pytest.raises(UserError, match=r"the labels 1, 2, 3 of samples\.csv"):
        classifier.targets(rows, ("0", "9"), "samples.csv")
