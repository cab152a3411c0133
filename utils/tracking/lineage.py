"""From a run, model, indices or image back to the commands that produced it; run them again.

python -m utils.tracking.lineage RUN_ID | FOLDER | IMAGE.png [--rerun NEW_FOLDER]
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from utils import cli, provenance
from utils.addresses import MLFLOW, fetch, find_run
from utils.cli import UserError
from utils.data import indices, sources
from utils.data.finding import expand
from utils.files import sha256
from utils.model_folder import WEIGHTS, find_model_folder, read_provenance
from utils.provenance import LINEAGE, Lineage, Stage, describe, from_json, of_picture, producer

# Flags of a command that a rerun drops: where it wrote, and to which run.
DROPPED = ("--output_dir", "--resume", "--run_id", "--run_name", "--register")

# What a rerun starts, and nothing else: a lineage may come from an image that somebody sent.
SCRIPTS = (
    *("train_vqvae.py", "quantize_dataset.py", "train.py", "transformer_generation.py"),
    *("vqvae/images_from_indexes.py", "vqvae/convert.py", "transformer/convert.py"),
)


def find(what: str) -> Lineage:
    """The lineage of a run (its id), of a model, an indices folder, a folder of images, or a PNG.

    A UserError if there is no such thing, or it has no lineage.
    """
    if what.startswith(MLFLOW) or Path(what).exists():
        lineage = of_path(fetch(what))
    elif re.fullmatch("[0-9a-f]{32}", what):
        find_run(what)
        lineage = from_json(fetch(f"runs:/{what}/{LINEAGE}").read_text(), what)
    else:
        raise UserError(f"{what} is no file, no folder, and no id of an MLflow run")
    if not lineage:
        raise UserError(f"{what} has no lineage: it does not state which commands produced it")
    return lineage


def of_path(path: Path) -> Lineage:
    """The lineage of a file or folder that a stage wrote."""
    if path.is_file() or (path / "grid.png").is_file():
        return of_picture(path if path.is_file() else path / "grid.png")[0]
    if (path / indices.META).is_file():
        return indices.lineage_of(path)
    return provenance.finished(read_provenance(find_model_folder(path)).lineage, digest_of(path))


def digest_of(path: Path) -> str:
    """The SHA-256 that a stage records for a path; a UserError if no stage reads such a path."""
    if not all(part.exists() for part in expand(path)):
        raise UserError(f"{path} is not there; run this where the commands were run")
    if (path / indices.META).is_file():
        return indices.digest(path)
    if not path.is_dir():
        return sources.digest(path)
    return sha256(find_model_folder(path) / WEIGHTS)


def check_inputs(lineage: Lineage) -> None:
    """A UserError if the data that the lineage starts from have changed."""
    for number, stage in enumerate(lineage):
        for path, digest in stage.inputs.items():
            made = producer(digest, lineage[:number]) is not None
            now = digest if made else digest_of(fetch(path))
            if now != digest:
                raise UserError(
                    f"{path} is not what the {stage.name} was made of: its SHA-256 was "
                    f"{digest[:12]} and is {now[:12]}; bring the old one back"
                )


def rerun_command(stage: Stage, before: Lineage, folder: Path) -> list[str]:
    """The words of a command that reads the outputs of the rerun before it, and writes below it.

    A UserError if it is not a command of this repository.
    """
    try:
        program, *words = shlex.split(stage.command)[1:] or [""]
    except ValueError as error:
        raise UserError(f"{stage.command[:100]!r} is not a command: {error}") from error
    script = next((one for one in SCRIPTS if f"/{program}".endswith(f"/{one}")), None)
    if script is None:
        raise UserError(f"{stage.command[:100]!r} is not run: it is no script of this project")
    dropped = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in DROPPED:
        dropped.add_argument(flag)
    kept = [word.rpartition("=") for word in dropped.parse_known_args(words)[1]]
    made = {path: producer(digest, before) for path, digest in stage.inputs.items()}
    outputs = {p: str(output_of(before, folder, n)) for p, n in made.items() if n is not None}
    words = [flag + equals + outputs.get(value, value) for flag, equals, value in kept]
    output_dir = output_of((*before, stage), folder, len(before))
    return [str(provenance.ROOT / script), *words, "--output_dir", str(output_dir)]


def output_of(lineage: Lineage, folder: Path, number: int) -> Path:
    """The folder that a stage writes in a rerun."""
    return folder / f"{number + 1}-{lineage[number].name}"


def rerun(lineage: Lineage, folder: Path) -> bool:
    """Run all stages again, into a new folder; whether all outputs are bitwise identical.

    A UserError if an input has changed, the folder exists, or a stage failed.
    """
    check_inputs(lineage)
    if folder.exists():
        raise UserError(f"{folder} exists already; name a new folder")
    commits, here = {stage.commit for stage in lineage}, provenance.git_commit()
    if commits != {here}:
        print(f"note: made by commit {', '.join(map(str, commits))}; this is {here}")
    all_same = True
    for number, stage in enumerate(lineage):
        words = rerun_command(stage, lineage[:number], folder)
        print(f"\n$ python {shlex.join(words)}", flush=True)
        if stage.processes > 1:
            count = f"--nproc_per_node={stage.processes}"
            words = ["-m", "torch.distributed.run", "--standalone", count, *words]
        threads = {name: str(stage.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {**os.environ, **threads}
        done = subprocess.run([sys.executable, *words], env=environment, check=False)
        if done.returncode:
            raise UserError(f"the command above failed with exit code {done.returncode}")
        if stage.sha256:
            same = digest_of(output_of(lineage, folder, number)) == stage.sha256
            print(f"{stage.name}: {'the same bits as before' if same else 'NOT the same bits'}")
            all_same &= same
    return all_same


def main(arguments: argparse.Namespace) -> None:
    lineage = find(arguments.what)
    print(describe(lineage))
    if arguments.rerun and not rerun(lineage, Path(arguments.rerun)):
        sys.exit(1)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.tracking.lineage")
    what = "id of an MLflow run, a folder that a stage wrote, or a generated image"
    parser.add_argument("what", help=what)
    parser.add_argument("--rerun", metavar="FOLDER", help="run all stages again, in a new folder")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
