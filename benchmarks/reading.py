"""How much a reader has to read: lines, imports, and the files that one step executes.

python -m benchmarks.reading                        the budgets, each with its measured value
python -m benchmarks.reading --list                 every file and the longest functions as well

Everything is measured: lines and imports from `git ls-files` and `ast`, the files of a step by
tracing (`sys.settrace`) a tiny training and a tiny generation as a user would start them.
"""

import argparse
import ast
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "train_vqvae.py",
    "quantize_dataset.py",
    "train.py",
    "transformer_generation.py",
    "evaluate.py",
)
# What a user starts, and so may combine layers. No other file imports one of these.
ENTRY_POINTS = (
    *SCRIPTS,
    "playground.py",
    "vqvae/images_from_indexes.py",
    "vqvae/convert.py",
    "transformer/convert.py",
    "utils/demo.py",
    "utils/embeddings.py",
    "utils/hub.py",
    "utils/plan.py",
    "utils/data/download.py",
    "utils/tracking/__main__.py",
    "utils/tracking/lineage.py",
)

# name: the most that is allowed
BUDGETS = {
    # 11,000 for the features before the restructuring, 5,000 for those added since.
    "source lines": 16_000,
    "lines of the longest file": 400,
    "lines of the longest function": 100,
    "characters of the longest line": 100,
    "import cycles": 0,
    "train.py: files imported": 40,
    "train.py: lines imported": 6_500,  # 5,000 and 1,500, likewise
    "train.py: lines of main()": 80,
    "train.py: lines of its loop": 30,
    "train_vqvae.py: lines of main()": 80,
    "train_vqvae.py: lines of its loop": 30,
    "files of one GPT training step": 9,
    "files of one sampling step": 6,
    "files of resume": 4,
}
FORWARD = ("GPT.forward", "GPT.step")  # a step of sampling lasts from one call to the next
RESUME = ("find_checkpoint", "restore")  # the functions that find and restore a training


