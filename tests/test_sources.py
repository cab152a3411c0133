"""The CSV of a data set: text stays text, mistakes are named, splits and orders are stable."""

import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.cli import UserError
from utils.data import sources
from utils.data.images import ImageDataset
from utils.data.sources import Row, Rows, epoch_order, preview_first, read_rows, split_rows


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
    assert [*read_rows(path)] == [Row("a.png", "7", "val"), Row("b.png", "8", "train")]


def test_only_paths(tmp_path: Path) -> None:
    assert [*read_rows(write(tmp_path, "image_path\na.png\n"))] == [Row("a.png", "", "")]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes("\ufeffimage_path,label\r\na.png,ä\r\n".encode())
    assert [*read_rows(path)] == [Row("a.png", "ä", "")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no column image_path"),
        ("path,label\na.png,1\n", "no column image_path; its first line is 'path,label'"),
        ("image_path,label\n", "lists no images"),
        ("image_path,label\na.png,1\nb.png,2,3\n", r"row 2 .*: 3 fields, but the first line has 2"),
        ("image_path,label\na.png,1,2\nb.png,2\n", "row 1 .*: 3 fields"),
        (
            "image_path,label\na.png,1\nb.png,2,3,4\n",
            "row 2 .*: 4 fields, but .*; close each quote, and quote",
        ),
        ("image_path,label\na.png\n", "row 1 .*: 1 fields, but the first line has 2"),
        ("image_path,split\na.png,train\nb.png,test\n", "row 2 .*: split is 'test'; use train or"),
        ("image_path,split\na.png,\n", "row 1: split is empty"),
        ("image_path,label\n,1\n", "row 1: image_path is empty"),
        ('image_path\n"a.png', r"row 1 \(up to line 2\): unexpected end of data"),
        ("image_path\na\0.png\n", "1 of 1 files .* do not exist"),
        ("image_path\na\0b/1.png\n", "1 of 1 files .* do not exist"),
        ("image_path,label,label\na.png,1,2\n", "repeats a column"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_rows(write(tmp_path, content))


def test_no_csv(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such CSV file: .*none\.csv"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"image_path\n\xff\xfe.png\n")
    with pytest.raises(UserError, match="line 2 is not in UTF-8"):
        read_rows(tmp_path / "a.csv")


def test_missing_files_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    lines = "".join(f"{number}.png\n" for number in range(8))
    with pytest.raises(UserError) as caught:
        read_rows(write(tmp_path, f"image_path\na.png\na.png\n{lines}{lines}"))
    text = str(caught.value)
    assert "8 of 9 files" in text  # each file once
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


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(100, 0.1, 10), (7, 0.5, 4), (24, 0.01, 1), (24, 0, 0), (1, 0.1, 0)],
)
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


def test_a_split_is_the_same_in_every_version() -> None:
    """A resumed training, or a GPT, must not train on images that were held out before."""
    files = [f"{number}.png" for number in range(30)]
    for rows in (Rows({"image_path": files}), rows_of(30), rows_of(30) + rows_of(20)):
        val = split_rows(rows, val_fraction=0.2, seed=3)[1].tolist()
        assert [row for row in val if row < 30] == [4, 11, 13, 18, 28, 29]


def test_rows_are_a_sequence() -> None:
    rows = Rows({"label": ["x", "y", "z"], "image_path": ["a.png", "b.png", "c.png"]})
    expected = [Row("a.png", "x", ""), Row("b.png", "y", ""), Row("c.png", "z", "", "", "")]
    assert [*rows] == expected
    assert [rows[0], rows[-2], rows[-1]] == list(rows) == rows[:5] == expected
    assert rows[1:] == expected[1:] != rows
    assert (len(rows), expected[1] in rows) == (3, True)
    with pytest.raises(IndexError):
        rows[3]


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


def test_pictures_show_all_classes_of_a_sorted_data_set() -> None:
    """They were the first in file order: of 2,000 emoji only flags."""
    rows = [Row(f"{number}.png", f"{number // 50}", "") for number in range(500)]
    candidates = torch.arange(0, 500, 2)
    order = preview_first(rows, candidates, 20)
    assert torch.equal(order.sort().values, candidates)
    shown = [rows[row].label for row in order[:20].tolist()]
    assert sorted(shown) == sorted([str(label) for label in range(10)] * 2)
    assert torch.equal(order, preview_first(rows, candidates, 20))
    assert len({rows[row].label for row in order[20:100].tolist()}) == 10
    assert torch.equal(preview_first(rows, candidates[:20], 20), candidates[:20])


def test_one_file_on_both_sides_of_a_split_column(tmp_path: Path) -> None:
    path = write(tmp_path, "image_path,split\na.png,train\n./a.png,val\n")
    with pytest.raises(UserError, match=r"a\.png \(train\) and \./a\.png \(val\) are the same"):
        read_rows(path)


SOURCE = """
from utils.data.sources import Row


def accepts(path):
    return path.suffix == ".list"


def read_rows(path):
    return [Row(line, "", "") for line in path.read_text().split()]
"""


def test_a_new_form_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forms").mkdir()
    (tmp_path / "forms" / "lists.py").write_text(SOURCE)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path / "forms")])
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "data.list").write_text("a.png")
    assert [*ImageDataset(tmp_path / "data.list").rows] == [Row("a.png", "", "")]
    assert [*read_rows(write(tmp_path, "image_path\na.png\n"))] == [Row("a.png", "", "")]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_of_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ("dog/2.JPG", "dog/more/1.png", "cat/1.webp", "cat/.hidden.png", "cat/notes.txt")
    pets = touch(tmp_path / "pets", *names)
    before = sources.digest(pets)
    assert [*read_rows(pets)] == [
        Row("cat/1.webp", "cat", ""),
        Row("dog/2.JPG", "dog", ""),
        Row("dog/more/1.png", "dog", ""),
    ]
    assert capsys.readouterr().out == f"{pets}: 1 other files are left out: cat/notes.txt\n"
    (pets / "cat" / "1.webp").rename(pets / "cat" / "2.webp")
    assert sources.digest(pets) != before


