"""How a training starts, in earnest or as a dry run, and how much of it evaluations may take."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from PIL.Image import Image
from torch import Tensor

from utils.files import Files, lock_folder
from utils.progress import ProgressBar
from utils.provenance import Provenance
from utils.training.checkpoint import Checkpointer, find_output_dir
from utils.training.loop import TrainState, optimizer_step

T = TypeVar("T")
DRY_STEPS = 4
MIN_VAL_IMAGES = 64
PICTURE_STEPS = 250  # at least, between evaluations with pictures


def open_run(
    state: TrainState,
    make_run: Callable[..., Any],
    name: str,
    resumed: Path | None,
    files: Files | None = None,
    **options: Any,
) -> tuple[Any, Checkpointer]:
    """The run that a training logs to, and its checkpointer.

    `make_run` is `tracking.Run`, whose further arguments the `options` are. A resumed training
    continues its run. `files` belong into every model folder.
    """
    config, progress, group = state.config, state.progress, state.group
    output_dir = group.on_main(partial(find_output_dir, config.output_dir, resumed, name))
    name = name if config.output_dir else output_dir.name
    lock = lock_folder(output_dir) if group.is_main else None
    run = make_run(
        output_dir,
        run_id=progress.run_id or None,
        continued=bool(progress.run_id),
        experiment=config.experiment,
        run_name=name,
        enabled=group.is_main,
        config=state.settings | {"run_name": name},
        **options,
    )
    run.run_id = progress.run_id = group.on_main(lambda: run.run_id)
    settings = state.settings
    origin = Provenance(run.run_id, config.seed, settings["val_fraction"], run.lineage)
    plan = f"{state.schedule} on {group.device} in {settings['precision']}"
    group.print(f"{plan}; writing to {output_dir}")
    return run, Checkpointer(run, state.checkpoint, origin, resumed, files, lock)


def dry_run(
    state: TrainState,
    rows: Tensor,
    load: Callable[[list[Tensor], int], Iterator[T]],
    step: Callable[[T], Mapping[str, Tensor]],
    preview: Image,
) -> None:
    """Take a few steps, and print what the whole training would take. See `batches`."""
    group, schedule = state.group, state.schedule
    folder = Path(state.config.output_dir or "outputs/dry_run")
    seconds = []
    state.progress.step = schedule.total_steps // 2  # where all losses are at work
    few = [group.shard(rows[: state.config.batch_size])] * DRY_STEPS
    for batch in load(few, 0):
        start = time.perf_counter()
        values = step(batch)
        optimizer_step(state, torch.empty(0), values)
        float(next(iter(values.values())))  # waits for the device
        seconds.append(time.perf_counter() - start)
    memory = psutil.Process().memory_info().rss
    if group.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(group.device)
    if group.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        preview.save(folder / "preview.png")
    total = ProgressBar.format_interval(min(seconds) * schedule.total_steps)
    group.print(f"{schedule} on {group.device} in {state.settings['precision']}")
    group.print(
        f"dry run: about {total} for the steps, {min(seconds):.2g} s each, beside evaluations; "
        f"{memory / 2**30:.1f} GiB of memory; the data: {folder / 'preview.png'}"
    )


def evaluation_rows(rows: Tensor, state: TrainState) -> Tensor:
    """The first validation rows, as many in each evaluation, so that the scores compare.

    A training step computes three times as much as a forward pass. A tenth as many images as are
    trained on between two evaluations therefore take 3.3 % of the time, or less if there are fewer.
    """
    trained = state.schedule.evaluate_every * state.config.batch_size
    return rows[: max(MIN_VAL_IMAGES, trained // 10)]


def pictures_are_due(state: TrainState, sampled_tokens: int = 0) -> bool:
    """Whether an evaluation after this step logs pictures, which take about as long as a step.

    Sampling the tokens of an image one by one may take a GPU as long as ten steps.
    """
    schedule, step = state.schedule, state.progress.step
    every = max(PICTURE_STEPS, 4 * sampled_tokens)
    every = math.ceil(every / schedule.evaluate_every) * schedule.evaluate_every
    return step % every == 0 or step == schedule.total_steps
