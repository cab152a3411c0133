"""Two records of evaluate.py side by side, written by hand."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import evaluate
from utils.cli import UserError

PROTOCOL = {"images": 4, "seed": 0}


def write(
    folder: str,
    figures: dict[str, float],
    rows: Sequence[str] = (),
    kind: str = "reconstructions",
    **protocol: Any,
) -> Path:
    """A record whose figures have a standard error of 1; rows are lines of the CSV."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    content = {
        "metrics": {key: {"value": x, "standard_error": 1.0} for key, x in figures.items()},
        "protocol": PROTOCOL | protocol,
    }
    if rows:
        Path(folder, f"{kind}.csv").write_text("\n".join(rows) + "\n")
    path = Path(folder, f"{kind}.json")
    path.write_text(json.dumps(content))
    return path


def verdicts(text: str) -> dict[str, str]:
    """larger, within or not, by the figure."""
    lines = [line.split() for line in text.splitlines()]
    words = ("larger", "within", "not")
    return {line[0]: next(w for w in line if w in words) for line in lines if set(line) & {*words}}


def mse_of(folder: str, errors: list[float], key: str = "mse", turned: bool = False) -> Path:
    rows = [f"{n}.png,,{error}" for n, error in enumerate(errors)]
    mean = sum(errors) / len(errors)
    figures = {key: mean} | ({"psnr": -10 * math.log10(mean)} if key == "mse" else {})
    rows = rows[::-1] if turned else rows
    return write(folder, figures, [f"image_path,label,{key}", *rows])


def test_psnr_has_the_verdict_of_the_mse(own_folder: Path) -> None:
    """MSE was paired and PSNR not, so that they contradicted each other."""
    first = mse_of("a", [0.1, 0.2, 0.3, 0.4])
    for second, verdict in (
        ([0.09, 0.18, 0.28, 0.37], "larger"),
        ([0.1, 0.2, 0.3, 0.41], "within"),
    ):
        found = verdicts(evaluate.compare(first, mse_of("b", second)))
        assert found == {"mse": verdict, "psnr": verdict}
    assert verdicts(evaluate.compare(first, first)) == {"mse": "within", "psnr": "within"}


@pytest.mark.parametrize("key", ["bits_per_pixel", "bits_per_token", "ssim"])
def test_images_are_paired_in_whatever_order_they_stand(own_folder: Path, key: str) -> None:
    """Rankings of likelihood stand in an order of their own; bits per pixel were not paired."""
    first = mse_of("a", [0.1, 0.2, 0.3, 0.4], key)
    second = mse_of("b", [0.09, 0.18, 0.28, 0.37], key, turned=True)
    assert verdicts(evaluate.compare(first, second)) == {key: "larger"}


def test_an_image_that_is_listed_twice_counts_twice(own_folder: Path) -> None:
    rows = ["image_path,label,mse", "0.png,a,0.1", "0.png,a,0.1", "1.png,b,0.2"]
    first = write("a", {"mse": 0.4 / 3}, rows)
    second = write("b", {"mse": 0.43 / 3}, [*rows[:2], "0.png,a,0.13", rows[3]])
    assert "0.0196" in evaluate.compare(first, second)  # 1.96 x 0.03 / sqrt(3) / sqrt(3)


def test_one_image_has_no_pairs(own_folder: Path) -> None:
    """It was a division by zero."""
    first, second = mse_of("a", [0.5]), mse_of("b", [0.1])
    assert verdicts(evaluate.compare(first, second))["mse"] == "within"


def test_what_is_not_a_record(own_folder: Path) -> None:
    path = write("a", {"mse": 0.1})
    for content in ("[]", '{"metrics": [], "protocol": {}}', '{"metrics": {"a": 1}}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"is not a valid evaluation|is not a JSON object"):
            evaluate.compare(path, path)


@pytest.mark.parametrize(
    ("first", "second", "complaint"),
    [
        ({"unconditional": True}, {"unconditional": False}, "unconditional is True against False"),
        ({"split": {"seed": 0}}, {"split": {"seed": 1}}, "split is"),
        ({"training_images": 10}, {"training_images": 20}, "training_images is 10 against 20"),
        (
            {"unconditional": True, "tokenizer_sha256": "a"},
            {"unconditional": True, "tokenizer_sha256": "b"},
            "tokenizer_sha256 is a against b",
        ),
    ],
)
def test_what_is_not_comparable(
    own_folder: Path, first: dict, second: dict, complaint: str
) -> None:
    paths = write("a", {"x": 1.0}, **first), write("b", {"x": 2.0}, **second)
    with pytest.raises(UserError, match=complaint):
        evaluate.compare(*paths)


def test_lpips_of_another_network_alone_is_not_compared(own_folder: Path) -> None:
    figures = {"mse": 0.1, "lpips": 0.2}
    networks = [{"network": name, "sha256": name} for name in ("alex", "vgg")]
    paths = [write(name["network"], figures, lpips=name, tokenizer_sha256="t") for name in networks]
    found = evaluate.compare(*paths)
    assert verdicts(found) == {"mse": "within", "lpips": "not"}
    assert verdicts(evaluate.compare(paths[0], paths[0])) == dict.fromkeys(figures, "within")


def test_evaluations_of_a_home_are_found_by_their_names(
    own_folder: Path, error_of: Callable[..., str]
) -> None:
    for home in ("a", "b"):
        for name in ("mnist-test", "cats-test"):
            write(f"{home}/evaluation/{name}", {"mse": 0.1})
        Path(home, "tables").mkdir()  # of a training
        Path(home, "tables/reconstructions.json").write_text("{}")
    write("a/evaluation/mnist-images", {"fd": 0.1}, kind="samples")
    write("b/evaluation/other-images", {"fd": 0.1}, kind="samples")
    found = [evaluate.find_records(home) for home in ("a", "b")]
    text = evaluate.compare_all(*found)
    assert [line for line in text.splitlines() if "/" in line] == [
        "cats-test/reconstructions",
        "mnist-test/reconstructions",
    ]
    images = [evaluate.find_records(p) for p in ("a/evaluation/mnist-images", "b/evaluation")]
    assert evaluate.compare_all(*images).startswith("samples\n")  # the only ones of the kind
    error = error_of(
        "evaluate", "--compare", "a/evaluation/mnist-images", "b/evaluation/mnist-test"
    )
    assert "nothing to compare: there are samples here, and reconstructions there" in error
