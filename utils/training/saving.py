"""The checkpoints of a training, written and kept, and status.json, which tells how it ended."""

import json
import re
import shutil
import sys
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.cli import Stopped, UserError, one_line, unused
from utils.distributed import Distributed
from utils.files import TEMPORARY, is_intact, write_folder, write_new_folder
from utils.tracking import Run
from utils.training.checkpoints import ARTIFACTS, FOLDER, checkpoints_in, step_of
from utils.training.resume import State

Files = dict[str, dict[str, Any]]  # contents by name, see `write_folder`
STATUS = "status.json"
KEEP = 2  # whole ones


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


class Checkpoints(AbstractContextManager):
    """Writes the checkpoints of one training; a context manager that also says how it ended."""

    def __init__(
        self, run: Run, every: str, group: Distributed, state: State, resumed: Path | None
    ) -> None:
        """Clean up what a crash left, and go on behind `resumed`.

        Args:
            run: whose output folder it is.
            every: see `interval`.
            group: its processes, all of which must call the methods in the same order.
            state: what is saved beside the model.
            resumed: the checkpoint that the training goes on from. Later ones are set aside as
                `.abandoned`.
        """
        self._run, self._home = run, run.output_dir / FOLDER
        self._group, self._state = group, state
        self._steps, self._seconds = interval(every)
        self._saved_at = time.monotonic()
        self._said: dict[str, object] = {}
        if not group.is_main:
            return
        for folder in (run.output_dir, self._home):
            for stale in folder.glob(f"*{TEMPORARY}"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
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
            return bool(self._group.all_reduce_max(int(late)))
        return bool(self._steps) and self._state.progress.step % self._steps == 0

    def save_best(self, files: Files) -> None:
        """Write the model folder `best`; before the checkpoint that knows of it.

        Raises:
            UserError: see `save`.
        """
        if self._group.is_main:
            _check_finite(files)
            write_folder(self._run.output_dir / "best", files)

    def save(self, files: Files) -> None:
        """Write a checkpoint of this step, if there is none yet; all processes must call it.

        Args:
            files: of the model folder.

        Raises:
            UserError: the disk is full, or a number in the weights is not finite.
        """
        progress = self._state.progress
        self._saved_at = time.monotonic()
        if self._group.is_main:
            progress.logged = self._run.metrics_size()
        files = files | self._state.files()
        if not self._group.is_main:
            return
        _check_finite(files)
        folder = self._home / f"step-{progress.step:08}"
        if is_intact(folder):
            return
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
            elif is_intact(folder):
                kept += 1

    def _say(self, status: str, **more: object) -> None:
        """Write status.json, for whoever starts trainings anew."""
        self._said = {"status": status, **more}
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
        if not self._group.is_main:
            return
        if error is None:
            self._say("FINISHED", exit_code=0)
            return
        if isinstance(error, Stopped):
            self._say("KILLED", exit_code=error.exit_code)
        else:
            code = 2 if isinstance(error, UserError) else 1
            self._say("FAILED", exit_code=code, error=one_line(error, limit=500))
        with suppress(OSError):  # a full disk; why the training ended counts more
            self._upload()

    def leave(self, exit_code: int) -> None:
        """Say that the process ends at once, and where to go on; for a second signal.

        MLflow is not told: a resumed training or a replay will do that.
        """
        if not self._group.is_main:
            return
        said = self._said if self._said["status"] != "RUNNING" else {"status": "KILLED"}
        self._say(**(said | {"exit_code": exit_code}))
        with suppress(OSError):
            self._run.note_status(said["status"])
        home = self._run.output_dir
        print(f"stopped at once; --resume {home} goes on from the last checkpoint", file=sys.stderr)

    def _upload(self) -> None:
        """Log what it takes to go on elsewhere; the machine may be gone soon."""
        output_dir = self._run.output_dir
        for newest in checkpoints_in(output_dir)[-1:]:
            self._run.folder(newest, f"{ARTIFACTS}/{FOLDER}/{newest.name}")
        if (output_dir / "best").is_dir():
            self._run.folder(output_dir / "best", f"{ARTIFACTS}/best")
        if (output_dir / "metrics.jsonl").is_file():
            self._run.file(output_dir / "metrics.jsonl", ARTIFACTS)


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
