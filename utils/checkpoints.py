"""The checkpoints of a training: written, kept, found, and what status.json says of it."""

import json
import re
import shutil
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from utils import journal, store
from utils.checkpoint import TEMPORARY, is_whole, read_json, write_folder, write_new_folder
from utils.cli import Stopped, UserError, unused
from utils.processes import Processes
from utils.resume import RECORDS, State
from utils.tracking import OUTPUT_TAG, Run

Files = dict[str, dict[str, Any]]  # contents by name, see `write_folder`
FOLDER, STATUS = "checkpoints", "status.json"
KEEP = 2  # whole ones
NAME = re.compile(r"step-(\d{8,})")
RUN_ID = re.compile(r"[0-9a-f]{32}")
ARTIFACTS = "resume"  # of a run that was stopped: what it takes to go on elsewhere


def interval(text: str) -> tuple[int, float]:
    """`500` -> (500, inf) steps, `5m` -> (0, 300) seconds, nothing -> neither.

    Raises:
        ValueError: something else.
    """
    found = re.fullmatch(r"([1-9]\d*)(m?)", text)
    if text and not found:
        raise ValueError(f"checkpoint_every must be steps as 500 or minutes as 5m, got {text!r}")
    if not found:
        return 0, float("inf")
    number = int(found[1])
    return (0, 60.0 * number) if found[2] else (number, float("inf"))


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
        if not is_whole(home):
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
            f"--resume {resume} goes on in {home_of(found)}; leave --output_dir {output_dir} away"
        )
    return found


def _recover(run_id: str, output_dir: str) -> Path:
    """The output folder of an MLflow run, made anew from the run's artifacts where it is gone."""
    home = Path(store.tag_of(run_id, OUTPUT_TAG))
    if (not output_dir or Path(output_dir).resolve() == home) and _last_run_id(home) == run_id:
        return home
    home = Path(output_dir or home)
    if checkpoints_in(home):
        if _last_run_id(home) == run_id:
            return home
        raise UserError(f"{home} holds another training; name another --output_dir for {run_id}")
    fetched = store.fetch(f"runs:/{run_id}/{ARTIFACTS}")
    shutil.copytree(fetched, home, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FOLDER))
    for folder in checkpoints_in(fetched):
        staging = home / FOLDER / (folder.name + TEMPORARY)
        shutil.copytree(folder, staging, dirs_exist_ok=True)
        staging.rename(staging.with_name(folder.name))
    return home


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
        if is_whole(folder):
            return folder
        print(f"warning: {folder} is damaged; taking the one before", file=sys.stderr)
    raise UserError(
        f"all checkpoints in {checkpoints[0].parent} are damaged; begin in another --output_dir"
    )


class Checkpoints(AbstractContextManager):
    """Writes the checkpoints of one training; a context manager that also says how it ended."""

    def __init__(
        self, run: Run, every: str, group: Processes, state: State, resumed: Path | None
    ) -> None:
        """Clean up what a crash left, and go on behind `resumed`.

        Args:
            run: whose output folder it is.
            every: see `interval`.
            group: its processes, all of which must call the methods in the same order.
            state: what is saved beside the model.
            resumed: the checkpoint that the training goes on from. Later ones are of a training
                that did not take place any more, and get out of its way.
        """
        self._run, self._home = run, run.output_dir / FOLDER
        self._group, self._state = group, state
        self._steps, self._seconds = interval(every)
        self._saved_at = time.monotonic()
        if not group.first:
            return
        for stale in self._home.glob(f"*{TEMPORARY}"):
            shutil.rmtree(stale)
        for path in checkpoints_in(run.output_dir):
            if resumed is not None and step_of(path) > step_of(resumed):
                aside = unused(path.with_name(f"{path.name}.abandoned"))
                print(f"{path} comes after {resumed.name}: now {aside.name}", file=sys.stderr)
                path.rename(aside)
        self._say("RUNNING")

    def due(self) -> bool:
        """Whether it is time to save after this step."""
        if self._seconds < float("inf"):
            late = time.monotonic() - self._saved_at >= self._seconds
            return bool(self._group.largest(int(late)))
        return bool(self._steps) and self._state.progress.step % self._steps == 0

    def save(self, files: Files, best: Files | None = None) -> None:
        """Write a checkpoint of this step, if there is none yet; all processes must call it.

        Args:
            files: of the model folder.
            best: of the model folder `best`, where there is a new one.

        Raises:
            UserError: the disk is full, or a number in the weights is not finite.
        """
        progress = self._state.progress
        self._saved_at = time.monotonic()
        if self._group.first:
            progress.logged = journal.mark(self._run.output_dir)
        files = files | self._state.files()
        if not self._group.first:
            return
        if best is not None:  # before the checkpoint that knows of it
            write_folder(self._run.output_dir / "best", best)
        folder = self._home / f"step-{progress.step:08}"
        if is_whole(folder):
            return
        _check_finite(files)
        _discard(folder)
        write_new_folder(folder, files)
        self._prune()
        self._say("RUNNING")

    def _prune(self) -> None:
        """Keep the last that are whole."""
        kept = 0
        for folder in reversed(checkpoints_in(self._run.output_dir)):
            if kept == KEEP:
                _discard(folder)
            elif is_whole(folder):
                kept += 1

    def _say(self, status: str, **more: object) -> None:
        """Write status.json, for whoever starts trainings anew."""
        checkpoints = checkpoints_in(self._run.output_dir)
        content = {
            "status": status,
            "step": self._state.progress.step,
            "checkpoint": str(checkpoints[-1]) if checkpoints else None,
            "run_id": self._state.progress.run_id,
            "time": time.time(),
            **more,
        }
        staging = self._run.output_dir / (STATUS + TEMPORARY)
        try:
            staging.write_text(json.dumps(content, indent=2) + "\n")
            staging.replace(self._run.output_dir / STATUS)
        except OSError:  # a full disk, which the checkpoints complain of
            staging.unlink(missing_ok=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._group.first:
            return
        if error is None:
            self._say("FINISHED", exit_code=0)
        elif isinstance(error, Stopped):
            self._say("KILLED", exit_code=error.exit_code)
            self._upload()
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self._say("KILLED", exit_code=getattr(error, "code", 130))
        else:
            code = 2 if isinstance(error, UserError) else 1
            self._say("FAILED", exit_code=code, error=" ".join(str(error).split())[:500])

    def _upload(self) -> None:
        """Log what it takes to go on elsewhere; the machine may be gone soon."""
        newest, output_dir = checkpoints_in(self._run.output_dir)[-1], self._run.output_dir
        self._run.folder(newest, f"{ARTIFACTS}/{FOLDER}/{newest.name}")
        if (output_dir / "best").is_dir():
            self._run.folder(output_dir / "best", f"{ARTIFACTS}/best")
        if (output_dir / journal.FILE).is_file():
            self._run.file(output_dir / journal.FILE, ARTIFACTS)


def _discard(folder: Path) -> None:
    """Remove a folder so that at no time a part of it stands under its name."""
    if folder.exists():
        gone = folder.with_name(f"{folder.name}.old{TEMPORARY}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def _check_finite(files: Files) -> None:
    """Raise a UserError if a number in the tensors is not finite."""
    for name, content in files.items():
        for key, value in content.items() if name.endswith(".safetensors") else ():
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(
                    f"{key} has numbers that are not finite, so nothing is saved; lower "
                    "--learning_rate or use --precision fp32, then --resume"
                )
