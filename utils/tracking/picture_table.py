"""Tables of a run whose cells may be pictures, as files that people, programs and MLflow read."""

import csv
import json
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = "tables"  # in an output folder, and of MLflow's artifacts


def write(output_dir: Path, name: str, columns: dict[str, list[Any]]) -> None:
    """Write tables/`name`.csv, the same as MLflow's JSON, and the pictures in tables/`name`/."""
    folder = output_dir / FOLDER
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines, data = [], []
    for number, row in enumerate(zip(*columns.values(), strict=True)):
        cells = dict(zip(columns, row, strict=True))
        pictures = {key: cell for key, cell in cells.items() if isinstance(cell, Image.Image)}
        paths = {key: f"{name}/{key}-{number:05}.png" for key in pictures}
        for key, picture in pictures.items():
            picture.save(folder / paths[key])
        lines.append(cells | paths)
        data.append(cells | {key: _entry(f"{FOLDER}/{path}") for key, path in paths.items()})
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    content = {"columns": list(columns), "data": [list(row.values()) for row in data]}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _entry(path: str) -> dict[str, str]:
    """What MLflow takes for a picture: the artifact, and a small version of it (the same)."""
    return {"type": "image", "filepath": path, "compressed_filepath": path}
