"""Config dataclasses to argparse flags and back, and what a script does with its errors."""

import argparse
import dataclasses
import errno
import itertools
import operator
import os
import re
import shlex
import sys
import tempfile
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.progress import profiled, silent_unless_main

# Limits of a field, by their name in its metadata.
LIMITS = {
    "min": ("at least", operator.ge),
    "max": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}
# What takes less memory, by the flag that a script may have for it.
LESS_MEMORY = {
    "batch_size": "a smaller --batch_size",
    "accumulate": "--accumulate N (the same batch in N micro-batches)",
    "checkpoint_activations": "--checkpoint_activations",
    "image_size": "a smaller --image_size",
    "num_workers": "fewer --num_workers",
    "stream": "--stream (images are not kept in memory)",
}
DEVICES = ("auto", "cpu", "cuda", "mps")
INPUTS = (
    *("path_to_data", "path_to_train", "path_to_test", "indexes_path", "vocabulary_path"),
    *("model_dir", "model_path", "condition_model_dir", "guide_path", "init_from", "embeddings"),
)


class UserError(Exception):
    """An error that the user can fix: one line saying what, where, and what to do."""


@contextmanager
def user_error(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise errors of these kinds as a UserError: `message`, whose %s stands for the error."""
    try:
        yield
    except kinds as error:
        line = str(error) if isinstance(error, UserError) else one_line(error, limit=400)
        raise UserError(line.join(message.rsplit("%s", 1))) from error


class Stopped(Exception):
    """A signal asked the script to stop, and it did in good order."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; its state is saved")
        self.exit_code = 128 + signal_number


def integers(text: str) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4); nothing -> ()."""
    return tuple(map(int, text.split(","))) if text else ()


def height_and_width(text: str) -> tuple[int, int]:
    """`28` -> (28, 28), `24,40` or `24x40` -> (24, 40)."""
    match = re.fullmatch(r"([1-9]\d*)(?:[x,]([1-9]\d*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected H or H,W of 1 or more, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def two_numbers(text: str) -> tuple[float, float]:
    """`0.5,0.75` -> (0.5, 0.75)."""
    first, second = map(float, text.split(","))
    return first, second


def _value_type(annotation: typing.Any) -> Callable[[str], object]:
    """What turns a flag's text into a field of type `annotation`."""
    if isinstance(annotation, types.UnionType):  # X | None
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is not tuple:
        return annotation
    first, last = typing.get_args(annotation)
    if first is float:
        return two_numbers
    return integers if last is Ellipsis else height_and_width


def flag(default: typing.Any, text: str, **metadata: object) -> typing.Any:
    """A field of a config dataclass that is also a flag with this help text.

    Metadata: `choices`, `metavar`, `LIMITS`, and `needs` (see `reject_unused_flags`).
    """
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclasses.dataclass(frozen=True)
class Checked:
    """A dataclass that raises a ValueError for a field, or a part of it, beyond its `LIMITS`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            parts = value if isinstance(value, tuple) else (value,)
            for key, (words, holds) in LIMITS.items():
                limit = field.metadata.get(key)
                if limit is not None and not all(holds(part, limit) for part in parts):
                    raise ValueError(f"{field.name} must be {words} {limit}, got {value}")


def add_flags(parser: argparse.ArgumentParser, config_class: type, title: str) -> None:
    """Add a flag for each field of a config dataclass with a help text, under a title."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if "help" not in field.metadata:
            continue
        options: dict[str, typing.Any] = {"action": argparse.BooleanOptionalAction}
        if hints[field.name] is not bool:  # a preset may have turned on one that is
            options = {name: field.metadata.get(name) for name in ("choices", "metavar")}
            options["type"] = _value_type(hints[field.name])
        text = field.metadata["help"].replace("%", "%%")
        group.add_argument(f"--{field.name}", default=field.default, help=text, **options)


def read_flags(config_class: type, arguments: argparse.Namespace, **known: object) -> typing.Any:
    """A config from the parsed flags, and `known` fields. See also `reject_unused_flags`."""
    names = {field.name for field in dataclasses.fields(config_class) if "help" in field.metadata}
    values = {name: getattr(arguments, name) for name in names} | known
    config = build_or_error(config_class, **values)
    reject_unused_flags(config, arguments)
    return config


