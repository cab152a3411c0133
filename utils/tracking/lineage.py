"""From a run, model, indices or image back to the commands that produced it.

python -m utils.tracking.lineage RUN_ID | FOLDER | IMAGE.png
"""

import argparse
import re
from pathlib import Path

from utils import cli, provenance
from utils.addresses import MLFLOW, fetch, find_run
from utils.cli import UserError
from utils.data import indices
from utils.files import sha256
from utils.provenance import LINEAGE, WEIGHTS, Lineage


def find(what: str) -> Lineage:
    """The lineage of a run (its id), of a model, an indices folder, a folder of images, or a PNG.

    A UserError if there is no such thing, or it has no lineage.
    """
    if what.startswith(MLFLOW) or Path(what).exists():
        path = fetch(what)
        if path.is_file() or (path / "grid.png").is_file():
            lineage = provenance.of_picture(path if path.is_file() else path / "grid.png")[0]
        elif (path / indices.META).is_file():
            lineage = indices.lineage_of(path)
        else:
            folder = provenance.find_model_folder(path)
            origin = provenance.read_provenance(folder)
            lineage = provenance.finished(origin.lineage, sha256(folder / WEIGHTS))
    elif re.fullmatch("[0-9a-f]{32}", what):
        find_run(what)
        lineage = provenance.from_json(fetch(f"runs:/{what}/{LINEAGE}").read_text(), what)
    else:
        raise UserError(f"{what} is no file, no folder, and no id of an MLflow run")
    if not lineage:
        raise UserError(f"{what} has no lineage: it does not state which commands produced it")
    return lineage


def main(arguments: argparse.Namespace) -> None:
    print(provenance.describe(find(arguments.what)))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.tracking.lineage")
    what = "id of an MLflow run, a folder that a stage wrote, or a generated image"
    parser.add_argument("what", help=what)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
