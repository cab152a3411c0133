"""Trainings that continue or stop as their flags, the shell and the machine ask for."""

import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import train
from tests.conftest import TINY_TOKENIZER, run_script, write_images
from tests.forks import Forked
from utils import cli
from utils.files import lock_folder
from utils.training.config import TrainingConfig
from utils.training.loop import Schedule
from utils.training.state import StopSignals

SMALL = "--dim 16 --num_layers 1 --num_heads 1 --dropout 0 --device cpu --precision fp32"


def write_indices(path: str = "indices.txt") -> None:
    grids = torch.randint(7, (40, 16), generator=torch.Generator().manual_seed(0))
    Path(path).write_text("\n".join(" ".join(map(str, row.tolist())) for row in grids))


def run_train(flags: str) -> None:
    train.main(train.make_parser().parse_args(flags.split()))


def test_resume_alone_continues_with_the_settings_of_the_folder(
    store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_indices()
    flags = f"--path_to_data indices.txt {SMALL} --batch_size 8 --learning_rate 5e-3"
    run_train(f"{flags} --max_steps 3 --output_dir a")
    run_train("--resume a")
    assert "warning: resuming" not in capsys.readouterr().err
    run_train("--resume a --max_steps 5")
    assert "max_steps 3 -> 5" in capsys.readouterr().err
    status = json.loads(Path("a/status.json").read_text())
    config = json.loads(Path("a/best/config.json").read_text())
    assert (status["step"], config["dim"]) == (5, 16)
    with pytest.raises(cli.UserError, match=r"batch_size 8 -> 4.*--accumulate"):
        run_train("--resume a --batch_size 4")


def test_data_are_required_where_nothing_is_resumed(store: Any) -> None:
    with pytest.raises(cli.UserError, match="--path_to_data is required"):
        run_train(f"{SMALL} --output_dir a")


def test_an_early_stop_is_final_unless_the_training_gets_longer(store: Any) -> None:
    """Resumed with more steps, it took one and stopped again."""
    write_indices()
    flags = f"--path_to_data indices.txt {SMALL} --batch_size 8 --evaluate_every 1 --patience 2"
    flags += " --learning_rate 1e-9 --output_dir a --resume auto"

    def step_after(more: str) -> int:
        run_train(f"{flags} {more}")
        return json.loads(Path("a/status.json").read_text())["step"]

    stopped = step_after("--max_steps 30")
    assert stopped < 30
    assert step_after("--max_steps 30") == stopped
    assert step_after("--max_steps 31") == stopped + 2


def test_max_steps_counts_beyond_max_epochs() -> None:
    config = TrainingConfig(batch_size=8, max_epochs=2, max_steps=500)
    assert Schedule(config, 40, 4).total_steps == 500


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["x.py", "--output_dir", str(tmp_path / "file" / "new")])
    parser = cli.make_parser(None)
    parser.add_argument("--output_dir")
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda arguments: pytest.fail("it worked"), parser)
    assert "choose another --output_dir" in capsys.readouterr().err


def test_a_file_without_rights_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "data/a.png")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit, match="2"):
        cli.run(main, cli.make_parser(None))
    assert "error: cannot use data/a.png: Permission denied" in capsys.readouterr().err


def test_a_closed_terminal_stops_a_training_as_sigterm_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    with StopSignals(lambda code: None) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGTERM
    signal.signal(signal.SIGHUP, before)


def test_nohup_keeps_a_training_alive() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(lambda code: None) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_tokenizer_resumes_by_its_folder_alone(store: Any) -> None:
    import train_vqvae

    write_images(Path("data"), count=24)
    flags = "--path_to_data data/data.csv --channels 8 --quantizer fsq --levels 4,4 --patch_size 4"
    flags += " --batch_size 8 --num_workers 0 --device cpu --max_steps 2 --output_dir t"
    for words in (flags, "--resume t --max_steps 3"):
        train_vqvae.main(train_vqvae.make_parser().parse_args(words.split()))
    assert json.loads(Path("t/status.json").read_text())["step"] == 3


