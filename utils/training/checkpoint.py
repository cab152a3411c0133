"""The checkpointer: writes, prunes and finds checkpoints, and records how a training ended.

<output_dir>/checkpoints/step-00000500/   model folder + training*.safetensors, training.json
<output_dir>/best/                        model folder: config.json, model.safetensors, ...
<output_dir>/status.json                  whether the training runs, or how it ended
"""

import json
import os
import re
import shutil
import sys
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from utils.addresses import fetch, open_client, output_dir_of, store_errors
from utils.cli import Flags, Stopped, UserError, check_writable, one_line, unused
from utils.distributed import whole
from utils.files import TEMPORARY, Files, discard, flush, is_intact, read_json, write_folder
from utils.progress import warn
from utils.provenance import Provenance, model_files
from utils.training.state import RECORDS, SHARDS, TENSORS, CheckpointState

FOLDER, BEST, STATUS = "checkpoints", "best", "status.json"  # in an output folder
METRICS = "metrics.jsonl"
NAME, RUN_ID = re.compile(r"step-(\d{8,})"), re.compile(r"[0-9a-f]{32}")
ARTIFACTS = "resume"  # of a run that was stopped or failed: all that a continuation needs
KEEP = 2  # intact checkpoints


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint; -1 for another name."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoints in an output folder, oldest first."""
    return sorted((x for x in output_dir.glob(f"{FOLDER}/*") if step_of(x) >= 0), key=step_of)


def find_checkpoint(resume: str, output_dir: str) -> Path | None:
    """The checkpoint that `--resume` names, or None where a new training is to start.

    In an output folder it is the newest intact one. A single checkpoint may be named as well, or
    an MLflow run. A UserError if there is none where one was named, or none is intact.
    """
    if not resume:
        return None
    if resume == "auto" and not output_dir:
        raise UserError("--resume auto needs --output_dir, the folder to continue in")
    home = Path(output_dir if resume == "auto" else resume)
    if RUN_ID.fullmatch(resume) and not home.exists():
        home = _recover(resume, output_dir)
    candidates = [home] if step_of(home) >= 0 else checkpoints_in(home)
    if not candidates and resume == "auto":
        return None
    if not candidates:
        raise UserError(
            f"--resume {resume}: no checkpoint there; give the output folder of a training"
        )
    found = candidates[0].parents[1]
    if output_dir and found.resolve() != Path(output_dir).resolve():
        raise UserError(f"--resume {resume} continues in {found}; omit --output_dir {output_dir}")
    for folder in reversed(candidates):
        if is_intact(folder):
            return folder
        warn(f"{folder} is damaged or missing")
    raise UserError(
        f"--resume {resume}: no intact checkpoint in {', '.join(map(str, candidates))}; name "
        "another, or begin in another --output_dir"
    )


def _recover(run_id: str, output_dir: str) -> Path:
    """The output folder of an MLflow run, restored from its artifacts if it is gone.

    All processes of torchrun may call this at once: one restores the folder, the others find it.
    """
    original = output_dir_of(run_id)
    if not output_dir and _last_run_id(original) == run_id:
        return original
    home = Path(output_dir or f"outputs/{run_id}")  # never a path that only the store names
    if _last_run_id(home) not in ("", run_id):
        raise UserError(f"{home} holds another training; name another --output_dir for {run_id}")
    with store_errors(f"cannot list the artifacts of {run_id}"):
        left = open_client().list_artifacts(run_id, f"{ARTIFACTS}/{FOLDER}")
    if not left and not checkpoints_in(home):
        raise UserError(
            f"--resume {run_id}: this run left no checkpoint in MLflow: only trainings that were "
            f"stopped by a signal or failed do; restore its output folder {original}, or train anew"
        )
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"recovery{TEMPORARY}"):
        if not any(map(is_intact, checkpoints_in(home))):  # also after a crash while copying
            shutil.copytree(fetch(f"runs:/{run_id}/{ARTIFACTS}"), home, dirs_exist_ok=True)
    return home


def _last_run_id(home: Path) -> str:
    """The MLflow run of the newest checkpoint in an output folder, or ""."""
    try:
        return read_json(checkpoints_in(home)[-1] / RECORDS)["progress"]["run_id"]
    except (UserError, LookupError, TypeError):
        return ""


def continue_training(flags: Flags) -> Path | None:
    """The checkpoint of `--resume`, whose settings take the place of flags that are not given.

    A UserError as of `find_checkpoint`, or if no flag or checkpoint names the data.
    """
    resumed = find_checkpoint(flags.resume, flags.output_dir)
    check_writable(resumed.parents[1] if resumed else Path(flags.output_dir or "outputs"))
    if resumed is not None:
        # Rows were the only order before there was a choice.
        settings = {"shuffle": "rows"} | read_json(resumed / RECORDS).get("settings", {})
        stored = vars(flags).keys() & settings.keys() - flags.given - {"resume", "output_dir"}
        for name in stored:
            value = settings[name]
            setattr(flags, name, tuple(value) if isinstance(value, list) else value)
        flags.stored = frozenset(stored)
        if "OMP_NUM_THREADS" not in os.environ:  # results depend on the number
            torch.set_num_threads(settings.get("threads", torch.get_num_threads()))
    if not flags.path_to_data:
        raise UserError("--path_to_data is required, or --resume with the folder of a training")
    return resumed


def find_output_dir(output_dir: str, resumed: Path | None, default_name: str) -> Path:
    """The folder of the resumed checkpoint, `--output_dir`, or a new outputs/<default name>.

    A UserError if `--output_dir` holds a training already.
    """
    if resumed is not None:
        return resumed.parents[1]
    if not output_dir:
        return unused(Path("outputs") / default_name)
    if checkpoints_in(Path(output_dir)):
        raise UserError(
            f"{output_dir} holds a training already; choose another --output_dir, or continue it "
            f"with --resume {output_dir}"
        )
    return Path(output_dir)


