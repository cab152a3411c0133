"""Evaluations during a training take a small share of it, on the same images each time."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
import train_vqvae
from tests.conftest import TINY_GPT, TINY_TOKENIZER, write_images
from utils import cli
from utils.data.images import ImageDataset
from utils.data.index_dataset import IndexDataset
from utils.data.indices import IndicesMeta, write_indices
from utils.data.sources import Row
from utils.evaluation.features import ImageSet
from utils.training.config import TrainingConfig
from utils.training.loop import Schedule
from utils.training.start import evaluation_rows, pictures_are_due

Record = Callable[..., list[list[int]]]
TRAINED, HELD_OUT = 60, 180
EVERY = 90  # steps of 8 images
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses


def state_of(config: TrainingConfig, num_train: int, num_val: int) -> SimpleNamespace:
    schedule = Schedule(config, num_train, num_val)
    return SimpleNamespace(config=config, schedule=schedule, progress=SimpleNamespace(step=0))


@pytest.mark.parametrize("num_train", [64, 450, 1800, 54_000, 1_200_000])
@pytest.mark.parametrize("num_val", [1, 200, 6000, 1_000_000])
def test_by_default_evaluations_compute_at_most_5_percent(num_train: int, num_val: int) -> None:
    """With the forward pass of a step as a unit: a step computes three of them."""
    state = state_of(TrainingConfig(), num_train, num_val)
    rows = evaluation_rows(torch.arange(num_val), state)
    plan = state.schedule
    evaluations = 1 + sum(plan.evaluates(step) for step in range(1, plan.total_steps + 1))
    trained = plan.total_steps * state.config.batch_size
    assert evaluations * len(rows) <= 0.05 * 3 * trained
    assert len(rows) == min(num_val, plan.evaluate_every * 64 // 10)


def test_pictures_are_made_at_the_start_at_the_end_and_after_enough_steps() -> None:
    state = state_of(TrainingConfig(max_steps=1020, evaluate_every=60), 1000, 10)

    def due(tokens: int = 0) -> list[int]:
        steps = [n for n in range(1021) if state.schedule.evaluates(n)]
        return [n for n in steps if pictures_are_due(at(n), tokens)]

    def at(step: int) -> SimpleNamespace:
        state.progress.step = step
        return state

    assert due() == due(49) == [0, 300, 600, 900, 1020]
    assert due(100) == [0, 420, 840, 1020]


@pytest.fixture
def record(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Call a trainer; the row numbers of each of its evaluations."""
    write_images(own_folder / "data", count=TRAINED + HELD_OUT, size=(8, 8))
    rows = [
        Row(f"{n:04}.png", f"{n * 10 // (TRAINED + HELD_OUT)}", "train" if n % 4 == 0 else "val")
        for n in range(TRAINED + HELD_OUT)
    ]
    lines = [f"{n}.png,{row.label},{row.split}\n" for n, row in enumerate(rows)]
    Path("data/data.csv").write_text("image_path,label,split\n" + "".join(lines))
    write_indices("indices", torch.zeros(len(rows), 2, 2).long(), rows, IndicesMeta(8, (2, 2)))

    def call(module: object, *flags: object) -> list[list[int]]:
        found: list[list[int]] = []
        steps = ("--batch_size", 8, "--evaluate_every", EVERY, "--device", "cpu")
        words = [f"{module.__name__}.py", *flags, *steps, "--output_dir", "out"]
        read = ImageDataset.batches

        def load(part: ImageSet, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
            return next(iter(read(part.images, [part.row_numbers[positions]], device)))

        with monkeypatch.context() as patch:
            patch.setattr(ImageSet, "load", load)  # of pictures, which are not recorded
            for kind in (ImageDataset, IndexDataset):
                patch.setattr(kind, "batches", recorded(kind.batches, found))
            patch.setattr(sys, "argv", [*map(str, words)])
            cli.run(module.main, module.make_parser())
        return found

    return call


def recorded(batches: Callable, found: list[list[int]]) -> Callable:
    def wrapper(self: object, parts: list, *arguments: object) -> object:
        if not arguments or arguments[-1] in (None, torch.device("cpu")):  # no training batches
            found.append([row for part in parts for row in part.tolist()])
        return batches(self, parts, *arguments)

    return wrapper


@pytest.mark.parametrize(
    ("module", "data", "tiny"),
    [
        (train_vqvae, "data/data.csv", (*TINY_TOKENIZER, "--num_workers", 0)),
        (train, "indices", (*TINY_GPT, "--patience", 0)),
    ],
)
def test_evaluations_share_a_subset_of_all_classes_also_after_resuming(
    record: Record, module: object, data: str, tiny: tuple
) -> None:
    """The rows are sorted by class; the best model is evaluated on all of them."""
    flags = ("--path_to_data", data, *tiny)
    *first, whole = record(module, *flags, "--max_steps", EVERY)
    assert len(first) == 2  # at the start and after the last step
    assert len(first[0]) == EVERY * 8 // 10
    assert len({row * 10 // (TRAINED + HELD_OUT) for row in first[0]}) == 10
    assert len(whole) == len(set(whole)) == HELD_OUT
    *later, whole = record(module, *flags, "--max_steps", 2 * EVERY, "--resume", "out")
    assert first + later == [first[0]] * 3
    assert len(whole) == HELD_OUT
