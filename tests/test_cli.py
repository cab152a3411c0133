"""Config dataclasses become flags and come back; errors become one line and an exit code."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, parsed
from utils import cli


@dataclass(frozen=True)
class Config:
    path: str = field(default="", metadata={"help": "100 % needed"})
    size: tuple[int, int] | None = field(default=None, metadata={"help": "H or H,W"})
    factors: tuple[int, ...] = field(default=(1, 2), metadata={"help": "any number"})
    rate: float = field(default=0.5, metadata={"help": "above 0"})
    steps: int = field(default=0, metadata={"help": "0: no limit"})
    kind: str = field(default="a", metadata={"help": "which", "choices": ("a", "b")})
    flip: bool = field(default=False, metadata={"help": "mirror"})
    shuffle: bool = field(default=True, metadata={"help": "mix"})
    found: int = 0  # no flag

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("what it does")
    cli.add_flags(parser, Config, "things")
    return parser


def parse(words: str, **known: object) -> Config:
    return cli.read_flags(Config, make_parser().parse_args(words.split()), **known)


def test_defaults() -> None:
    assert parse("--path x") == Config("x")


def test_every_kind_of_flag() -> None:
    words = "--path x --size 24,40 --factors 1,2,4,4 --rate 1e-3 --steps 7 --kind b --flip"
    expected = Config("x", (24, 40), (1, 2, 4, 4), 1e-3, 7, "b", True, False, found=5)
    assert parse(f"{words} --no-shuffle", found=5) == expected


@pytest.mark.parametrize(("text", "size"), [("28", (28, 28)), ("24,40", (24, 40))])
def test_height_and_width(text: str, size: tuple[int, int]) -> None:
    assert cli.height_and_width(text) == size


def test_which_flags_were_given() -> None:
    """A default and the same value on the command line looked alike."""
    words = "--path x --rate 0.5 --no-shuffle"
    flags = make_parser().parse_args(words.split())
    assert flags.given == {"path", "rate", "shuffle"}
    assert (flags.steps, flags.kind) == (0, "a")
    assert "given" not in vars(flags)


@dataclass(frozen=True)
class Dependent:
    weight: float = field(default=0.0, metadata={"help": "of the term"})
    bound: float = field(default=1.0, metadata={"help": "of it", "needs": "weight"})
    soft: bool = field(default=False, metadata={"help": "or not"})
    width: int = field(default=2, metadata={"help": "of it", "needs": "soft"})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--bound 2", "--bound has no effect without --weight above 0;"),
        ("--weight 0 --bound 1", "--bound has no effect without --weight"),
        ("--width 2", "--width has no effect without --soft;"),
        ("--weight 1 --bound 2 --soft --width 3", ""),
        ("", ""),
    ],
)
def test_flags_that_do_nothing_without_another(words: str, complaint: str) -> None:
    parser = cli.make_parser("what it does")
    cli.add_flags(parser, Dependent, "things")
    flags = parser.parse_args(words.split())
    if not complaint:
        cli.read_flags(Dependent, flags)
        return
    with pytest.raises(cli.UserError, match=complaint):
        cli.read_flags(Dependent, flags)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--path x --size 0", "expected H or H,W of 1 or more, got '0'"),
        ("--path x --size 1,2,3", "expected H or H,W of 1 or more, got '1,2,3'"),
        ("--path x --size 28by28", "expected H or H,W of 1 or more, got '28by28'"),
        ("--path x --factors 1,,2", "invalid integers value: '1,,2'"),
        ("--path x --kind c", "invalid choice: 'c'"),
        ("--path x --step 3", "unrecognized arguments: --step 3"),  # no abbreviations
    ],
)
def test_wrong_flags(words: str, complaint: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_values_out_of_range(rate: str) -> None:
    with pytest.raises(cli.UserError, match="rate must be above 0"):
        parse(f"--path x --rate {rate}")


def test_help_shows_the_defaults_that_count() -> None:
    """Defaults of 0 were not shown, and those that a script changes were shown unchanged."""
    parser = make_parser()
    parser.set_defaults(rate=0.05)
    text = " ".join(parser.format_help().split())
    assert "any number (default: 1,2)" in text
    assert "above 0 (default: 0.05)" in text
    assert "0: no limit (default: 0)" in text
    assert "100 % needed --size" in text
    assert "mirror (default: off)" in text
    assert "mix (default: on)" in text
    assert "things:" in text


def test_help_names_values_by_their_type_and_no_default_twice() -> None:
    """Each value was X; empty tuples were shown as (default: ), and some defaults twice."""
    parser = make_parser()
    parser.add_argument("--many", type=cli.integers, default=(), help="none or more")
    parser.add_argument("--said", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--found_path", help="where")
    for one in (parser, parser.add_subparsers().add_parser("part")):
        cli.add_inference_flags(one, batch_size=7)
        text = " ".join(one.format_help().split())
        assert "--batch_size N images at once (default: 7)" in text
        assert "where to compute (default: auto)" in text
    text = " ".join(parser.format_help().split())
    assert "--path PATH" in text
    assert "--size H,W" in text
    assert "--factors N,N,..." in text
    assert "--rate X above 0" in text
    assert "--steps N" in text
    assert "--kind {a,b}" in text
    assert "--many N,N,... none or more --said N how many (default: 3) --found_path PATH" in text


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", ""])
def test_positive(text: str) -> None:
    assert cli.positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="1 or more"):
        cli.positive(text)


def outcome(
    error: BaseException | None, capsys: pytest.CaptureFixture, *, debug: bool = False
) -> tuple[int, str]:
    """Exit code and stderr of a script whose work ends so."""

    def main(arguments: argparse.Namespace) -> None:
        if error is not None:
            raise error

    try:
        cli.run(main, parsed(debug=debug))
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def test_how_a_script_ends(capsys: pytest.CaptureFixture) -> None:
    assert outcome(None, capsys) == (0, "")
    assert outcome(cli.UserError("what, where"), capsys) == (2, "error: what, where\n")
    assert outcome(cli.Stopped(15), capsys)[0] == 143
    code, text = outcome(cli.Stopped(2), capsys)
    assert code == 130
    assert len(text.splitlines()) == 1
    assert outcome(KeyboardInterrupt(), capsys)[0] == 130
    code, text = outcome(cli.UserError("what, where"), capsys, debug=True)
    assert code == 2
    assert "Traceback" in text
    assert text.endswith("\nerror: what, where\n")


def test_a_profile_is_a_trace_and_ten_operations(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trace = tmp_path / "trace.json"
    cli.run(lambda _: torch.ones(3) + 1, parsed(profile=str(trace)))
    assert "aten::add" in trace.read_text()
    said = capsys.readouterr().out
    assert "aten::add" in said
    assert said.count("aten::") <= 10
    assert str(trace) in said


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError):
        outcome(ZeroDivisionError(), capsys)


def test_commands_can_be_pasted_in_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--run_name", "a b"])
    assert cli.command_line() == "python train.py --run_name 'a b'"
    words = "train.py", "--path_to_data", Path("my data") / "x"
    for folder, script in ((ROOT, "train.py"), (tmp_path, ROOT / "train.py")):
        monkeypatch.chdir(folder)
        command = cli.next_command(*words).splitlines()[-1].strip()
        assert command == f"python {script} --path_to_data 'my data/x'"


def test_unused(tmp_path: Path) -> None:
    """Two starts at once wrote into one folder."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(cli.unused, [tmp_path / "deep" / "run"] * 8))
    names = ["run", *(f"run-{number}" for number in range(2, 9))]
    assert {path.name for path in found} == set(names)
    assert all(path.is_dir() for path in found)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: cli.first_few(list("abc")), "a, b, c"),
        (lambda: cli.first_few(list("abcde")), "a, b, c, d, e"),
        (lambda: cli.first_few(list("abcdefg")), "a, b, c, d, e and 2 more"),
        (lambda: cli.first_few([]), ""),
    ],
)
def test_first_few(call: Callable[[], str], text: str) -> None:
    assert call() == text


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("train_vqvae.py", "--path_to_data"),
        ("quantize_dataset.py", "--model_dir"),
        ("train.py", "--path_to_data"),
        ("transformer_generation.py", "--model_path"),
        ("vqvae/images_from_indexes.py", "--indexes_path"),
        ("evaluate.py", "--path_to_test"),
    ],
)
def test_a_missing_input_is_refused_before_torch_is_imported(
    tmp_path: Path, script: str, flag: str
) -> None:
    """It took up to ten seconds of imports."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for words in ([flag, "a=b/c"], [f"{flag}=a=b/c"]):
        done = subprocess.run(
            [sys.executable, ROOT / script, *words],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        error = f"error: no such file or folder: a=b/c; give {flag} one that exists\n"
        assert (done.returncode, done.stderr) == (2, error)
    done = subprocess.run(
        [sys.executable, ROOT / script, flag, "runs:/0/checkpoints"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "torch was imported" in done.stderr


def test_a_flag_may_be_repeated() -> None:
    parser = cli.make_parser("what it does")
    parser.add_argument("--set", action="append", default=[])
    assert parser.parse_args(["--set", "a", "--set", "b"]).set == ["a", "b"]
    assert parser.parse_args([]).set == []
