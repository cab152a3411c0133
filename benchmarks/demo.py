"""Where the time of `make demo` goes, by stage: start-up, MLflow, data, steps, evaluation, rest.

Every stage is a process of its own, as in the demo. Its functions are timed where they are called,
each without the time of those that it calls in turn. Work in threads, such as uploads, counts where
the stage waits for it.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks import record
from utils import cli, demo

SPANS = {  # a column of the table: the functions that it times, without a module those of a script
    "MLflow": (
        "utils.addresses:is_installed",
        "utils.addresses:open_client",
        "utils.tracking.run:Run.__init__",
        "utils.tracking.run:Run.close",
    ),
    "data": (
        "utils.data.sources:digest",
        "utils.data.images:ImageDataset.__init__",
    ),
    "steps": (
        "vqvae.train_step:forward_backward",
        "utils.training.loop:optimizer_step",
        ":train_step",
        "transformer.gpt:GPT.training_inputs",
    ),
    "evaluation": (":evaluate_and_log", ":report_best"),
    "checkpoints": (
        "utils.training.checkpoint:Checkpointer.save",
        "utils.training.checkpoint:Checkpointer.save_model",
    ),
    "inference": (
        ":quantize",
        ":write_images",
        "transformer.sampling:generate",
    ),
}
COLUMNS = ("start-up", *SPANS, "rest", "whole", "CPU")


class Spans:
    """Seconds by name; those of an inner span do not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]  # seconds of the spans inside each open one

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts for `name`."""

        @functools.wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                passed = time.perf_counter() - start
                self.seconds[name] += passed - self._inner.pop()
                self._inner[-1] += passed

        return wrapper

    def wrap(self, name: str, place: Any, path: str) -> None:
        """Replace the function at `path` inside `place`, if there is one, by its timed version."""
        *owners, last = path.split(".")
        owner = functools.reduce(getattr, owners, place)
        if hasattr(owner, last):
            setattr(owner, last, self.timed(name, getattr(owner, last)))


def run_stage(folder: Path, words: list[str]) -> None:
    """`demo.run_script`, whose spans go into a file of `folder`."""
    spans, process = Spans(), psutil.Process()
    name = words[words[0] == "-m"].removesuffix(".py").replace("/", ".")
    sys.argv = words[words[0] == "-m" :]
    multiprocessing.set_start_method(None, force=True)
    functions = [(column, *path.split(":")) for column in SPANS for path in SPANS[column]]
    for column, module, function in functions:
        if module:
            spans.wrap(column, importlib.import_module(module), function)
    script = importlib.import_module(name)  # imports what is wrapped by now
    for column, module, function in functions:
        if not module:
            spans.wrap(column, script, function)
    spans.seconds["start-up"] = time.time() - process.create_time()
    try:
        cli.run(script.main, script.make_parser())
    finally:
        whole, cpu = time.time() - process.create_time(), process.cpu_times()
        spans.seconds["rest"] = whole - sum(spans.seconds.values())
        spans.seconds |= {"whole": whole, "CPU": cpu.user + cpu.system}
        (folder / f"{name}.json").write_text(json.dumps(spans.seconds))


def main(flags: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        demo.run_steps(functools.partial(run_stage, Path(name)))
        whole = time.perf_counter() - start
        files = sorted(Path(name).iterdir(), key=lambda file: file.stat().st_mtime)
        stages = {file.stem: json.loads(file.read_text()) for file in files}
    print(f"\nseconds of the stages, {whole:.0f} with their processes and the classifier\n")
    print(f"| stage | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for stage, seconds in stages.items():
        values = (f"{seconds.get(column, 0):.1f}" for column in COLUMNS)
        print(f"| {stage.rpartition('.')[2]} | {' | '.join(values)} |")
    print(f"\nwritten: {record.write('demo', {'whole': whole, 'stages': stages})}")


if __name__ == "__main__":
    cli.run(main, cli.make_parser(__doc__, prog="python -m benchmarks.demo"))
