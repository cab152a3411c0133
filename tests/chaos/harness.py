"""What a row of the chaos table is, and how all of them are run and printed."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    """What came of a row.

    Attributes:
        count: how many cases there were, as counted while they ran.
        held: whether all of them did what they must; None where none could be run.
        detail: what was seen, in one line of numbers.
    """

    count: int
    held: bool | None
    detail: str


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: for `--only`.
        test: what is done.
        run: does it a number of times, in an empty working folder without an MLflow address.
        full, quick: how many times.
    """

    name: str
    test: str
    run: Callable[[int], Result]
    full: int
    quick: int


def run_row(row: Row, *, quick: bool) -> dict[str, object]:
    """Run a row in a folder of its own; one that raises did not hold."""
    start = time.perf_counter()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory(prefix=f"chaos-{row.name}-") as folder, chdir(folder):
        try:
            result = row.run(row.quick if quick else row.full)
        except Exception as error:
            traceback.print_exc()
            result = Result(0, False, f"{type(error).__name__}: {error}")
    seconds = round(time.perf_counter() - start, 1)
    return {"test": row.test, **asdict(result), "seconds": seconds}


def print_table(results: Iterable[dict[str, object]]) -> None:
    """The table in Markdown, as the README shows it."""
    print("| Test | Count | Held | What was seen |\n|---|---|---|---|")
    for result in results:
        held = {True: "yes", False: "**no**", None: "not run"}[result["held"]]
        print(f"| {result['test']} | {result['count']:,} | {held} | {result['detail']} |")
