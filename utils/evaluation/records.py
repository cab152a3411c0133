"""Records of evaluations: a protocol, metrics and pictures; written, logged, found and compared."""

import argparse
import contextlib
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from utils import addresses, cli
from utils.cli import UserError
from utils.data.images import ImageDataset
from utils.evaluation.distances import title
from utils.evaluation.metrics import IMAGE_METRICS, REPLICATES, WIDTH, Estimate
from utils.files import TABLE_BYTES, check_size, read_json, sha256

KINDS = ("reconstructions", "samples", "likelihood")
FOLDER = "evaluation"  # in an output folder, and in MLflow
PACKAGES = (
    *("torch", "torchvision", "numpy", "pillow", "mlflow"),
    *("torch-fidelity", "transformers", "lpips"),
)
# What must be equal where metrics are compared.
COMPARED = (
    *("images", "size", "channels", "path_to_data_sha256", "path_to_test_sha256", "split"),
    *("training_images", "features", "network_sha256", "seed", "unconditional"),
)
PAIRED = {*IMAGE_METRICS, "lpips", "bits_per_token", "bits_per_pixel"}  # of single images


@dataclass(frozen=True)
class Record:
    """The result of an evaluation."""

    metrics: Mapping[str, Estimate]
    protocol: Mapping[str, Any]  # how they were measured
    rows: Mapping[str, Sequence[Any]]  # columns of the table with a line for each image
    pictures: Mapping[str, Image.Image]
    by_label: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    def write(self, folder: Path, kind: str) -> list[Path]:
        """Print the metrics; write <kind>.json, <kind>.csv and a PNG file for each picture."""
        import pandas

        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "metrics": _plain(self.metrics),
            "by_label": {label: _plain(part) for label, part in self.by_label.items()},
            "protocol": dict(self.protocol),
            "made_by": cli.command_line(),
        }
        files = [folder / f"{kind}.json", folder / f"{kind}.csv"]
        files[0].write_text(json.dumps(content, indent=2) + "\n")
        table = pandas.DataFrame(self.rows)
        table.to_csv(files[1], index=False, float_format="%.6g", na_rep="nan")
        for key, picture in self.pictures.items():
            files.append(folder / f"{key}.png")
            picture.save(files[-1])
        print(f"{'':>28}  {'value':>10}   95 % interval")
        for key, metric in self.metrics.items():
            low, high = metric.interval
            print(f"{title(key):>28}  {metric.value:10.5g}   {low:.5g} to {high:.5g}")
        print(f"written to {folder}: {', '.join(file.name for file in files)}")
        return files

    def save(self, run: Any, kind: str, name: str) -> None:
        """`write` to the output folder of a tracking run, and log all of it to evaluation/<name>.

        `kind` is one of `KINDS`, `name` that of `name_of`.
        """
        section = f"{FOLDER}/{name}"
        for file in self.write(run.output_dir, kind):
            run.file(file, section)
        run.metrics(section, {key: metric.value for key, metric in self.metrics.items()}, 0)
        for key, picture in self.pictures.items():
            run.picture(f"{section}/{key}", picture, 0)


def _plain(found: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    names = ("value", "low", "high", "standard_error")
    return {
        key: dict(zip(names, (one.value, *one.interval, one.standard_error), strict=True))
        for key, one in found.items()
    }


def name_of(path: Path) -> str:
    """The name of the evaluation on a CSV or a folder: its parent folder and its own name.

    So `train.csv` of two data sets stay apart, in files as well as in MLflow.
    """
    path = path.resolve()
    parts = path.parent.name, path.stem if path.suffix == ".csv" else path.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(filter(None, parts)))


def protocol(
    flags: argparse.Namespace, dataset: ImageDataset, device: torch.device
) -> dict[str, Any]:
    """How all metrics of an evaluation are measured; `flags` name its CSVs and the seed."""
    values: dict[str, Any] = {
        "size": list(dataset.size),
        "channels": dataset.channels,
        "preprocessing": "resized to cover the size, cut in the middle, values to [-1, 1]",
    }
    for name in ("path_to_data", "path_to_test", "path_to_train"):
        path = getattr(flags, name, None)
        if path:
            values |= {name: path, f"{name}_sha256": sha256(Path(path))}
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return values | {
        "seed": flags.seed,
        "device": device.type,
        "interval": f"value +- {WIDTH} standard errors of {REPLICATES} bootstrap resamples, cut "
        "at the bounds of the metric",
        "versions": versions,
    }


# --- two records compared -----------------------------------------------------------------------


class Evaluation(NamedTuple):
    """A record that was read from disk: value and standard error of each metric, and its protocol.

    `by_image` has the metrics of single images by name: image_path, label and value, sorted.
    """

    metrics: dict[str, tuple[float, float]]
    protocol: Mapping[str, Any]
    by_image: dict[str, list[tuple[str, str, float]]]


