"""The budgets of what a reader has to read, which benchmarks/reading.py measures."""

import ast
from pathlib import Path

import pytest

from benchmarks import architecture, reading
from benchmarks.reading import BUDGETS, SCRIPTS, Source

STEPS = [name for name in BUDGETS if name.startswith("files of")]


@pytest.fixture(scope="module")
def values() -> dict[str, float]:
    return reading.measure()


@pytest.mark.parametrize("name", [name for name in BUDGETS if name not in STEPS])
def test_budget(name: str, values: dict[str, float]) -> None:
    assert values[name] <= BUDGETS[name]


@pytest.mark.filterwarnings("ignore")  # of what MLflow uses
def test_files_of_a_step() -> None:
    steps = reading.trace_steps()
    assert "train.py" in steps["one GPT training step"]
    assert "transformer/gpt.py" in steps["one sampling step"]
    values = reading.measure(steps)
    assert {name: values[name] for name in STEPS if values[name] > BUDGETS[name]} == {}


def graph(*, late: bool = True, **texts: str) -> dict[str, set[str]]:
    """The imports of files, whose names are given with __ for a slash."""
    paths = {name.replace("__", "/") + ".py": text for name, text in texts.items()}
    sources = {path: Source(path, text, ast.parse(text)) for path, text in paths.items()}
    return reading.import_graph(sources, late=late)


def test_imports_are_found_wherever_they_stand() -> None:
    late = "def f():\n    import b.c\n"
    for_types = "if TYPE_CHECKING:\n    from a import f\n"
    found = graph(a=late, b__c=for_types, d="from b import c")
    assert found == {"a.py": {"b/c.py"}, "b/c.py": {"a.py"}, "d.py": {"b/c.py"}}
    assert reading.cycles(found) == [["a.py", "b/c.py"]]
    assert reading.closure("d.py", found) == {"a.py", "b/c.py", "d.py"}
    assert reading.closure("a.py", found) == {"a.py", "b/c.py"}


@pytest.mark.parametrize(
    "text",
    [
        "import b",
        "class A:\n    import b",
        "if TYPE_CHECKING:\n    import b",
        "try:\n    import b\nexcept ImportError:\n    b = None",
    ],
)
def test_what_importing_a_file_executes(text: str) -> None:
    text += "\ndef f():\n    import d\nclass C:\n    async def g(self):\n        import d\n"
    files = {"a": text, "b": "import c", "c": "", "d": "import e", "e": ""}
    at_import = {"a.py", "b.py", "c.py"}
    assert reading.closure("a.py", graph(late=False, **files)) == at_import
    assert reading.closure("a.py", graph(**files)) == at_import | {"d.py", "e.py"}


def test_no_cycle_where_files_only_share_what_they_import() -> None:
    found = graph(a="import b, c", b="import d", c="import d, numpy", d="import sys")
    assert reading.cycles(found) == []


def test_prose_and_imports_are_no_code() -> None:
    text = '"""Prose\nof two lines."""\n\nimport a\nfrom b import (\n    c,\n)\n\nx = "text"\n'
    assert [*Source("x.py", text, ast.parse(text)).code()] == ['x = "text"']


def test_main_and_its_loop() -> None:
    text = "def main():\n    for a in b:\n        f(a)\n    while c:\n        f(c)\n        g(c)\n"
    main, loop = reading.main_of(Source("x.py", text, ast.parse(text)))
    assert (reading.length(main), reading.length(loop)) == (6, 3)


def test_the_scripts_exist_and_the_structure_can_be_drawn(own_folder: Path) -> None:
    assert set(SCRIPTS) <= reading.read_sources().keys()
    architecture.draw(own_folder / "structure.png")
    assert (own_folder / "structure.png").stat().st_size > 10_000