@dataclass(frozen=True)
class Source:
    """One file of the repository: where it lies, its text and its syntax tree."""

    path: str  # from the root, with forward slashes
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    def code(self) -> Iterator[str]:
        """The lines that are neither blank nor part of an import or a docstring."""
        aside: set[int] = set()
        for node in ast.walk(self.tree):
            text = node.value if isinstance(node, ast.Expr) else None
            prose = isinstance(text, ast.Constant) and isinstance(text.value, str)
            if prose or isinstance(node, ast.Import | ast.ImportFrom):
                aside |= set(range(node.lineno, node.lineno + length(node)))
        for number, line in enumerate(self.text.splitlines(), 1):
            if line.strip() and number not in aside:
                yield line

    def functions(self) -> Iterator[tuple[str, int]]:
        """Name and number of lines of each function, nested ones included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, length(node)


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def tracked(suffix: str = ".py") -> list[str]:
    """Files that git tracks, or all files where the folder is not a repository."""
    listed = subprocess.run(
        ["git", "ls-files", f"*{suffix}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    names = (path.relative_to(ROOT) for path in ROOT.rglob(f"*{suffix}"))
    return sorted(name.as_posix() for name in names if not name.parts[0].startswith("."))


@cache
def read_sources() -> dict[str, Source]:
    """All Python files outside tests and benchmarks, by path."""
    sources = {}
    for path in tracked():
        if not path.startswith(("tests/", "benchmarks/")):
            text = (ROOT / path).read_text(encoding="utf-8")
            sources[path] = Source(path, text, ast.parse(text))
    return sources


def walk(tree: ast.AST, *, late: bool = True) -> Iterator[ast.AST]:
    """All nodes; without `late` only those that importing the file executes: no function bodies."""
    yield tree
    if late or not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(tree):
            yield from walk(child, late=late)


def imports_of(source: Source, modules: dict[str, str], *, late: bool = True) -> set[str]:
    """Paths of the repository's files that a file imports: anywhere, or only when it is imported.

    Imports for types always count. `from package import name` counts as the module `package.name`
    if there is one, else as the package's __init__.py.
    """
    found = set()
    for node in walk(source.tree, late=late):
        names: Iterable[str] = ()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in full]
        found |= {modules[name] for name in names if name in modules}
    return found - {source.path}


def import_graph(sources: dict[str, Source], *, late: bool = True) -> dict[str, set[str]]:
    """For each file, the files that it imports."""
    modules = {source.module: path for path, source in sources.items()}
    return {path: imports_of(source, modules, late=late) for path, source in sources.items()}


def reach(start: str, graph: dict[str, set[str]]) -> set[str]:
    """What one gets to from `start` over one edge or more."""
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def closure(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Files that are imported when `start` is, with the packages' __init__.py, and itself."""
    with_packages = {
        path: imported
        | {f"{parent.as_posix()}/__init__.py" for parent in Path(path).parents} & graph.keys()
        for path, imported in graph.items()
    }
    return {start} | reach(start, with_packages)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other, directly or through others.

    Only explicit imports count, not that of a package's __init__.py, which Python runs by itself.
    """
    reached = {start: reach(start, graph) for start in graph}
    groups = {
        tuple(sorted(other for other in reached[path] if path in reached[other]))
        for path in graph
        if path in reached[path]
    }
    return [list(group) for group in sorted(groups)]


def main_of(source: Source) -> tuple[ast.FunctionDef, ast.For | ast.While]:
    """The function main() of a script and the longest loop in it."""
    mains = (n for n in source.tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    main = next(mains)
    loops = [node for node in ast.walk(main) if isinstance(node, ast.For | ast.While)]
    return main, max(loops, key=length)


class Tracer:
    """Notes which files of the repository run in a window of a program's main thread.

    A window is opened and closed by `mark`, or is open while a function of `inside` runs.
    """

    def __init__(
        self,
        mark: Callable[[FrameType, str], bool] = lambda frame, event: False,
        hits: tuple[int, int] = (2, 3),
        inside: tuple[str, ...] = (),
    ) -> None:
        self.mark, self.hits, self.inside = mark, hits, inside
        self.seen = 0
        self.files: set[str] = set()
        self._names: dict[CodeType, str] = {}

    def _path(self, code: CodeType) -> str:
        if code not in self._names:
            path = Path(code.co_filename)
            known = path.is_absolute() and path.is_relative_to(ROOT)
            self._names[code] = path.relative_to(ROOT).as_posix() if known else ""
        return self._names[code]

    def _is_open(self, frame: FrameType) -> bool:
        if not self.inside:
            return self.hits[0] <= self.seen < self.hits[1]
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_name in self.inside and self._path(caller.f_code) in read_sources():
                return True
            caller = caller.f_back
        return False

    def _trace(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        path = self._path(frame.f_code)
        if path not in read_sources():
            return None
        self.seen += self.mark(frame, event)
        if self._is_open(frame):
            self.files.add(path)
        return self._trace if frame.f_code.co_name == "main" else None

    def run(self, call: Callable[[], object]) -> set[str]:
        """Call a function; the files that ran in the window."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(before)
        if not self.files:
            raise RuntimeError("nothing was traced: has a function been renamed?")
        return self.files


def call_script(name: str, *words: object) -> None:
    """Run a script in this process, as from the command line."""
    import importlib

    from utils import cli

    module = importlib.import_module(name)
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, words)]
    try:
        cli.run(module.main, module.make_parser())
    finally:
        sys.argv = before


def trace_steps() -> dict[str, set[str]]:
    """Files that run in one training step of the GPT, in one step of sampling, and in resume.

    The steps are ordinary ones: nothing is logged, evaluated or saved in them. The data are 16
    grids of 4x4 indices, the GPT has one layer of 16.
    """
    loop = main_of(read_sources()["train.py"])[1].body[0].lineno

    def at_loop(frame: FrameType, event: str) -> bool:
        is_main = Path(frame.f_code.co_filename) == ROOT / "train.py"
        return event == "line" and is_main and frame.f_lineno == loop

    def at_forward(frame: FrameType, event: str) -> bool:
        is_model = Path(frame.f_code.co_filename) == ROOT / "transformer/gpt.py"
        return event == "call" and is_model and frame.f_code.co_qualname in FORWARD

    train = (
        *("train", "--path_to_data", "indices.txt", "--latent_dim", "4,4"),
        *("--num_layers", 1, "--dim", 16, "--num_heads", 2, "--batch_size", 2),
        *("--evaluate_every", 4, "--device", "cpu", "--output_dir", "gpt"),
    )
    sample = ("transformer_generation", "--model_path", "gpt", "--num_images", 1)
    with in_new_folder(), contextlib.redirect_stdout(sys.stderr):
        grids = [" ".join(str((row * column) % 7) for column in range(16)) for row in range(16)]
        Path("indices.txt").write_text("\n".join(grids) + "\n", encoding="utf-8")
        return {
            "one GPT training step": Tracer(at_loop).run(
                lambda: call_script(*train, "--max_steps", 4)
            ),
            "one sampling step": Tracer(at_forward, (4, 5)).run(
                lambda: call_script(*sample, "--output_dir", "samples", "--device", "cpu")
            ),
            "resume": Tracer(inside=RESUME).run(
                lambda: call_script(*train, "--max_steps", 5, "--resume", "gpt")
            ),
        }