class Checkpointer(AbstractContextManager):
    """Writes the checkpoints of one training, and status.json; on exit records how it ended."""

    def __init__(
        self,
        run: Any,
        state: CheckpointState,
        provenance: Provenance,
        resumed: Path | None,
        extra_files: Files | None = None,
        lock: FileLock | None = None,
    ) -> None:
        """Remove what a crash left behind, and rename checkpoints after `resumed` to *.abandoned.

        `run` is a `tracking.Run`; `extra_files` belong to the model folder; `lock` is released at
        the end. All processes call all methods in one order.
        """
        self._run, self._state, self._is_main = run, state, state.group.is_main
        self._provenance, self._extra_files = provenance, extra_files or {}
        self._home: Path = run.output_dir
        self._status, self._lock = "", lock
        if not self._is_main:
            return
        for place in (self._home, self._home / FOLDER):
            for stale in place.glob(f"*{TEMPORARY}"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        for path in checkpoints_in(self._home):
            if resumed is not None and step_of(path) > step_of(resumed):
                aside = unused(path.with_name(f"{path.name}.abandoned"))
                print(f"{path} comes after {resumed.name}: now {aside.name}", file=sys.stderr)
                path.rename(aside)
        self._write_status("RUNNING")

    def save_model(self, model: nn.Module, name: str = BEST) -> None:
        """Write a model folder, `best` before the checkpoint whose progress counts it."""
        files = self._model_files(model)
        if self._is_main:
            _write_finite(self._home / name, files)

    def _model_files(self, model: nn.Module) -> Files:
        with whole(model) as gathered:
            return model_files(gathered, self._provenance) | self._extra_files

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none yet, and remove old ones.

        A UserError if the disk is full, or a number in the weights is NaN or infinite.
        """
        step, metrics = self._state.progress.step, self._home / METRICS
        if self._is_main and metrics.is_file():
            flush(metrics)
        files = self._model_files(self._state.model) | self._state.files()
        written = self._write_shards(files[TENSORS])
        folder = self._home / FOLDER / f"step-{step:08}"
        if not self._is_main or is_intact(folder):
            return
        _write_finite(folder, files, *written)
        for path in written:
            shutil.rmtree(path.parent)
        intact = 0
        for path in reversed(checkpoints_in(self._home)):
            if intact == KEEP:
                discard(path)
            else:
                intact += is_intact(path)
        self._write_status("RUNNING")

    def _write_shards(self, tensors: dict[str, Any]) -> list[Path]:
        """Take those that are sharded away, and write those of this process; the files of all."""
        group = self._state.group
        shards = [name for name, x in tensors.items() if hasattr(x, "to_local")]
        if not shards:
            return []
        names = [SHARDS.replace("*", f"{rank:05}") for rank in range(group.world_size)]
        paths = [self._home / FOLDER / f"{name}{TEMPORARY}" / name for name in names]
        own = {names[group.rank]: {name: tensors.pop(name).to_local() for name in shards}}
        _write_finite(paths[group.rank].parent, own)
        group.all_reduce_max(0)  # waits for all
        return paths

    def _write_status(self, status: str, **more: object) -> None:
        """Write status.json, for programs that restart trainings."""
        self._status, checkpoints = status, checkpoints_in(self._home)
        content = {
            "status": status,
            **more,
            "step": self._state.progress.step,
            "checkpoint": str(checkpoints[-1]) if checkpoints else None,
            "run_id": self._state.progress.run_id,
            "time": time.time(),
        }
        staging = self._home / (STATUS + TEMPORARY)
        with suppress(OSError):  # a full disk, which the checkpoints report
            staging.write_text(json.dumps(content, indent=2) + "\n")
            staging.replace(self._home / STATUS)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._is_main:
            return
        if error is None:
            self._write_status("FINISHED", exit_code=0)
        elif isinstance(error, Stopped):
            self._write_status("KILLED", exit_code=error.exit_code)
        else:
            code = 2 if isinstance(error, UserError) else 1
            self._write_status("FAILED", exit_code=code, error=one_line(error, limit=500))
        if error is not None:  # log all that a continuation on another machine needs
            with suppress(OSError):  # a full disk must not hide why the training ended
                for path in (*checkpoints_in(self._home)[-1:], *self._home.glob(BEST)):
                    self._run.folder(path, f"{ARTIFACTS}/{path.relative_to(self._home)}")
                for path in self._home.glob(METRICS):
                    self._run.file(path, ARTIFACTS)
        if self._lock:
            self._lock.release()

    def end_at_once(self, exit_code: int) -> None:
        """Record that the process ends now, after a second signal. MLflow learns of it later."""
        if not self._is_main:
            return
        status = "KILLED" if self._status == "RUNNING" else self._status
        self._write_status(status, exit_code=exit_code)
        with suppress(OSError):
            self._run.note_status(status)
        home = self._home
        print(f"stopped at once; --resume {home} goes on from the last checkpoint", file=sys.stderr)


def _write_finite(folder: Path, files: Files, *written: Path) -> None:
    """`write_folder`, but a UserError if a number in the tensors is NaN or infinite."""
    for name, content in files.items():
        for key, value in content.items() if name.endswith(".safetensors") else ():
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(
                    f"{key} has NaN or infinite values, so nothing is saved; lower "
                    "--learning_rate or use --precision fp32, then --resume"
                )
    write_folder(folder, files, written)