def reject_unused_flags(config: typing.Any, flags: argparse.Namespace) -> None:
    """A UserError for a given flag without effect: another that its field `needs` is 0 or off."""
    for field in dataclasses.fields(config):
        needed = field.metadata.get("needs")
        if needed and field.name in flags.given and not getattr(config, needed):
            above = "" if isinstance(getattr(config, needed), bool | str) else " above 0"
            raise UserError(
                f"--{field.name} has no effect without --{needed}{above}; leave it out, or set both"
            )


def build_or_error(
    make: Callable[..., typing.Any], *arguments: object, **values: object
) -> typing.Any:
    """`make(*arguments, **values)`; a UserError if it rejects a value, or lacks something."""
    with user_error("%s", ValueError, ImportError, OSError):
        return make(*arguments, **values)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, got {text!r}")
    return int(text)


class Flags(argparse.Namespace):
    """Parsed flags.

    `given` names those on the command line (no default), `stored` those whose values are of the
    training that `--resume` continues.
    """

    __slots__ = ("given", "stored")  # apart from the flags themselves, which are vars()
    debug, profile = False, ""  # where they are not given


class HelpFormatter(argparse.HelpFormatter):
    """Every flag with its default, unless its help says that, and a name for its value by type."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        value = action.default
        if isinstance(action, argparse.BooleanOptionalAction):
            value = "on" if value else "off"
        elif isinstance(value, tuple | list):
            value = ",".join(map(str, value))
        nothing = value is None or value is False or value in ("", argparse.SUPPRESS)
        if nothing or "default" in (action.help or "default"):
            return action.help
        return f"{action.help} (default: {str(value).replace('%', '%%')})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        by_type = {int: "N", positive: "N", float: "X", height_and_width: "H,W"}
        by_type |= {integers: "N,N,...", two_numbers: "X,X"}
        name = action.dest
        if name.startswith("path") or name.endswith(("_dir", "_path", "_weights", "checkpoint")):
            return "PATH"
        return by_type.get(action.type, name.rpartition("_")[2].upper())


class Parser(argparse.ArgumentParser):
    """A parser that makes `Flags`, with --debug and --profile, also in subcommands."""

    def __init__(self, **options: typing.Any) -> None:
        own: dict[str, typing.Any] = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(**own | options)
        debug = "show the traceback of an error, not only its line"
        trace = "profile a short run: write a trace for chrome://tracing, print what takes longest"
        absent = argparse.SUPPRESS  # a subcommand's default would replace what is given before it
        self.add_argument("--debug", action="store_true", default=absent, help=debug)
        self.add_argument("--profile", default=absent, metavar="FILE", help=trace)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        absent: list[object] = []  # argparse extends a copy of it where an action appends
        probe = argparse.Namespace(**{action.dest: absent for action in self._actions})
        super().parse_known_args(args, probe)
        flags, rest = super().parse_known_args(args, namespace or Flags())
        flags.given = frozenset(name for name, x in vars(probe).items() if x is not absent)
        flags.stored = frozenset()
        return flags, rest


def make_parser(description: str | None, prog: str | None = None) -> Parser:
    """The parser that all scripts start from; `prog` is how one that `python -m` runs is called."""
    return Parser(description=description, prog=prog)


def configure_process() -> None:
    """Set defaults of libraries in the environment, before torch is imported."""
    # OpenMP's threads spin while they wait for each other. Beside another busy process the one
    # waited for has no core, and a training takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # MLflow waits for four minutes in each call unless it is told otherwise.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def run(
    main: Callable[[typing.Any], None],
    parser: argparse.ArgumentParser,
    is_first: Callable[[], bool] = lambda: True,
) -> None:
    """Parse the flags, run `main`, and exit: 0, 2 after an error of the user, 130 or 143.

    `is_first`: of several processes, whether this one is the first to fail, which then says why.
    """
    with silent_unless_main():
        arguments = parser.parse_args()
    configure_process()
    try:
        if getattr(arguments, "output_dir", None) and os.environ.get("RANK", "0") == "0":
            check_writable(Path(arguments.output_dir))
        if trace := getattr(arguments, "profile", ""):
            check_writable(Path(trace).parent)
        with silent_unless_main(), profiled(trace):
            main(arguments)
    except (Stopped, KeyboardInterrupt) as stop:
        if is_first():
            print(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(getattr(stop, "exit_code", 130))
    except Exception as error:
        if not is_first():
            sys.exit(2)
        line = error_line(error, arguments)
        if not line or (arguments.debug and not isinstance(error, UserError)):
            raise
        if arguments.debug:
            traceback.print_exc()
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"error: {rank}{printable(line)}", file=sys.stderr)
        sys.exit(2)


def start_script() -> None:
    """Configure the process and refuse missing inputs; scripts call this before they import torch.

    Addresses such as runs:/..., patterns and a folder that is being replaced (.old) pass.
    """
    configure_process()
    given = dict(itertools.pairwise(sys.argv))
    given |= dict(word.split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
    for name in INPUTS:
        value = given.get(f"--{name}") or "."
        if not {*value} & {*":*?[{,"} and not any(map(os.path.exists, (value, f"{value}.old"))):
            if os.environ.get("RANK", "0") == "0":
                line = f"no such file or folder: {value}; give --{name} one that exists"
                print(f"error: {printable(line)}", file=sys.stderr)
            sys.exit(2)


def check_writable(folder: Path) -> None:
    """A UserError if `folder` cannot be made or written, before any work is done for it."""
    nearest = next(x for x in (folder, *folder.absolute().parents) if x.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        text = f"cannot write to {folder}: {error.strerror}; choose another --output_dir"
        raise UserError(text) from error


def error_line(error: typing.Any, arguments: argparse.Namespace) -> str:
    """What went wrong and what to do, for an error that a user can cause; "" for others."""
    if isinstance(error, UserError):
        return str(error)
    signs = ("out of memory", "can't allocate memory", "not enough memory")  # of CPU or GPU
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in signs):
        ways = [way for name, way in LESS_MEMORY.items() if hasattr(arguments, name)]
        advice = ", or ".join(ways) or "a machine with more"
        return f"out of memory: {one_line(error)}; use {advice}"
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no room is left on the disk ({error}); what was saved before is intact: make room, "
            "and run it again (a training with --resume)"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot use {error.filename}: {error.strerror}; check who may read or write it"
    return ""


def printable(text: str) -> str:
    """A text as one line that cannot steer the terminal, whatever names and labels it quotes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException, limit: int = 200) -> str:
    """What an error says, in one short line; its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def command_line() -> str:
    """The command that this process was started with."""
    return shlex.join(["python", *sys.argv])


def unused(path: Path) -> Path:
    """A new folder: `path`, or where that exists the first of path-2, path-3, ...

    It is created at once, so that of several processes each gets its own.
    """
    check_writable(path)
    folder, numbers = path, itertools.count(2)
    while True:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        folder = path.with_name(f"{path.name}-{next(numbers)}")


def add_inference_flags(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The flags of all scripts that run a model without training it."""
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    parser.add_argument("--batch_size", type=positive, default=batch_size, help="images at once")


def command(script: object, *words: object) -> str:
    """The command line that calls a script of this repository from the current folder."""
    path = script if Path(str(script)).is_file() else Path(__file__).parents[1] / str(script)
    return f"python {shlex.join(map(str, (path, *words)))}"


def next_command(script: object, *words: object) -> str:
    """The line that a script ends with: what to type next."""
    return f"\nnext:\n  {command(script, *words)}"


def changed_flags(config: typing.Any, config_class: type) -> list[object]:
    """The words of a command line that set those fields of a config that are not their default."""
    words: list[object] = []
    for field in dataclasses.fields(config_class):
        value, name = getattr(config, field.name), f"--{field.name}"
        if value != field.default:
            words += [name] if value is True else [name, value]
    return words


def first_few(items: Sequence[str], limit: int = 5) -> str:
    """The first of `items`: `a, b, c, d, e and 7 more`."""
    rest = len(items) - min(limit, len(items))
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest else "")
