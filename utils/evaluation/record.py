"""The record of an evaluation: its figures, the protocol behind them, and what shows them."""

import argparse
import contextlib
import csv
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from utils import cli
from utils.data.images import ImageDataset
from utils.distributed import pick_device
from utils.evaluation.bootstrap import REPLICATES, WIDTH, Figure
from utils.evaluation.features import FeatureNetwork
from utils.files import sha256
from utils.tracking import Run

KINDS = ("reconstructions", "samples", "likelihood")
FOLDER = "evaluation"  # in an output folder, and in MLflow
PACKAGES = (
    *("torch", "torchvision", "numpy", "pillow", "mlflow"),
    *("torch-fidelity", "transformers", "lpips"),
)
TITLES = {
    "fid": "FID",
    "rfid": "rFID",
    "kid": "KID",
    "rkid": "rKID",
    "fd": "FD",
    "rfd": "rFD",
    "kd": "KD",
    "rkd": "rKD",
    "inception_score": "Inception Score",
    "class_score": "class score",
}


def title(key: str) -> str:
    """How a figure is called in print: fd_classifier is FD (classifier), and never FID."""
    stem = key.removeprefix("real_")
    real = "real " if stem != key else ""
    for network in ("classifier", "dinov2"):
        if stem.removesuffix(f"_{network}") in TITLES and stem.endswith(network):
            return f"{real}{TITLES[stem.removesuffix(f'_{network}')]} ({network})"
    return real + TITLES.get(stem, stem)


def name_of(path: Path) -> str:
    """What the evaluation on a CSV or a folder is called: by it and the folder that it is in.

    So `train.csv` of two data sets stay apart, in files as well as in MLflow.
    """
    path = path.resolve()
    parts = path.parent.name, path.stem if path.suffix == ".csv" else path.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(filter(None, parts)))


def protocol(
    arguments: argparse.Namespace,
    dataset: ImageDataset,
    network: FeatureNetwork | None = None,
    **more: Any,
) -> dict[str, Any]:
    """How figures are made, but for the number of images.

    Args:
        arguments: of the script; what names a CSV or a seed is taken from it.
        dataset: the real images.
        network: through which they are compared.
        more: what only this kind of evaluation has.
    """
    values: dict[str, Any] = {
        "size": list(dataset.size),
        "channels": dataset.channels,
        "preprocessing": "resized to cover the size, cut in the middle, values to [-1, 1]",
    }
    for name in ("path_to_data", "path_to_test", "path_to_train"):
        path = getattr(arguments, name, None)
        if path:
            values |= {name: path, f"{name}_sha256": sha256(Path(path))}
    if network is not None:
        values |= {
            "features": network.name,
            "network_sha256": network.sha256,
            "network_preprocessing": network.preprocessing,
        }
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return values | {
        "seed": arguments.seed,
        "device": pick_device(arguments.device).type,
        "interval": f"value +- {WIDTH} standard errors of {REPLICATES} bootstrap resamples, cut at "
        "the ends of what the figure can be",
        "versions": versions,
        **more,
    }


@dataclass(frozen=True)
class Record:
    """What an evaluation found.

    Attributes:
        figures: by their keys.
        protocol: of `protocol`.
        rows: columns of the table with a line for each image.
        pictures: by their names.
        by_label: figures of the images of each label.
    """

    figures: Mapping[str, Figure]
    protocol: Mapping[str, Any]
    rows: Mapping[str, Sequence[Any]]
    pictures: Mapping[str, Image.Image]
    by_label: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)

    def write(self, folder: Path, kind: str) -> list[Path]:
        """Print the figures, and write <kind>.json, <kind>.csv and a PNG file for each picture.

        Returns:
            the files, the JSON first.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "figures": _plain(self.figures),
            "by_label": {label: _plain(part) for label, part in self.by_label.items()},
            "protocol": dict(self.protocol),
            "made_by": cli.command_line(),
        }
        files = [folder / f"{kind}.json", folder / f"{kind}.csv"]
        files[0].write_text(json.dumps(content, indent=2) + "\n")
        with files[1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.rows)
            for line in zip(*self.rows.values(), strict=True):
                writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in line])
        for key, picture in self.pictures.items():
            files.append(folder / f"{key}.png")
            picture.save(files[-1])
        print(f"{'':>28}  {'value':>10}   95 % interval")
        for key, figure in self.figures.items():
            low, high = figure.interval
            print(f"{title(key):>28}  {figure.value:10.5g}   {low:.5g} to {high:.5g}")
        print(f"written to {folder}: {', '.join(file.name for file in files)}")
        return files

    def save(self, run: Run, kind: str, name: str, **sets: ImageDataset | None) -> None:
        """`write` to the output folder of a run, and log all of it under evaluation/<name>.

        Args:
            run: of the model.
            kind: of `KINDS`.
            name: of `name_of`.
            sets: images by the flags that named them, whose bad files are listed if they have any.
        """
        section = f"{FOLDER}/{name}"
        for file in self.write(run.output_dir, kind):
            run.file(file, section)
        run.metrics(section, {key: figure.value for key, figure in self.figures.items()}, 0)
        for key, picture in self.pictures.items():
            run.picture(f"{section}/{key}", picture, 0)
        for flag, images in sets.items():
            if images is not None:
                images.write_skipped(run.output_dir, f"skipped-{flag}.csv")


def _plain(figures: Mapping[str, Figure]) -> dict[str, dict[str, float]]:
    return {
        key: {
            "value": figure.value,
            "low": figure.interval[0],
            "high": figure.interval[1],
            "standard_error": figure.standard_error,
        }
        for key, figure in figures.items()
    }
