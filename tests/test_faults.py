"""What goes wrong in the middle of a training: one line, and nothing that was learned is lost."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import TINY_TOKENIZER, parsed, write_images
from utils import cli
from utils.data import images, workers
from utils.training.checkpoint import checkpoints_in, step_of

Call = Callable[..., str]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> Path:
    """A CSV whose images do not fit into memory."""
    monkeypatch.setattr(workers.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    return write_images(own_folder / "data")


def test_a_file_that_goes_bad_in_the_middle_of_a_training(
    streamed: Path, error_of: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps since the last evaluation were lost."""
    real, count = images.decoding.read_image, 0

    def read(file: str, **settings: object) -> object:
        nonlocal count
        count += 1
        return "it has rotted" if count > 14 else real(file, **settings)

    monkeypatch.setattr(images.decoding, "read_image", read)
    flags = ("--path_to_data", streamed, "--max_steps", 6, "--evaluate_every", 6)
    error = error_of("train_vqvae", *flags, *TINY_TOKENIZER, "--output_dir", "out")
    assert "1 of 12 files" in error or "it has rotted" in error
    assert 0 < step_of(checkpoints_in(Path("out"))[-1]) < 6
    monkeypatch.setattr(images.decoding, "read_image", real)
    train = ("train_vqvae.py", *flags, *TINY_TOKENIZER, "--output_dir", "out", "--resume", "auto")
    monkeypatch.setattr(sys, "argv", list(map(str, train)))
    import train_vqvae

    cli.run(train_vqvae.main, train_vqvae.make_parser())
    assert Path("out/best/model.safetensors").is_file()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_out_of_memory_is_one_line_with_the_flags_that_help(
    error: Exception, capsys: pytest.CaptureFixture
) -> None:
    def main(arguments: Namespace) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main, parsed(debug=False, batch_size=64, accumulate=1))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ")
    assert "--batch_size, or --accumulate N" in line
    assert "--image_size" not in line
    with pytest.raises(type(error)):
        cli.run(main, parsed(debug=True))


def test_real_memory_that_is_not_there(error_of: Call, streamed: Path) -> None:
    flags = ("--path_to_data", streamed, *TINY_TOKENIZER, "--channels", 65_536)
    assert "out of memory" in error_of("train_vqvae", *flags)


def test_other_errors_are_no_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(lambda _: (_ for _ in ()).throw(RuntimeError("a bug")), parsed(debug=False))


def test_what_an_error_quotes_stays_in_its_line(capsys: pytest.CaptureFixture) -> None:
    """A label could clear the screen, or write a line of its own."""

    def main(arguments: Namespace) -> None:
        raise cli.UserError("unknown label \x1b[2Ja\nerror: b ü \ud800")

    with pytest.raises(SystemExit):
        cli.run(main, parsed(debug=False))
    assert capsys.readouterr().err == "error: unknown label \\x1b[2Ja\\nerror: b ü \\ud800\n"
