"""The rules of who may import whom, and what no file may do, held by reading the source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not any(part.startswith(".") for part in path.parts)
    and path.relative_to(ROOT).parts[0] not in ("data", "outputs")
)
SCRIPTS = {
    *(path.stem for path in ROOT.glob("*.py")),
    "vqvae.images_from_indexes",
    "vqvae.pretrained",
    "transformer.pretrained",
    "utils.demo",
    "utils.datasets",
    "utils.lineage",
    "utils.tracking.__main__",
}
PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, only_at_import: bool = False) -> set[str]:
    """Every module that a file imports; `from a import b` counts as a and as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    nodes = list(tree.body) if only_at_import else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def in_package(name: str) -> list[Path]:
    return [p for p in FILES if module_of(p).split(".")[0] == name and module_of(p) not in SCRIPTS]


@pytest.mark.parametrize("package", ["vqvae", "transformer"])
def test_the_models_need_only_torch(package: str) -> None:
    allowed = {package, "torch", "torchvision", "safetensors", "lpips"} | sys.stdlib_module_names
    for path in in_package(package):
        assert tops(imports(path)) <= allowed, path
        assert "lpips" not in tops(imports(path, only_at_import=True)), path


def test_utils_know_no_model() -> None:
    for path in in_package("utils"):
        assert not {"vqvae", "transformer"} & tops(imports(path)), path


def test_only_one_file_imports_mlflow_and_late() -> None:
    for path in FILES:
        if "tests" in path.parts or "benchmarks" in path.parts:
            continue
        if module_of(path) != "utils.tracking.gateway" and module_of(path) != "utils.addresses":
            assert "mlflow" not in tops(imports(path)), path
        assert "mlflow" not in tops(imports(path, only_at_import=True)), path


def test_scripts_never_import_scripts() -> None:
    for path in FILES:
        if "tests" not in path.parts:
            assert not imports(path) & (SCRIPTS - {module_of(path)}), path


def test_nothing_is_pickled() -> None:
    for path in FILES:
        if "tests" in path.parts:
            continue
        assert not tops(imports(path)) & set(PICKLES), path
        for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
            name = ast.unparse(call.func)
            if module_of(path) != "vqvae.pretrained":  # writes what other projects read
                assert name != "torch.save", path
            if name == "torch.load":
                assert "weights_only=True" in ast.unparse(call), path
            if name == "np.load":
                assert "allow_pickle=False" in ast.unparse(call), path


def test_nothing_happens_at_import() -> None:
    """Beside imports, definitions and constants only the script guard stands at the top level."""
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
                if isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign):
                    name = ast.unparse(call.func)
                    forbidden = ("print", "open", "parse_args", "is_available", "ArgumentParser")
                    assert not name.endswith(forbidden), f"{path}: {name} at import"
