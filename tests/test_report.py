"""report.html holds all that it shows, and shows what is in the output folder."""

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from utils import provenance
from utils.cli import UserError
from utils.provenance import Stage
from utils.tracking import report

ABOUT = {"time": 0.0, "run_id": "a"}  # of a line in metrics.jsonl


DAMAGED_NUMBERS = (
    "[1]",
    "7",
    "{}",
    '{"step": 1, "time": 1.0, "run_id": "a", "val/mse": "low"}',
    '{"step": 1, "time": 1.0, "run_id": "a", "val/mse": [1]}',
    '{"step": 1, "time": 1.0, "run_id": "a", "val/mse": 1' + "0" * 400 + "}",
    '{"step": "1", "time": 1.0, "run_id": "a", "val/mse": 1.0}',
    '{"step": 1, "time": "now", "run_id": "a", "val/mse": 1.0}',
    '{"step": 1, "time": 1.0, "run_id": 7, "val/mse": 1.0}',
)


class Tags(HTMLParser):
    """Every tag of a page with its attributes; void and closed tags balance."""

    VOID = ("meta", "img", "input", "line")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def home(own_folder: Path) -> Path:
    """An output folder: pictures at three steps, curves, a lineage."""
    home = own_folder / "my <run>"
    (home / "pictures").mkdir(parents=True)
    for step in (0, 5, 10):
        picture = Image.new("L", (8, 8), step)
        picture.save(home / "pictures" / f"pictures-reconstructions-{step:08}.png")
    Image.new("L", (8, 8)).save(home / "pictures" / "pictures-usage-00000000.png")
    lines = [
        {"step": step, **ABOUT, "train/mse": 1 / (step + 1), "val/mse": 2.0} for step in range(1000)
    ]
    lines += [{"step": 999, **ABOUT, "val/best_mse": 0.125, "val/bad": float("nan")}]
    lines += [{"step": s, **ABOUT, "system/cpu_utilization_percentage": s} for s in range(3)]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (home / "metrics.jsonl").write_text(content + '{"step": 1000, "ti')  # a crash cut it off
    chain = (Stage("tokenizer", "python train_vqvae.py --label '<b>'", {"data.csv": "ab" * 32}),)
    (home / "lineage.json").write_text(provenance.to_json(chain))
    return home


def test_a_slider_over_the_steps(home: Path) -> None:
    tags = Tags(report.write(home).read_text())
    assert not tags.open
    images = tags.all("img")
    assert [image["data-step"] for image in images] == ["0", "5", "10", "0"]
    assert ["hidden" in image for image in images] == [True, True, False, False]
    shown = base64.b64decode(images[1]["src"].partition(",")[2])
    assert shown == (home / "pictures/pictures-reconstructions-00000005.png").read_bytes()
    assert all(image["alt"] for image in images)
    (slider,) = tags.all("input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    assert slider["aria-label"] == "step of reconstructions"


def test_it_needs_nothing_beside_it(home: Path) -> None:
    page = report.write(home).read_text()
    for attributes in [attributes for _, attributes in Tags(page).found]:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.findall(r"url\(|@import|http", page)
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_curves_and_figures(home: Path) -> None:
    page = report.write(home).read_text()
    charts = [tag["aria-label"] for tag in Tags(page).all("svg")]
    assert charts == ["mse over steps", "cpu utilization percentage over steps"]
    assert "0.125" in page
    assert page.count("<path") == 3
    points = re.findall(r'd="M([^"]*)"', page)[0].split(" L")
    assert len(points) == report.MOST_POINTS
    assert all(0 <= float(number) <= 360 for point in points for number in point.split())
    assert "nan" not in page


def test_names_and_commands_are_text_not_html(home: Path) -> None:
    page = report.write(home).read_text()
    assert "my &lt;run&gt;" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "abababababab" in page


def test_pictures_of_later_stages_are_cards_of_their_own(home: Path) -> None:
    """Pictures that two folders of images logged at step 0 were one."""
    for folder in ("evaluation/pictures", "one.pictures", "two.pictures"):
        (home / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(home / folder / "pictures-generated-00000000.png")
    page = report.write(home).read_text()
    for title in ("generated", "one generated", "two generated"):
        assert page.count(f"<h3>{title}</h3>") == 1


def test_damaged_files(home: Path, capsys: pytest.CaptureFixture) -> None:
    """They were tracebacks, or left out all that a line after them said."""
    for line in DAMAGED_NUMBERS:
        with (home / "metrics.jsonl").open("a") as file:
            file.write(f"\n{line}")
    assert "0.125" in report.write(home).read_text()
    assert f"{len(DAMAGED_NUMBERS) + 1} damaged lines are skipped" in capsys.readouterr().err
    for text in (
        '[{"name": "tok',
        "[1]",
        "7",
        '[{"name": 3, "command": ""}]',
        "[" * 10_000,
        "\x80",
    ):
        (home / "lineage.json").write_text(text, "latin-1")
        with pytest.raises(UserError, match=r"the lineage of .*lineage\.json is damaged"):
            report.write(home)


def test_a_folder_with_little_in_it(own_folder: Path) -> None:
    (own_folder / "metrics.jsonl").write_text("")
    assert "<h1>" in report.write(own_folder).read_text()


def test_no_output_folder(error_of: Callable[..., str], own_folder: Path) -> None:
    assert "is no output folder of a training" in error_of(
        "utils.tracking.__main__", "--report", own_folder / "none"
    )
