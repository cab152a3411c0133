"""Two evaluations side by side: is the difference larger than the noise?"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import cli
from utils.checkpoint import read_json
from utils.evaluation.bootstrap import WIDTH
from utils.evaluation.record import NAMES, title

# What must be equal where figures are compared.
COMPARED = (
    *("images", "size", "channels", "path_to_data_sha256", "path_to_test_sha256"),
    *("features", "network_sha256", "seed"),
)
PAIRED = {"mse", "ssim", "lpips", "bits_per_token"}  # figures of real images, one by one


def find(path: Path) -> dict[str, Path]:
    """The records at a path: a JSON file, or those in a folder or its folder evaluation/.

    Raises:
        UserError: there is none.
    """
    files = [path] if path.suffix == ".json" else []
    files += [folder / f"{name}.json" for folder in (path, path / "evaluation") for name in NAMES]
    found = {file.stem: file for file in reversed(files) if file.is_file()}
    if not found:
        raise cli.UserError(
            f"no evaluation at {path}; give a JSON of evaluate.py, its folder, or the id of a run "
            "that was evaluated"
        )
    return found


def compare_all(first: dict[str, Path], second: dict[str, Path]) -> str:
    """`compare` of all records that both have, by name.

    Raises:
        UserError: they have none in common, or see `compare`.
    """
    common = [name for name in first if name in second]
    if not common:
        raise cli.UserError(
            f"nothing to compare: there are {', '.join(first)} here, and {', '.join(second)} there"
        )
    return "\n".join(f"{name}\n{compare(first[name], second[name])}" for name in common)


def compare(first: Path, second: Path) -> str:
    """Both records side by side, and whether each difference is larger than the noise.

    Where both evaluated the same images one by one, the difference is taken image by image.

    Raises:
        UserError: what they did not have in common makes them not comparable.
    """
    records = [read_json(path) for path in (first, second)]
    try:
        _refuse_other_protocols(*(record["protocol"] for record in records))
        figures = [
            {key: (one["value"], one["standard_error"]) for key, one in record["figures"].items()}
            for record in records
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise cli.UserError(f"{first} or {second} is no evaluation of evaluate.py") from error
    by_image = [_by_image(path.with_suffix(".csv")) for path in (first, second)]
    lines = [f"{'':>28}  {'A':>10} {'B':>10} {'B - A':>10} {'+-':>10}"]
    for key in (key for key in figures[0] if key in figures[1]):
        (a, error_a), (b, error_b) = figures[0][key], figures[1][key]
        noise = math.hypot(error_a, error_b)
        values, others = (part.get(key, {}) for part in by_image)
        if values and values.keys() == others.keys():
            noise = _error_of_mean([others[image] - value for image, value in values.items()])
        noise *= WIDTH
        verdict = "larger than the noise" if abs(b - a) > noise else "within the noise"
        numbers = f"{a:10.5g} {b:10.5g} {b - a:10.3g} {noise:10.3g}"
        lines.append(f"{title(key):>28}  {numbers}  {verdict}")
    return "\n".join(lines)


def _refuse_other_protocols(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    for key in COMPARED:
        if first.get(key) != second.get(key):
            raise cli.UserError(
                f"these evaluations cannot be compared: {key} is {first.get(key)} against "
                f"{second.get(key)}; evaluate both by one protocol"
            )


def _by_image(path: Path) -> dict[str, dict[str, float]]:
    """The columns of a record's CSV that are called as a figure: a number for each image path."""
    if not path.is_file():
        return {}
    columns: dict[str, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for key in row.keys() & PAIRED:
                columns.setdefault(key, {})[row["image_path"]] = float(row[key])
    return columns


def _error_of_mean(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
