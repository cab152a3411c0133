"""Records of evaluations: a protocol, metrics and pictures; written, logged, found and compared."""

import argparse
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from utils import addresses, cli
from utils.cli import UserError
from utils.data.images import ImageDataset
from utils.data.sources import digest
from utils.evaluation.distances import title
from utils.evaluation.metrics import IMAGE_METRICS, REPLICATES, WIDTH, Estimate
from utils.files import read_json

KINDS = ("reconstructions", "samples", "likelihood")
FOLDER = "evaluation"  # in an output folder, and in MLflow
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "torch-fidelity", "transformers", "lpips")
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

    def save(self, run: Any, kind: str, name: str) -> None:
        """Print the metrics, write <kind>.json, <kind>.csv and pictures, and log all to MLflow.

        To the output folder of a tracking run and to its section evaluation/<name>. `kind` is one
        of `KINDS`, `name` that of `name_of`.
        """
        import pandas

        folder, section = run.output_dir, f"{FOLDER}/{name}"
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
            run.picture(f"{section}/{key}", picture, 0)
        for file in files:
            run.file(file, section)
        run.metrics(section, {key: metric.value for key, metric in self.metrics.items()}, 0)
        print(f"{'':>28}  {'value':>10}   95 % interval")
        for key, metric in self.metrics.items():
            low, high = metric.interval
            print(f"{title(key):>28}  {metric.value:10.5g}   {low:.5g} to {high:.5g}")
        print(f"written to {folder}: {', '.join(file.name for file in files)}")


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


def protocol(flags: argparse.Namespace, dataset: ImageDataset) -> dict[str, Any]:
    """How all metrics of an evaluation are measured; `flags` name its CSVs and the seed."""
    values: dict[str, Any] = {
        "size": list(dataset.size),
        "channels": dataset.channels,
        "preprocessing": "resized to cover the size, cut in the middle, values to [-1, 1]",
    }
    for name in ("path_to_data", "path_to_test", "path_to_train"):
        path = getattr(flags, name, None)
        if path:
            values |= {name: path, f"{name}_sha256": digest(path)}
    installed = {one.metadata["Name"].lower(): one.version for one in metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return values | {
        "seed": flags.seed,
        "interval": f"value +- {WIDTH} standard errors of {REPLICATES} bootstrap resamples, cut "
        "at the bounds of the metric",
        "versions": {"python": platform.python_version(), **versions},
    }


# --- two records compared -----------------------------------------------------------------------


def find(place: str) -> dict[str, Path]:
    """The records of a JSON file, a folder or its evaluation/, or an MLflow run by its id.

    Returns the files by `<name>/<kind>` where each evaluation has its own folder, else by kind.
    """
    path = Path(place)
    if not path.exists():
        path = addresses.fetch(f"runs:/{place}/{FOLDER}")
    if path.suffix == ".json" and path.is_file():
        return {path.stem: path}
    homes = [home for home in (path, path / FOLDER) if home.is_dir()]
    # One level deeper only in evaluation/: a training has a folder of tables, one of the same name.
    found = {
        str(file.relative_to(home).with_suffix("")): file
        for home in homes
        for pattern in ("*.json", *(["*/*.json"] if home.name == FOLDER else []))
        for file in sorted(home.glob(pattern))
        if file.stem in KINDS
    }
    if not found:
        raise UserError(
            f"no evaluation at {place}; give a JSON of evaluate.py, its folder, or the id of an "
            "evaluated run"
        )
    return found


def compare_all(first: dict[str, Path], second: dict[str, Path]) -> str:
    """`compare` all records that both have by one name, or else the only ones of a kind."""
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
    """
    (one, images), (other, other_images) = _read(first), _read(second)
    protocols = one["protocol"], other["protocol"]
    # Bits are per token of one tokenizer.
    needed = (*COMPARED, *(("tokenizer_sha256",) if "unconditional" in protocols[0] else ()))
    for key in needed:
        a, b = (protocol.get(key) for protocol in protocols)
        if a != b:
            raise UserError(
                f"these evaluations cannot be compared: {key} is {a} against {b}; evaluate both by "
                "one protocol"
            )
    lines = [f"{'':>28}  {'A':>10} {'B':>10} {'B - A':>10} {'+-':>10}"]
    values, others = one["metrics"], other["metrics"]
    for key in (key for key in values if key in others):
        a, b = values[key]["value"], others[key]["value"]
        noise = math.hypot(values[key]["standard_error"], others[key]["standard_error"])
        paired = "mse" if key == "psnr" else key  # a function of the MSE, with its noise
        if paired in images and len(images) > 1 and images.index.equals(other_images.index):
            noise = float((other_images[paired].values - images[paired].values).std(ddof=1))
            noise /= math.sqrt(len(images))
            if key == "psnr":  # along the line between the two
                x, y = values["mse"]["value"], others["mse"]["value"]
                noise *= abs((b - a) / (y - x) if x != y else 10 / math.log(10) / max(x, 1e-20))
        verdict = "larger than the noise" if abs(b - a) > WIDTH * noise else "within the noise"
        numbers = f"{b - a:10.3g} {WIDTH * noise:10.3g}  {verdict}"
        if key == "lpips" and protocols[0].get("lpips") != protocols[1].get("lpips"):
            numbers = " not comparable: other networks"
        lines.append(f"{title(key):>28}  {a:10.5g} {b:10.5g} {numbers}")
    return "\n".join(lines)


def _read(path: Path) -> tuple[dict[str, Any], Any]:
    """A JSON file of evaluate.py, and the metrics of single images in the CSV beside it."""
    import pandas

    record, table = read_json(path), path.with_suffix(".csv")
    if not isinstance(record.get("metrics"), dict) or not isinstance(record.get("protocol"), dict):
        raise UserError(f"{path} is not a valid evaluation of evaluate.py")
    if not table.is_file():
        return record, pandas.DataFrame()
    rows = pandas.read_csv(table, keep_default_na=False, dtype={"image_path": str, "label": str})
    rows = rows.set_index(["image_path", "label"]).sort_index(kind="stable")
    return record, rows[[key for key in rows if key in PAIRED]]
