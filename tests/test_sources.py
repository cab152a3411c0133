"""The CSV of a data set: text stays text, mistakes are named, splits and orders are stable."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.cli import UserError
from utils.data import sources
from utils.data.images import ImageDataset
from utils.data.sources import Row, epoch_order, read_rows, split_rows


def write(folder: Path, content: str, *, files: str = "a.png b.png") -> Path:
    """A CSV in `folder` with empty files beside it: what is in them is not looked at here."""
    folder.mkdir(exist_ok=True)
    for name in files.split():
        (folder / name).touch()
    path = folder / "data.csv"
    path.write_text(content, encoding="utf-8")
    return path


def test_labels_stay_text(tmp_path: Path) -> None:
    """pandas turns them into 1, NaN, True and 1000."""
    labels = ["0001", "NA", "True", "1e3", "", " x", "größer", "a,b"]
    lines = "".join(f'a.png,"{label}"\n' for label in labels)
    rows = read_rows(write(tmp_path, f"image_path,label\n{lines}"))
    assert [row.label for row in rows] == labels


def test_columns_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "split, label ,x,image_path\nval,7,?,a.png\n\ntrain,8,?,b.png\n")
    assert read_rows(path) == [Row("a.png", "7", "val"), Row("b.png", "8", "train")]


def test_only_paths(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "image_path\na.png\n")) == [Row("a.png", "", "")]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes("\ufeffimage_path,label\r\na.png,ä\r\n".encode())
    assert read_rows(path) == [Row("a.png", "ä", "")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no column image_path"),
        ("path,label\na.png,1\n", "no column image_path; its first line is 'path,label'"),
        ("image_path,label\n", "lists no images"),
        ("image_path,label\na.png,1\nb.png,2,3\n", "row 2: 3 fields, but the first line has 2"),
        ("image_path,label\na.png,1,2\nb.png,2\n", "row 1: 3 fields"),
        (
            "image_path,label\na.png,1\nb.png,2,3,4\n",
            "row 2: 4 fields, but .* has 2; quote",
        ),
        ("image_path,label\na.png\n", "row 1: 1 fields, but the first line has 2"),
        ("image_path,split\na.png,train\nb.png,test\n", "row 2: split is 'test'; use train or"),
        ("image_path,split\na.png,\n", "row 1: split is empty"),
        ("image_path,label\n,1\n", "row 1: image_path is empty"),
        ('image_path\n"a.png', "not a valid UTF-8 CSV"),
        ("image_path\na\0.png\n", "1 of 1 files .* do not exist"),
        ("image_path,label,label\na.png,1,2\n", "repeats a column"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_rows(write(tmp_path, content))


def test_no_csv(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such CSV file: .*none\.csv"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(UserError, match="no such CSV file"):
        read_rows(tmp_path)
    (tmp_path / "a.csv").write_bytes(b"image_path\n\xff\xfe.png\n")
    with pytest.raises(UserError, match="not a valid UTF-8 CSV"):
        read_rows(tmp_path / "a.csv")


def test_missing_files_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    lines = "".join(f"{number}.png\n" for number in range(8))
    with pytest.raises(UserError) as caught:
        read_rows(write(tmp_path, f"image_path\na.png\n{lines}"))
    text = str(caught.value)
    assert "8 of 9 files" in text
    assert "0.png, 1.png, 2.png, 3.png, 4.png and 3 more" in text
    assert "5.png" not in text


def test_paths_that_leave_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "c.png").touch()
    inside = tmp_path / "inside"
    path = write(inside, "image_path\na.png\n")
    (inside / "file.png").symlink_to(outside / "c.png")
    (inside / "folder").symlink_to(outside)
    (tmp_path / "inside-too").mkdir()  # its name begins like the folder's
    (tmp_path / "inside-too" / "d.png").touch()
    leaving = [
        "../outside/c.png",
        "file.png",
        "folder/c.png",
        str(outside / "c.png"),
        "../inside-too/d.png",
    ]
    for one in leaving:
        path.write_text(f"image_path\na.png\n{one}\n")
        with pytest.raises(UserError, match=r"1 of 2 .* outside its folder.*--allow_outside_paths"):
            read_rows(path)
        assert read_rows(path, allow_outside_paths=True)[1].image_path == one


def test_paths_that_only_seem_to_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "data")
    write(tmp_path / "data", "image_path\n../data/a.png\n./b.png\n")
    assert len(read_rows(tmp_path / "link" / "data.csv")) == 2


def rows_of(count: int) -> list[Row]:
    return [Row(f"{number}.png", "", "") for number in range(count)]


@pytest.mark.parametrize(("count", "fraction", "expected"), [(100, 0.1, 10), (7, 0.5, 4)])
def test_seeded_split_has_the_right_size(count: int, fraction: float, expected: int) -> None:
    train, val = split_rows(rows_of(count), val_fraction=fraction, seed=0)
    assert len(val) == expected
    assert sorted(train.tolist() + val.tolist()) == list(range(count))


def test_seeded_split_is_stable_and_follows_the_seed() -> None:
    rows = rows_of(200)
    first, again, other = (split_rows(rows, val_fraction=0.1, seed=s)[1] for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # a file stays where it is when the CSV is sorted otherwise
    chosen = {rows[row].image_path for row in first.tolist()}
    turned = rows[::-1]
    assert chosen == {
        turned[row].image_path for row in split_rows(turned, val_fraction=0.1, seed=3)[1].tolist()
    }


def test_rows_of_one_file_are_on_one_side() -> None:
    spellings = ("{}.png", "./{}.png", "x/../{}.png")
    rows = [Row(way.format(number), "", "") for way in spellings for number in range(60)]
    train, val = split_rows(rows, val_fraction=0.3, seed=0)
    sides = [{row % 60 for row in side.tolist()} for side in (train, val)]
    assert not sides[0] & sides[1]
    assert (len(sides[0]), len(sides[1])) == (42, 18)
    assert len(val) == 54


def test_the_split_column_decides() -> None:
    rows = [Row(f"{number}.png", "", "val" if number in (1, 4) else "train") for number in range(6)]
    train, val = split_rows(rows, val_fraction=0.9, seed=0)
    assert train.tolist() == [0, 2, 3, 5]
    assert val.tolist() == [1, 4]


def test_epoch_order_follows_from_seed_and_epoch() -> None:
    rows = torch.arange(10, 60)
    torch.manual_seed(1)
    first = epoch_order(rows, seed=5, epoch=2)
    torch.manual_seed(2)
    assert torch.equal(first, epoch_order(rows, seed=5, epoch=2))
    assert torch.equal(first.sort().values, rows)
    for seed, epoch in ((5, 3), (6, 2), (2, 5)):
        assert not torch.equal(first, epoch_order(rows, seed, epoch))


def test_one_file_on_both_sides_of_a_split_column(tmp_path: Path) -> None:
    path = write(tmp_path, "image_path,split\na.png,train\n./a.png,val\n")
    with pytest.raises(UserError, match=r"a\.png \(train\) and \./a\.png \(val\) are the same"):
        read_rows(path)


SOURCE = """
from utils.data.sources import Row