def find(place: str) -> dict[str, Path]:
    """The records of a JSON file, a folder or its evaluation/, or an MLflow run by its id.

    Returns the files by `<name>/<kind>` where each evaluation has its own folder, else by kind.

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
            # Only there: a training has a folder of tables, one of them of the same name.
            parts = sorted(home.glob(f"*/{kind}.json")) if home.name == FOLDER else []
            for file in (home / f"{kind}.json", *parts):
                if file.is_file():
                    found.setdefault(str(file.relative_to(home).with_suffix("")), file)
    if not found:
        raise UserError(
            f"no evaluation at {place}; give a JSON of evaluate.py, its folder, or the id of an "
            "evaluated run"
        )
    return found


def compare_all(first: dict[str, Path], second: dict[str, Path]) -> str:
    """`compare` all records that both have by one name, or else the only ones of a kind.

    Raises:
        UserError: they have none in common, or see `compare`.
    """
    common = {name: (first[name], second[name]) for name in first if name in second}
    if not common:
        for kind in KINDS:
            pair = [[f for f in part.values() if f.stem == kind] for part in (first, second)]
            if len(pair[0]) == len(pair[1]) == 1:
                common[kind] = pair[0][0], pair[1][0]
    if not common:
        raise UserError(
            f"nothing to compare: there are {', '.join(first)} here, and {', '.join(second)} there"
        )
    return "\n".join(f"{name}\n{compare(*pair)}" for name, pair in common.items())


def compare(first: Path, second: Path) -> str:
    """Both records side by side, and whether each difference is larger than the noise.

    Where both evaluated the same images one by one, the difference is taken image by image.

    Raises:
        UserError: their protocols differ, or see `read`.
    """
    one, other = read(first), read(second)
    # Bits are per token of one tokenizer.
    needed = (*COMPARED, *(("tokenizer_sha256",) if "unconditional" in one.protocol else ()))
    for key in needed:
        a, b = one.protocol.get(key), other.protocol.get(key)
        if a != b:
            raise UserError(
                f"these evaluations cannot be compared: {key} is {a} against {b}; evaluate both by "
                "one protocol"
            )
    lines = [f"{'':>28}  {'A':>10} {'B':>10} {'B - A':>10} {'+-':>10}"]
    for key in (key for key in one.metrics if key in other.metrics):
        a, b = one.metrics[key][0], other.metrics[key][0]
        if key == "lpips" and one.protocol.get("lpips") != other.protocol.get("lpips"):
            lines.append(f"{title(key):>28}  {a:10.5g} {b:10.5g}  not comparable: other networks")
            continue
        noise = WIDTH * _noise(key, one, other)
        verdict = "larger than the noise" if abs(b - a) > noise else "within the noise"
        numbers = f"{a:10.5g} {b:10.5g} {b - a:10.3g} {noise:10.3g}"
        lines.append(f"{title(key):>28}  {numbers}  {verdict}")
    return "\n".join(lines)


def _noise(key: str, one: Evaluation, other: Evaluation) -> float:
    """The standard error of the difference of a metric."""
    if key == "psnr" and "mse" in one.metrics and "mse" in other.metrics:
        # A function of the MSE, with its noise: along the line between the two.
        (a, b), (x, y) = ([part.metrics[k][0] for part in (one, other)] for k in ("psnr", "mse"))
        slope = (b - a) / (y - x) if x != y else 10 / math.log(10) / max(x, 1e-20)
        return abs(slope) * _noise("mse", one, other)
    values, others = one.by_image.get(key, []), other.by_image.get(key, [])
    if len(values) > 1 and [row[:2] for row in values] == [row[:2] for row in others]:
        differences = [b[2] - a[2] for a, b in zip(values, others, strict=True)]
        return float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return math.hypot(one.metrics[key][1], other.metrics[key][1])


def read(path: Path) -> Evaluation:
    """A JSON file of evaluate.py, and the CSV beside it if there is one.

    Raises:
        UserError: the files hold something else, or are damaged.
    """
    import pandas

    record, table = read_json(path), path.with_suffix(".csv")
    try:
        found = {
            key: (_finite(one["value"]), _finite(one["standard_error"]))
            for key, one in record["metrics"].items()
        }
        protocol = dict(record["protocol"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a valid evaluation of evaluate.py: {error}") from error
    if not table.is_file():
        return Evaluation(found, protocol, {})
    try:
        check_size(table, TABLE_BYTES)
        rows = pandas.read_csv(table, dtype=str, keep_default_na=False, index_col=False)
        by_image = {
            key: sorted(
                (path, label, _finite(float(value)))
                for path, label, value in rows[["image_path", "label", key]].itertuples(index=False)
            )
            for key in PAIRED.intersection(rows.columns)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{table} is damaged: {error}; evaluate again") from error
    return Evaluation(found, protocol, by_image)


def _finite(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: the value is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.80} is not a finite number")
    return float(value)
