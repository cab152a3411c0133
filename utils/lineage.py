"""Back from a run, a model, indices or a picture to the commands that made it; or do them again.

python -m utils.lineage RUN_ID | FOLDER | PICTURE.png [--rerun NEW_FOLDER]
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from utils import addresses, cli
from utils.data import indices
from utils.files import sha256
from utils.provenance import ROOT, Lineage, Stage, finished, git_commit, of_json, of_picture
from utils.tracking import gateway, links
from utils.training import checkpoint

# What a command that is run again does not take over: where it wrote, and to which run.
DROPPED = ("--output_dir", "--resume", "--run_id", "--run_name", "--register")


# What --rerun starts, and nothing else: a lineage may come from a picture that somebody sent.
SCRIPTS = (
    *("train_vqvae.py", "quantize_dataset.py", "train.py", "transformer_generation.py"),
    *("vqvae/images_from_indexes.py", "vqvae/convert.py", "transformer/convert.py"),
)


def find(what: str) -> Lineage:
    """The lineage of a run (its id), of a model, indices or images folder, or of a picture.

    Raises:
        UserError: there is no such thing, or it does not say where it comes from.
    """
    if what.startswith(gateway.ADDRESSES) or Path(what).exists():
        lineage = of_path(addresses.fetch(what))
    elif not re.fullmatch("[0-9a-f]{32}", what):
        raise cli.UserError(f"{what} is no file, no folder, and no id of an MLflow run")
    else:
        gateway.existing_run(gateway.open_client(), what)
        lineage = of_json(addresses.fetch(f"runs:/{what}/{links.FILE}").read_text(), what)
    if not lineage:
        raise cli.UserError(f"{what} does not say where it comes from; nothing is known of it")
    return lineage


def of_path(path: Path) -> Lineage:
    if path.is_file():
        return of_picture(path)
    if (path / indices.META).is_file():
        return indices.lineage_of(path)
    if (path / "grid.png").is_file():
        return of_picture(path / "grid.png")
    folder = checkpoint.find_model_folder(path)
    return finished(checkpoint.read_provenance(folder).lineage, sha256(folder / checkpoint.WEIGHTS))


def maker(sha256: str, before: Lineage) -> int | None:
    """Which of the stages before wrote what has this digest."""
    return next((n for n, stage in enumerate(before) if stage.sha256 == sha256), None)


def show(lineage: Lineage) -> None:
    """Print the stages in order: what each read and wrote, how and by which code."""
    for number, stage in enumerate(lineage):
        print(f"\n{number + 1}  {stage.name}" + f"  run {stage.run_id}" * bool(stage.run_id))
        print(f"   $ {stage.command}")
        for path, sha in stage.inputs.items():
            made = maker(sha, lineage[:number])
            source = "" if made is None else f"  (of {made + 1})"
            print(f"   read   {sha[:12]}  {path}{source}")
        print(f"   wrote  {stage.sha256[:12]}" if stage.sha256 else "   wrote  pictures")
        code = f"commit {stage.commit[:12]}{stage.commit[40:]}" if stage.commit else "no commit"
        threads = f"{stage.threads} thread{'s' * (stage.threads != 1)}"
        several = f", {stage.processes} processes" if stage.processes > 1 else ""
        print(f"   by     {code}, PyTorch {stage.torch}, {threads}{several}")


def digest(path: Path) -> str:
    """The SHA-256 that a stage would write down for a path.

    Raises:
        UserError: nothing is there, or nothing that a stage reads.
    """
    if not path.exists():
        raise cli.UserError(f"{path} is not there; run this where the commands were run")
    if path.is_file() or (path / indices.META).is_file():
        return indices.digest(path)
    return sha256(checkpoint.find_model_folder(path) / checkpoint.WEIGHTS)


def check_inputs(lineage: Lineage) -> None:
    """Refuse to start where what the lineage begins with is not what it was.

    Raises:
        UserError: a file has another digest.
    """
    for number, stage in enumerate(lineage):
        for path, sha in stage.inputs.items():
            if maker(sha, lineage[:number]) is None:
                now = digest(addresses.fetch(path))
                if now != sha:
                    raise cli.UserError(
                        f"{path} is not what the {stage.name} was made of: its SHA-256 was "
                        f"{sha[:12]} and is {now[:12]}; bring the old one back"
                    )


def again(stage: Stage, before: Lineage, folder: Path, number: int) -> list[str]:
    """The words of a command whose paths lead to what was made again, and which writes there.

    Raises:
        UserError: it is no command of this repository.
    """
    program, *words = cli.build(shlex.split, stage.command)[1:] or [""]
    script = next((one for one in SCRIPTS if f"/{program}".endswith(f"/{one}")), None)
    if script is None:
        raise cli.UserError(f"{stage.command[:100]!r} is not run: it is no script of this project")
    kept, dropping = [str(ROOT / script)], False
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in DROPPED:
            dropping = not equals
        elif dropping:
            dropping = False
        else:
            kept += [flag, value] if equals and flag.startswith("--") else [word]
    made = {path: maker(sha, before) for path, sha in stage.inputs.items()}
    kept = [
        str(place(before, folder, made[word])) if made.get(word) is not None else word
        for word in kept
    ]
    return [*kept, "--output_dir", str(place((*before, stage), folder, number))]


def place(lineage: Lineage, folder: Path, number: int) -> Path:
    """Where a stage writes when it is run again."""
    return folder / f"{number + 1}-{lineage[number].name}"


def rerun(lineage: Lineage, folder: Path) -> bool:
    """Run all stages again, into a new folder, and say of each whether it wrote the same.

    Returns:
        whether all of them did.

    Raises:
        UserError: what they read has changed, the folder exists, or a stage failed.
    """
    check_inputs(lineage)
    if folder.exists():
        raise cli.UserError(f"{folder} exists already; name a new folder")
    commits = {stage.commit for stage in lineage}
    if commits != {git_commit()}:
        print(f"note: made by commit {', '.join(map(str, commits))}; this is {git_commit()}")
    all_same = True
    for number, stage in enumerate(lineage):
        words = again(stage, lineage[:number], folder, number)
        print(f"\n$ python {shlex.join(words)}", flush=True)
        starter = [sys.executable]
        if stage.processes > 1:
            count = f"--nproc_per_node={stage.processes}"
            starter += ["-m", "torch.distributed.run", "--standalone", count]
        threads = {name: str(stage.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        done = subprocess.run([*starter, *words], env={**os.environ, **threads}, check=False)
        if done.returncode:
            raise cli.UserError(f"the command above failed with exit code {done.returncode}")
        if stage.sha256:
            same = digest(place(lineage, folder, number)) == stage.sha256
            print(f"{stage.name}: {'the same bits as before' if same else 'NOT the same bits'}")
            all_same &= same
    return all_same


def main(arguments: argparse.Namespace) -> None:
    lineage = find(arguments.what)
    show(lineage)
    if arguments.rerun and not rerun(lineage, Path(arguments.rerun)):
        sys.exit(1)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.lineage")
    parser.add_argument(
        "what",
        help="id of an MLflow run, a folder that a stage wrote, or a picture that "
        "images_from_indexes.py wrote",
    )
    parser.add_argument("--rerun", metavar="FOLDER", help="run all of it again, into a new folder")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
