"""Every command of README.md and docs/ runs, so that none of them rots.

They run in the order in which they stand, README.md first, in one folder with small data. A block
that cannot run says so in a comment above it: <!-- not run: the reason -->.
"""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from sklearn import datasets
from sklearn.utils import Bunch

from tests.conftest import ROOT, write_images
from utils.evaluation import features

pytestmark = pytest.mark.filterwarnings("ignore")  # of whatever the scripts use
TRAINING = "--max_steps 2 --batch_size 4 --device cpu"
SMALLER = {  # what is added to a command, and overrules it
    "train_vqvae.py": f"{TRAINING} --num_workers 0 --channels 8 --num_res_blocks 1"
    " --codebook_size 16",
    "train.py": f"{TRAINING} --num_layers 1 --dim 16 --num_heads 2 --hidden_dim 32",
    "transformer_generation.py": "--num_images 8",
}
INSTEAD = {"16,64": "20,20", "24,40": "20,20", "2000": "20"}  # words that would take too long


class Block(NamedTuple):
    """A block of shell commands, and why it is not run ("": it is)."""

    place: str
    commands: list[str]
    reason: str


def blocks_of(text: str, name: str) -> Iterator[Block]:
    """The ```bash blocks of a page, and indented ones that call a program."""
    pattern = r"(?:<!-- not run: ([^\n]+?) -->\n\n?)?```(?:bash|sh|shell|console)\n(.*?)```"
    for match in re.finditer(pattern, text, re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        commands = match[2].replace("\\\n", " ").splitlines()
        commands = [command for command in commands if command and command[0] != "#"]
        yield Block(f"{name}:{line}", commands, match[1] or "")
    for match in re.finditer(r"^ {4,}(python|make|mlflow|pip|torchrun) .*", text, re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(f"{name}:{line}", [f"INDENTED {match[0].strip()}"], "")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"))]
BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(), page.name)]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, first_starts: tuple[Path, list[str]]
) -> Iterator[Path]:
    """A folder with all data that the pages speak of, small, and an empty MLflow store."""
    folder = tmp_path_factory.mktemp("docs")
    lines = write_images(folder, count=12, size=(64, 64)).read_text().splitlines()
    captions = ["caption", *["a red blob", "a blob"] * 6]
    pairs = zip(lines, captions, strict=True)
    (folder / "data.csv").write_text("\n".join(map(",".join, pairs)) + "\n")
    for name in ("train", "test"):
        digits = folder / "data" / "mnist" / name
        write_images(digits, count=24, size=(28, 28), labels="0123456789").rename(
            digits.parent / f"{name}.csv"
        )
        csv = digits.parent / f"{name}.csv"
        csv.write_text(re.sub(r"^(\d)", rf"{name}/\1", csv.read_text(), flags=re.MULTILINE))
    shutil.copy(first_starts[0] / "mlflow.db", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_digits", partial(some_digits, datasets.load_digits))
        patch.setattr(features, "TRAINING_IMAGES", 200)
        yield folder


def some_digits(load: Callable[[], Bunch]) -> Bunch:
    """The first ones, of all classes."""
    found = load()
    return Bunch(images=found.images[:100], target=found.target[:100])


def run_id_of(output_dir: Path) -> str:
    return json.loads((output_dir / "best" / "provenance.json").read_text())["run_id"]


def words_of(command: str) -> list[str]:
    """The words of a command after `python`, made small."""
    program, *words = shlex.split(command, comments=True)
    assert program == "python", f"{command}: say above why it is not run: <!-- not run: ... -->"
    words = [INSTEAD.get(word, word) for word in words]
    if "RUN_ID" in words:
        words[words.index("RUN_ID")] = run_id_of(Path("outputs/tokenizer"))
    return [*words, *SMALLER.get(words[0], "").split()]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python does with these words, in this process, which has PyTorch in it already."""
    module = words[0] == "-m"
    path = words[1] if module else str(ROOT / words[0])
    monkeypatch.setattr(sys, "argv", [path, *words[1 + module :]])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with contextlib.suppress(KeyError):
        del os.environ["MLFLOW_TRACKING_URI"]
    code = None
    try:
        if module:
            runpy.run_module(path, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code, f"exit code {code}"


@pytest.mark.parametrize("block", BLOCKS, ids=[block.place for block in BLOCKS])
def test_block(block: Block, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.reason:
        pytest.skip(block.reason)
    monkeypatch.chdir(world)
    for command in block.commands:
        run(words_of(command), monkeypatch)


def test_an_unmarked_block_that_does_not_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "<!-- not run: no server -->\n```bash\nmlflow ui\n```\n\n```bash\nmake demo\n```\n"
    page += "\n    python indented.py\n\n```bash\npython train.py \\\n  --no_such_flag\n```\n"
    marked, unmarked, wrong, indented = blocks_of(page, "page.md")
    assert (marked.reason, marked.commands) == ("no server", ["mlflow ui"])
    for block in (unmarked, indented):
        with pytest.raises(AssertionError, match="say above why"):
            words_of(block.commands[0])
    with pytest.raises(AssertionError, match="exit code 2"):
        run(words_of(wrong.commands[0]), monkeypatch)


@pytest.mark.parametrize("page", ALL_PAGES, ids=[page.name for page in ALL_PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name a file, and where they have an anchor, a heading of it."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        headings = (
            re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor
            else []
        )
        anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        assert not anchor or anchor in anchors, target


def test_the_pages_are_short() -> None:
    """By the count of `wc -w`."""
    words = {page: page.read_text(encoding="utf-8").split() for page in PAGES}
    assert len(words.pop(ROOT / "README.md")) <= 1800
    assert len(words.pop(ROOT / "docs" / "results.md")) <= 1200  # tables, which grow with features
    assert sum(map(len, words.values())) <= 5000
