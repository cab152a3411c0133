"""Two evaluations side by side: is the difference larger than the noise?"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from utils import addresses
from utils.cli import UserError
from utils.evaluation.bootstrap import WIDTH
from utils.evaluation.record import FOLDER, KINDS, title
from utils.files import TABLE_BYTES, check_size, read_json

# What must be equal where figures are compared.
COMPARED = (
    *("images", "size", "channels", "path_to_data_sha256", "path_to_test_sha256", "split"),
    *("training_images", "features", "network_sha256", "seed", "unconditional"),
)
PAIRED = {"mse", "ssim", "lpips", "bits_per_token", "bits_per_pixel"}  # of images one by one

Errors = list[tuple[str, str, float]]  # image_path, label and a figure, sorted


class Evaluation(NamedTuple):
    """A record of evaluate.py as it was read.

    Attributes:
        figures: value and standard error of each.
        protocol: behind them.
        by_image: the figures of single images, by the name of the figure.
    """

    figures: dict[str, tuple[float, float]]
    protocol: Mapping[str, Any]
    by_image: dict[str, Errors]


def find(place: str | Path) -> dict[str, Path]:
    """The records at a place: a JSON file, those of a folder or its evaluation/, or of a run.

    Args:
        place: a path, or the id of an MLflow run.

    Returns:
        the files, by `<name>/<kind>` where each evaluation has a folder of its own, else by kind.

    Raises:
        UserError: there is none.
    """
    path = Path(place)
    if not path.exists():
        path = addresses.fetch(f"runs:/{place}/{FOLDER}")
    if path.suffix == ".json" and path.is_file():
        return {path.stem: path}
    found: dict[str, Path] = {}
    for home in (path, path / FOLDER):
        for kind in KINDS:
            # Only there: the tables of a training lie in a folder, too, and one is called so.
            parts = sorted(home.glob(f"*/{kind}.json")) if home.name == FOLDER else []
            for file in (home / f"{kind}.json", *parts):
                if file.is_file():
                    found.setdefault(str(file.relative_to(home).with_suffix("")), file)
    if not found:
        raise UserError(
            f"no evaluation at {place}; give a JSON of evaluate.py, its folder, or the id of a run "
            "that was evaluated"
        )
    return found


def compare_all(first: dict[str, Path], second: dict[str, Path]) -> str:
    """`compare` of all records that both have by one name, or else of the only ones of a kind.

    Raises:
        UserError: they have none in common, or see `compare`.
    """
    common = {name: (first[name], second[name]) for name in first if name in second}
    if not common:
        for kind in KINDS:
            here, there = (
                [file for file in part.values() if file.stem == kind] for part in (first, second)
            )
            if len(here) == len(there) == 1:
                common[kind] = here[0], there[0]
    if not common:
        raise UserError(
            f"nothing to compare: there are {', '.join(first)} here, and {', '.join(second)} there"
        )
    return "\n".join(f"{name}\n{compare(*pair)}" for name, pair in common.items())


def read(path: Path) -> Evaluation:
    """A JSON file of evaluate.py, and the CSV beside it if there is one.

    Raises:
        UserError: it is something else, or damaged.
    """
    record = read_json(path)
    try:
        protocol, figures = dict(record["protocol"]), record["figures"]
        found = {
            key: (_number(one["value"]), _number(one["standard_error"]))
            for key, one in figures.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no evaluation of evaluate.py, or damaged: {error}") from error
    return Evaluation(found, protocol, _by_image(path.with_suffix(".csv")))


def compare(first: Path, second: Path) -> str:
    """Both records side by side, and whether each difference is larger than the noise.

    Where both evaluated the same images one by one, the difference is taken image by image.

    Raises:
        UserError: what they did not have in common makes them not comparable, or see `read`.
    """
    one, other = read(first), read(second)
    _refuse_other_protocols(one.protocol, other.protocol)
    lines = [f"{'':>28}  {'A':>10} {'B':>10} {'B - A':>10} {'+-':>10}"]
    for key in (key for key in one.figures if key in other.figures):
        a, b = one.figures[key][0], other.figures[key][0]
        if key == "lpips" and one.protocol.get("lpips") != other.protocol.get("lpips"):
            lines.append(f"{title(key):>28}  {a:10.5g} {b:10.5g}  not comparable: other networks")
            continue
        noise = WIDTH * _noise(key, one, other)
        verdict = "larger than the noise" if abs(b - a) > noise else "within the noise"
        numbers = f"{a:10.5g} {b:10.5g} {b - a:10.3g} {noise:10.3g}"
        lines.append(f"{title(key):>28}  {numbers}  {verdict}")
    return "\n".join(lines)


def _noise(key: str, one: Evaluation, other: Evaluation) -> float:
    """The standard error of the difference of a figure."""
    if key == "psnr" and "mse" in one.figures and "mse" in other.figures:
        # It is a function of the MSE, by whose noise it is judged: along the line between the two.
        (a, b), (x, y) = ([part.figures[k][0] for part in (one, other)] for k in ("psnr", "mse"))
        slope = (b - a) / (y - x) if x != y else 10 / math.log(10) / max(x, 1e-20)
        return abs(slope) * _noise("mse", one, other)
    values, others = one.by_image.get(key, []), other.by_image.get(key, [])
    if len(values) > 1 and [row[:2] for row in values] == [row[:2] for row in others]:
        return _error_of_mean([b[2] - a[2] for a, b in zip(values, others, strict=True)])
    return math.hypot(one.figures[key][1], other.figures[key][1])


def _refuse_other_protocols(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    keys = COMPARED
    if "unconditional" in first:  # bits are per token of one tokenizer
        keys = (*keys, "tokenizer_sha256")
    for key in keys:
        if first.get(key) != second.get(key):
            raise UserError(
                f"these evaluations cannot be compared: {key} is {first.get(key)} against "
                f"{second.get(key)}; evaluate both by one protocol"
            )


def _by_image(path: Path) -> dict[str, Errors]:
    """The columns of a record's CSV that are called as a figure of `PAIRED`.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return {}
    columns: dict[str, Errors] = {}
    try:
        check_size(path, TABLE_BYTES)
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for key in row.keys() & PAIRED:
                    number = _number(float(row[key]))
                    columns.setdefault(key, []).append((row["image_path"], row["label"], number))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}; evaluate again") from error
    return {key: sorted(errors) for key, errors in columns.items()}


def _number(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.80} is no number")
    return float(value)


def _error_of_mean(values: list[float]) -> float:
    """The standard error of the mean of two values or more."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