@pytest.mark.parametrize("more", ["", "--order_anneal 0.5,0.75"], ids=["raster", "random orders"])
def test_max_minutes_ends_a_training_in_order(
    store: Any, capsys: pytest.CaptureFixture[str], more: str
) -> None:
    """Also in random orders, whose models do not count otherwise."""
    write_indices()
    flags = f"--path_to_data indices.txt {SMALL} --batch_size 8 --max_minutes 1e-6 --output_dir a"
    run_train(f"{flags} {more}")
    said = capsys.readouterr().out
    assert "--max_minutes 1e-06 are over: step 1 of 1,000" in said
    assert "bits per token: " in said
    status = json.loads(Path("a/status.json").read_text())
    assert (status["status"], status["step"]) == ("FINISHED", 1)
    run_train("--resume a --max_steps 3 --max_minutes 9")
    assert json.loads(Path("a/status.json").read_text())["step"] == 3


def test_a_dry_run_of_a_gpt_leaves_only_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    write_indices()
    run_train(f"--path_to_data indices.txt {SMALL} --batch_size 8 --dry_run")
    said = capsys.readouterr().out
    assert "1,000 steps of 8 images" in said
    assert "GiB of memory" in said
    assert Path("outputs/dry_run/preview.png").is_file()
    assert sorted(str(x) for x in Path().rglob("*.*")) == [
        "indices.txt",
        "outputs/dry_run/preview.png",
    ]


def test_a_dry_run_of_a_tokenizer_counts_its_discriminator(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import train_vqvae

    write_images(Path("data"), count=24)
    flags = "--path_to_data data/data.csv --channels 8 --batch_size 8 --num_workers 0 --device cpu"
    flags += " --disc_weight 0.5 --max_steps 400 --output_dir t --dry_run"
    train_vqvae.main(train_vqvae.make_parser().parse_args(flags.split()))
    assert "400 steps of 8 images" in capsys.readouterr().out
    assert [path.name for path in Path("t").iterdir()] == ["preview.png"]


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    """Two trainings wrote into one folder, and both their checkpoints were worthless."""
    lock = lock_folder(tmp_path)
    owner = f"process {os.getpid()} on {socket.gethostname()} is writing to {tmp_path}"
    with pytest.raises(cli.UserError, match=owner):
        lock_folder(tmp_path)
    lock.release()
    lock_folder(tmp_path).release()


def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network file systems are; other errors are not hidden."""

    def refuse(number: int) -> Callable[..., None]:
        def acquire(lock: FileLock, timeout: float) -> None:
            raise OSError(number, os.strerror(number))

        return acquire

    monkeypatch.setattr(FileLock, "acquire", refuse(errno.ENOLCK))
    lock_folder(tmp_path).release()
    monkeypatch.setattr(FileLock, "acquire", refuse(errno.EACCES))
    with pytest.raises(PermissionError):
        lock_folder(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from utils.files import lock_folder\n"
    code += "lock = lock_folder(Path(sys.argv[1])); print('mine', flush=True); time.sleep(60)"
    with Forked("-c", code, tmp_path) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(cli.UserError, match=f"process {other.pid} on "):
            lock_folder(tmp_path)
        other.kill()
    lock_folder(tmp_path).release()


def test_a_second_training_in_a_folder_is_refused(store: Any) -> None:
    write_indices()
    with lock_folder(Path("a")), pytest.raises(cli.UserError, match="is writing to a; wait"):
        run_train(f"--path_to_data indices.txt {SMALL} --batch_size 8 --output_dir a")
    assert [path.name for path in sorted(Path("a").iterdir())] == ["lock", "owner"]


def test_images_can_be_left_out_of_a_training_that_has_begun(
    store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice about a damaged file was to leave it out, and the resumed training refused."""
    data = write_images(Path("data"))
    flags = ("--path_to_data", str(data), *map(str, TINY_TOKENIZER), "--output_dir", "a")
    run_script("train_vqvae.py", *flags, "--max_steps", "2")
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:4], *lines[5:]]))
    done = run_script("train_vqvae.py", "--resume", "a", "--max_steps", "4")
    assert "warning: 1 of the 12 rows of the data are missing now" in done.stdout
    assert json.loads(Path("a/status.json").read_text())["step"] == 4
    for rows in (lines[:0:-1], [*lines[1:], "0.png,other"]):
        data.write_text("\n".join([lines[0], *rows]))
        done = run_script("train_vqvae.py", "--resume", "a", "--max_steps", "5", check=False)
        assert done.returncode == 2
        assert "rows of the data are new, or in another order" in done.stderr
