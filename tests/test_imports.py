"""The rules of who may import whom, and what no file may do, held by reading the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.reading import (
    ENTRY_POINTS,
    ROOT,
    Source,
    cycles,
    import_graph,
    read_sources,
    tracked,
    walk,
)

SOURCES = read_sources()
EVERYTHING = SOURCES | {
    path: Source(path, text, ast.parse(text))
    for path in tracked()
    if path.startswith("benchmarks/")
    for text in [(ROOT / path).read_text(encoding="utf-8")]
}
SCRIPTS = set(ENTRY_POINTS)
BOTTOM = (
    "cli",
    "files",
    "progress",
    "foreign",
    "addresses",
    "distributed",
    "provenance",
    "figures",
)
LAYERS = {  # part of utils: the parts that it may import beside itself
    **dict.fromkeys(BOTTOM, BOTTOM),
    "data": BOTTOM,
    "evaluation": (*BOTTOM, "data"),
    "training": (*BOTTOM, "data", "evaluation"),
    "tracking": (*BOTTOM, "data"),
}
WITH_MLFLOW = ("utils/tracking/store.py", "utils/addresses.py")
WITH_TRITON = "vqvae/quantizers/fused_lookup.py"  # imported where there is a GPU for it
PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
SLOW = ("mlflow", "pandas", "matplotlib", "scipy", "sklearn", "pyarrow", "lpips", "transformers")
SLOW += ("torch._dynamo", "torch.nn.attention.flex_attention", "skimage")


def imports(source: Source, *, only_at_import: bool = False) -> set[str]:
    """Every module that a file imports; `from a import b` counts as a and as a.b."""
    found = set()
    for node in walk(source.tree, late=not only_at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def in_package(name: str) -> list[Source]:
    """The files of a package that are no scripts."""
    found = (source for path, source in SOURCES.items() if path.startswith(f"{name}/"))
    return [source for source in found if source.path not in SCRIPTS]


def part_of(module: str) -> str:
    """utils.data.images and utils/data/images.py -> data, utils/cli.py -> cli."""
    return module.removesuffix(".py").replace("/", ".").split(".")[1]


@pytest.mark.parametrize("package", ["vqvae", "transformer"])
def test_the_models_need_only_torch(package: str) -> None:
    allowed = {package, "torch", "torchvision", "safetensors", "lpips"} | sys.stdlib_module_names
    for source in in_package(package):
        kernel = {"triton"} if source.path == WITH_TRITON else set()  # comes with torch for CUDA
        assert tops(imports(source)) <= allowed | kernel, source.path
        assert "lpips" not in tops(imports(source, only_at_import=True)), source.path


@pytest.mark.parametrize(("package", "other"), [("vqvae", "transformer"), ("transformer", "vqvae")])
def test_the_models_do_not_import_each_other(package: str, other: str) -> None:
    for path, source in SOURCES.items():
        assert not (path.startswith(f"{package}/") and other in tops(imports(source))), path


@pytest.mark.parametrize("package", ["vqvae", "transformer"])
def test_the_models_mention_no_flags(package: str) -> None:
    for source in in_package(package):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = node.value.replace("`", " ").replace("(", " ").split()
                flags = [word for word in words if word.startswith("--") and word[2:3].isalpha()]
                assert not flags, f"{source.path}:{node.lineno}: {flags}"


def test_utils_import_no_model() -> None:
    for source in in_package("utils"):
        assert not {"vqvae", "transformer"} & tops(imports(source)), source.path


def test_layers_of_utils() -> None:
    graph = import_graph(SOURCES)
    for source in in_package("utils"):
        if source.path == "utils/__init__.py":
            continue
        part = part_of(source.path)
        assert part in LAYERS, f"{source.path} belongs to no layer"
        below = {part_of(path) for path in graph[source.path] if path.startswith("utils/")}
        allowed = {part, "__init__", *LAYERS[part]}
        assert below <= allowed, f"{source.path} imports utils.{below - allowed}"


def test_only_scripts_import_tracking() -> None:
    for path, source in SOURCES.items():
        if path not in SCRIPTS and not path.startswith("utils/tracking/"):
            found = [name for name in imports(source) if name.startswith("utils.tracking")]
            assert not found, path


def test_no_import_cycles() -> None:
    assert cycles(import_graph(SOURCES)) == []


def test_only_three_files_import_mlflow_and_late() -> None:
    for path, source in SOURCES.items():
        if path not in WITH_MLFLOW:
            assert "mlflow" not in tops(imports(source)), path
        assert "mlflow" not in tops(imports(source, only_at_import=True)), path


def test_one_file_of_utils_and_one_of_vqvae_communicate() -> None:
    found = [
        path
        for path, source in SOURCES.items()
        if any(name.startswith("torch.distributed") for name in imports(source))
        or any(
            ast.unparse(node).startswith("torch.distributed.")
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute)
        )
    ]
    assert [path.split("/")[0] for path in sorted(found)] == ["utils", "vqvae"], found
    assert "utils/distributed.py" in found


def test_scripts_never_import_scripts() -> None:
    modules = {SOURCES[path].module for path in SCRIPTS if path in SOURCES}
    for path, source in EVERYTHING.items():
        if not path.startswith("benchmarks/"):
            assert not imports(source) & (modules - {source.module}), path


def test_nothing_is_pickled() -> None:
    for path, source in EVERYTHING.items():
        assert not tops(imports(source)) & set(PICKLES), path
        for call in (node for node in ast.walk(source.tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if path != "vqvae/convert.py":  # writes what other projects read
                assert name != "torch.save", path
            if name == "torch.load":
                assert "weights_only=True" in ast.unparse(call), path
            if name == "np.load":
                assert "allow_pickle=False" in ast.unparse(call), path


def test_nothing_is_mocked_outside_tests() -> None:
    for path, source in EVERYTHING.items():
        assert not any(name.startswith("unittest") for name in imports(source)), path


def environment_edits(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that change os.environ."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            edits = ("setdefault", "update", "pop", "clear", "popitem")
            if name in ("os.putenv", "os.unsetenv") or (
                name.removeprefix("os.").startswith("environ.") and name.endswith(edits)
            ):
                yield node
        if any(
            ast.unparse(target).removeprefix("os.").startswith("environ[")
            or ast.unparse(target) in ("os.environ", "environ")
            for target in targets
        ):
            yield node


def test_one_function_changes_the_environment() -> None:
    for path, source in SOURCES.items():
        allowed = [
            edit
            for node in source.tree.body
            if isinstance(node, ast.FunctionDef) and node.name == "configure_process"
            for edit in environment_edits(node)
            if path == "utils/cli.py"
        ]
        edits = [node for node in environment_edits(source.tree) if node not in allowed]
        places = [f"{path}:{getattr(node, 'lineno', 0)}" for node in edits]
        assert not edits, places


def test_nothing_happens_at_import() -> None:
    """Beside imports, definitions and constants only the script guard stands at the top level."""
    for path, source in EVERYTHING.items():
        for node in source.tree.body:
            for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
                if isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign):
                    name = ast.unparse(call.func)
                    forbidden = ("print", "open", "parse_args", "is_available", "ArgumentParser")
                    assert not name.endswith(forbidden), f"{path}: {name} at import"


def test_importing_the_scripts_imports_nothing_slow() -> None:
    """`import torch` takes most of the time that --help does."""
    names = [SOURCES[path].module for path in sorted(SCRIPTS) if path in SOURCES]
    names = [name for name in names if not name.endswith("__main__")]
    code = f"import sys, {', '.join(names)}\nprint(*sorted({set(SLOW)!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
