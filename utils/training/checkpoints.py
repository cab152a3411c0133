"""The checkpoints of a training: where they are, found by `--resume`, brought back from MLflow."""

import re
import shutil
import sys
from pathlib import Path

from filelock import FileLock

from utils.addresses import fetch, has_artifacts, output_dir_of
from utils.cli import UserError
from utils.files import TEMPORARY, is_intact, read_json
from utils.training.resume import RECORDS

FOLDER = "checkpoints"  # in an output folder
NAME = re.compile(r"step-(\d{8,})")
RUN_ID = re.compile(r"[0-9a-f]{32}")
ARTIFACTS = "resume"  # of a run that was stopped or failed: what it takes to go on elsewhere


def step_of(folder: Path) -> int:
    """The step that the name of a checkpoint says."""
    return int(NAME.fullmatch(folder.name)[1])


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoints in an output folder, the oldest first."""
    home = output_dir / FOLDER
    found = home.iterdir() if home.is_dir() else ()
    return sorted((path for path in found if NAME.fullmatch(path.name)), key=step_of)


def find_checkpoint(resume: str, output_dir: str) -> Path | None:
    """The checkpoint that `--resume` names, or None where a new training is to start.

    Of an output folder it is the newest that is whole. A single checkpoint may be named as well.

    Raises:
        UserError: there is none where one was named, or none is whole.
    """
    if not resume:
        return None
    if resume == "auto" and not output_dir:
        raise UserError("--resume auto needs --output_dir, to know where to go on")
    home = Path(output_dir if resume == "auto" else resume)
    if RUN_ID.fullmatch(resume) and not home.exists():
        home = _recover(resume, output_dir)
    if NAME.fullmatch(home.name):
        if not is_intact(home):
            raise UserError(
                f"--resume {home}: the checkpoint is damaged, or none; name another, or the output "
                "folder for the newest that is whole"
            )
        found = home
    elif checkpoints := checkpoints_in(home):
        found = _newest_whole(checkpoints)
    elif resume == "auto":
        return None
    else:
        raise UserError(
            f"--resume {resume}: no checkpoint there; give the output folder of a training"
        )
    if output_dir and home_of(found).resolve() != Path(output_dir).resolve():
        raise UserError(
            f"--resume {resume} goes on in {home_of(found)}; omit --output_dir {output_dir}"
        )
    return found


def _recover(run_id: str, output_dir: str) -> Path:
    """The output folder of an MLflow run, brought back from its artifacts where it is gone.

    All processes of torchrun may ask at once: the first brings it back, the others find it.
    """
    made = output_dir_of(run_id)
    if not output_dir and _last_run_id(made) == run_id:
        return made
    home = Path(output_dir or f"outputs/{run_id}")  # not where a store says that it was
    if not has_artifacts(run_id, f"{ARTIFACTS}/{FOLDER}") and not checkpoints_in(home):
        raise UserError(
            f"--resume {run_id}: this run left no checkpoint in MLflow: only trainings that were "
            f"stopped by a signal or failed do; bring back its output folder {made}, or train anew"
        )
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"recovery{TEMPORARY}"):
        if not checkpoints_in(home):
            _bring_back(run_id, home)
        elif _last_run_id(home) != run_id:
            raise UserError(
                f"{home} holds another training; name another --output_dir for {run_id}"
            )
    return home


def _bring_back(run_id: str, home: Path) -> None:
    """Copy what a run left in MLflow into an output folder; its checkpoints last, each whole."""
    fetched = fetch(f"runs:/{run_id}/{ARTIFACTS}")
    shutil.copytree(fetched, home, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FOLDER))
    for folder in checkpoints_in(fetched):
        staging = home / FOLDER / (folder.name + TEMPORARY)
        shutil.copytree(folder, staging, dirs_exist_ok=True)
        staging.rename(home / FOLDER / folder.name)


def _last_run_id(home: Path) -> str:
    """The MLflow run that the newest checkpoint in an output folder is of."""
    checkpoints = checkpoints_in(home)
    try:
        return read_json(checkpoints[-1] / RECORDS)["progress"]["run_id"] if checkpoints else ""
    except (UserError, KeyError, TypeError):
        return ""


def home_of(checkpoint: Path) -> Path:
    """The output folder that a checkpoint lies in."""
    return checkpoint.parents[1]


def _newest_whole(checkpoints: list[Path]) -> Path:
    for folder in reversed(checkpoints):
        if is_intact(folder):
            return folder
        print(f"warning: {folder} is damaged; taking the one before", file=sys.stderr)
    raise UserError(
        f"all checkpoints in {checkpoints[0].parent} are damaged; begin in another --output_dir"
    )
