"""A GPT in shards (--parallel fsdp): trained, saved and resumed as in one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import ROOT
from utils.data.indices import IndicesMeta, write_indices
from utils.data.sources import Row
from utils.training.checkpoint import checkpoints_in

GRID, CODES, STEPS = (3, 4), 8, 30
# Imports everything once, then forks the ranks of one training after the other, as torchrun would
# start them. All is in float64, without MLflow, and a training may get a signal after a step.
FORK = """
import json, os, signal, sys
import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
import train
from transformer import sampling
from utils import cli, distributed, figures
from utils.training import loop

class Run:
    run_id, lineage, ui_hint = "", (), ""
    def __init__(self, output_dir, **options):
        self.output_dir = output_dir
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def __getattr__(self, name):
        return lambda *words, **options: None

train.tracking.Run, train.SAMPLES, end_step, codes = Run, 4, loop.end_step, []
for port, (processes, last, words) in enumerate(json.loads(sys.argv[1]), int(sys.argv[2])):
    def end(state, checkpoints, stop, **options):
        if state.progress.step == last:
            stop.number = signal.SIGTERM
        return end_step(state, checkpoints, stop, **options)
    loop.end_step, children = end, []
    for rank in range(processes):
        if not (child := os.fork()):
            if processes > 1:
                shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= shared | {"WORLD_SIZE": str(processes), "RANK": str(rank)}
            sys.argv = ["train.py", *words]
            try:
                cli.run(train.main, train.make_parser(), distributed.is_first_to_fail)
                code = 0
            except SystemExit as error:
                code = error.code
            sys.stderr.flush()
            os._exit(code)  # at once
        children.append(child)
    codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
print(json.dumps(codes))
"""
FLAGS = (
    *("--path_to_data", "indices", "--dim", "16", "--num_heads", "2", "--num_layers", "2"),
    *("--batch_size", "8", "--max_steps", str(STEPS), "--evaluate_every", str(STEPS)),
    *("--device", "cpu", "--precision", "fp32", "--dropout", "0", "--class_dropout", "0"),
    *("--ema_decay", "0.9", "--output_dir"),
)
FSDP = ("--parallel", "fsdp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the outputs of trainings in one process, two and four."""
    folder, before = tmp_path_factory.mktemp("fsdp"), Path.cwd()
    os.chdir(folder)
    grids = torch.randint(CODES, (80, *GRID), generator=torch.Generator().manual_seed(0))
    rows = [Row(f"{number}.png", "ab"[number % 2], "") for number in range(80)]
    write_indices("indices", grids, rows, IndicesMeta(CODES, GRID))
    two = (*FLAGS[:-1], "--accumulate", "2", "--checkpoint_activations", *FSDP, "--output_dir")
    trainings = [
        (1, 0, (*FLAGS, "one")),
        (2, 11, (*two, "two")),
        (2, 0, ("--resume", "two")),
        (1, 8, (*FLAGS, "chain")),
        (2, 15, ("--resume", "chain", *FSDP)),
        (4, 22, ("--resume", "chain", "--parallel", "ddp")),
        (1, 0, ("--resume", "chain", *FSDP)),
    ]
    done = subprocess.run(
        [sys.executable, "-c", FORK, json.dumps(trainings), str(20_000 + os.getpid() % 9000)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    expected = [[143 if last else 0] * processes for processes, last, _ in trainings]
    assert done.stdout, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected, done.stderr
    yield folder
    os.chdir(before)


def tensors_of(output_dir: Path) -> dict[str, Tensor]:
    """Weights and training state after the last step, but for times and random states."""
    last = checkpoints_in(output_dir)[-1]
    assert last.name == f"step-{STEPS:08}"
    tensors = load_file(last / "model.safetensors") | load_file(last / "training.safetensors")
    shards = [load_file(path) for path in sorted(last.glob("training-*.safetensors"))]
    for name in shards[0] if shards else ():
        assert not any(
            x[name].shape == torch.cat([x[name] for x in shards]).shape for x in shards[1:]
        )
        tensors[name] = torch.cat([x[name] for x in shards])
    skipped = ("averages.seconds", "random.")
    return {name: x for name, x in tensors.items() if not name.startswith(skipped)}


@pytest.mark.parametrize("name", ["two", "chain"])
def test_shards_train_like_one_process_and_resume_exactly(name: str, trained: Path) -> None:
    found, expected = tensors_of(trained / name), tensors_of(trained / "one")
    assert found.keys() == expected.keys()
    assert {"model", "optimizer", "average"} - {key.split(".")[0] for key in found} == {"model"}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12, msg=key)


def test_each_process_writes_its_rows(trained: Path) -> None:
    first, second = (
        load_file(checkpoints_in(trained / "two")[-1] / f"training-0000{rank}.safetensors")
        for rank in range(2)
    )
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer.") for name in first)
    assert first["average.head.weight"].shape == second["average.head.weight"].shape == (4, 16)
    assert not [*trained.glob("*/checkpoints/*.tmp")]


def test_model_folders_are_alike(trained: Path) -> None:
    one, two = trained / "one" / "best", trained / "two" / "best"
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    shapes = {name: (x.shape, x.dtype) for name, x in first.items()}
    assert {name: (x.shape, x.dtype) for name, x in second.items()} == shapes
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--optimizer", "muon"), "--optimizer muon orthogonalizes whole matrices"),
        (("--tie_embeddings",), "--tie_embeddings cannot be combined with --parallel fsdp"),
    ],
)
def test_what_shards_cannot_train_is_refused(
    flags: tuple[str, ...], message: str, trained: Path, error_of: Callable[..., str]
) -> None:
    words = ("--path_to_data", trained / "indices", "--device", "cpu", *FSDP, *flags)
    assert message in error_of("train", *words)