def test_folders_of_a_split(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    touch(tmp_path, "train/cat/1.png", "valid/cat/1.png", "test/cat/1.png", "train/dog/3.png")
    assert [*read_rows(tmp_path)] == [
        Row("train/cat/1.png", "cat", "train"),
        Row("train/dog/3.png", "dog", "train"),
        Row("valid/cat/1.png", "cat", "val"),
    ]
    assert "1 other files are left out: test/cat/1.png" in capsys.readouterr().out


def test_a_folder_of_images_without_labels_and_one_of_none(tmp_path: Path) -> None:
    assert [*read_rows(touch(tmp_path / "flat", "a.png"))] == [Row("a.png", "", "")]
    with pytest.raises(UserError, match=r"no images below .*none; .*\(found: a\.heic, b\.csv\)"):
        read_rows(touch(tmp_path / "none", "a.heic", "b.csv"))


@pytest.mark.parametrize(
    "content",
    [
        "Image_Path;LABEL\na.png;x, y\n",
        "image path\tlabel\na.png\tx, y\n",
        "IMAGE-PATH,Label,,\n./a.png,'x',,\n",
        "sep=;\nimage_path;label\na.png;x\n;\n",
        "image_path, label\na.png, x\n",
        '"image_path";"label"\n"a.png";"x"\n',
        "image_path,label\ra.png,x\r",
        "image_path,label\r\n'a.png',x\r\n,\r\n",
        'image_path,label\n"""a.png""",x\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_dialects_of_spreadsheets(tmp_path: Path, content: str, encoding: str) -> None:
    path = write(tmp_path, "")
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    path.write_bytes((mark + content).encode(encoding))
    (row,) = read_rows(path)
    assert (tmp_path / row.image_path).is_file()
    assert row.label in ("x", "x, y", "'x'")


def test_spellings_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    composed, decomposed = (unicodedata.normalize(form, "größe.png") for form in ("NFC", "NFD"))
    touch(tmp_path, "cats/1 2.png", decomposed)
    names = ("cats\\1 2.png", composed, "~/cats/1 2.png", f"file://{tmp_path}/cats/1%202.png")
    path = write(tmp_path, "".join(f"{name}\n" for name in ("image_path", *names)))
    assert [Path(row.image_path).name for row in read_rows(path)] == [
        "1 2.png",
        decomposed,
        "1 2.png",
        "1 2.png",
    ]
    path.write_text("image_path\ncats\n")
    with pytest.raises(UserError, match=r"cats \(a folder, not a file\)"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'image_path,label\na.png,x\n"a.png,x\na.png,x\n', r"row 2 \(up to line 4\)"),
        ("image_path,label\na.png,x\na.png,größe\n".encode("latin-1"), "line 3 is not in UTF-8"),
    ],
)
def test_what_is_no_csv_has_a_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = write(tmp_path, "")
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        read_rows(path)


def test_other_columns_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path, "file,image_path,size\n1,a.png,2\n")
    for _ in range(2):
        read_rows(path)
    (line,) = capsys.readouterr().out.splitlines()
    assert "ignored columns: file, size; used: image_path, label" in line


def test_a_csv_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "image_path\na.png\n")
    monkeypatch.setattr("utils.data.sources.csv.TABLE_BYTES", 10)
    with pytest.raises(UserError, match="17 bytes, but such a file may have 10 at most"):
        read_rows(path)