def accepts(path):
    return path.is_dir()


def read_rows(path):
    return [
        Row(str(file.relative_to(path)), file.parent.name, "") for file in sorted(path.glob("*/*"))
    ]
"""


def test_a_new_form_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a folder of images for each class, as in docs/architecture.md."""
    (tmp_path / "forms").mkdir()
    (tmp_path / "forms" / "class_folders.py").write_text(SOURCE)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path / "forms")])
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("L", (2, 2), len(name)).save(tmp_path / "pets" / name / "1.png")
    dataset = ImageDataset(tmp_path / "pets")
    assert dataset.rows == [Row("cat/1.png", "cat", ""), Row("dog/1.png", "dog", "")]
    assert dataset.pixels.shape == (2, 1, 2, 2)
    before = sources.digest(tmp_path / "pets")
    (tmp_path / "pets" / "dog" / "1.png").rename(tmp_path / "pets" / "dog" / "2.png")
    assert sources.digest(tmp_path / "pets") != before
    assert read_rows(write(tmp_path, "image_path\na.png\n")) == [Row("a.png", "", "")]


def test_a_csv_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "image_path\na.png\n")
    monkeypatch.setattr("utils.data.sources.csv.TABLE_BYTES", 10)
    with pytest.raises(UserError, match="17 bytes, but such a file may have 10 at most"):
        read_rows(path)