@contextlib.contextmanager
def in_new_folder() -> Iterator[None]:
    """Work in an empty folder, with MLflow's store in it."""
    before, uri = Path.cwd(), os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            if uri is not None:
                os.environ["MLFLOW_TRACKING_URI"] = uri


def measure(steps: dict[str, set[str]] | None = None) -> dict[str, float]:
    """The value of every budget; those of `steps` only where they were traced."""
    sources = read_sources()
    graph = import_graph(sources)
    at_import = import_graph(sources, late=False)
    lines = [line for source in sources.values() for line in source.text.splitlines()]
    code = [line for source in sources.values() for line in source.code()]
    functions = [size for source in sources.values() for _, size in source.functions()]
    values: dict[str, float] = {
        "source lines": len(lines),
        "lines of the longest file": max(source.lines for source in sources.values()),
        "lines of the longest function": max(functions),
        "characters of the longest line": max(map(len, lines)),
        # 47.1 before the restructuring. Docstrings and imports aside: they hide dense code.
        "mean characters of a line of code": round(sum(map(len, code)) / len(code), 1),
        "import cycles": len(cycles(graph)),
    }
    for name, edges in (("imported", at_import), ("imported, late ones as well", graph)):
        train = closure("train.py", edges)
        values[f"train.py: files {name}"] = len(train)
        values[f"train.py: lines {name}"] = sum(sources[path].lines for path in train)
    for name in ("train.py", "train_vqvae.py"):
        main, loop = main_of(sources[name])
        values[f"{name}: lines of main()"] = length(main)
        values[f"{name}: lines of its loop"] = length(loop)
    values |= {f"files of {name}": len(files) for name, files in (steps or {}).items()}
    return values


def describe(sources: dict[str, Source], steps: dict[str, set[str]]) -> Iterator[str]:
    """Every file with its lines, closures of the scripts, longest functions, files of the steps."""
    graph = import_graph(sources)
    at_import = import_graph(sources, late=False)
    for path in sorted(sources):
        yield f"{sources[path].lines:>6}  {path}"
    yield "\nimported by each script at its start: files, lines; with late imports: files, lines"
    for name in SCRIPTS:
        found = (closure(name, edges) for edges in (at_import, graph))
        sizes = (f"{len(files):>6} {sum(sources[p].lines for p in files):>6}" for files in found)
        yield f"{' '.join(sizes)}  {name}"
    yield "\nlongest functions"
    functions = ((n, name, path) for path, s in sources.items() for name, n in s.functions())
    for size, name, path in sorted(functions, reverse=True)[:12]:
        yield f"{size:>6}  {path}: {name}()"
    for group in cycles(graph):
        yield f"\nimport cycle: {', '.join(group)}"
    for name, files in steps.items():
        yield f"\nfiles of {name}: {', '.join(sorted(files))}"


def main(arguments: argparse.Namespace) -> None:
    steps = trace_steps()
    if arguments.list:
        print("\n".join(describe(read_sources(), steps)), end="\n\n")
    values = measure(steps)
    for name, value in values.items():
        verdict = ""  # no budget, for information
        if name in BUDGETS:
            verdict = f"{BUDGETS[name]:>10,}  {'ok' if value <= BUDGETS[name] else 'over'}"
        print(f"{name:<42} {value:>10,} {verdict}".rstrip())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="every file as well")
    main(parser.parse_args())
