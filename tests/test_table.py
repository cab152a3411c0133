"""The CSV of a data set: text stays text, mistakes are named, splits and orders are stable."""

from pathlib import Path

import pytest
import torch

from utils.cli import UserError
from utils.data.table import Row, epoch_order, read_csv, split_rows


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
    rows = read_csv(write(tmp_path, f"image_path,label\n{lines}"))
    assert [row.label for row in rows] == labels


def test_columns_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "split, label ,x,image_path\nval,7,?,a.png\n\ntrain,8,?,b.png\n")
    assert read_csv(path) == [Row("a.png", "7", "val"), Row("b.png", "8", "train")]


def test_only_paths(tmp_path: Path) -> None:
    assert read_csv(write(tmp_path, "image_path\na.png\n")) == [Row("a.png", "", "")]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes("\ufeffimage_path,label\r\na.png,ä\r\n".encode())
    assert read_csv(path) == [Row("a.png", "ä", "")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no column image_path"),
        ("path,label\na.png,1\n", "no column image_path; its first line is 'path,label'"),
        ("image_path,label\n", "lists no images"),
        ("image_path,label\na.png,1\nb.png,2,3\n", "line 3: 3 fields, but .* names 2 columns"),
        ("image_path,label\na.png\n", "line 2: 1 fields, but .* names 2 columns"),
        ("image_path,split\na.png,train\nb.png,test\n", "line 3: split is 'test'; use train or"),
        ("image_path,split\na.png,\n", "line 2: split is ''"),
        ("image_path,label\n,1\n", "line 2: image_path is empty"),
        ('image_path\n"a.png', "no CSV in UTF-8"),
        ("image_path\na\0.png\n", "line 2: image_path has a zero byte"),
        ("image_path,label,label\na.png,1,2\n", "names a column twice"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_csv(write(tmp_path, content))


def test_no_csv(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such CSV file: .*none\.csv"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(UserError, match="no such CSV file"):
        read_csv(tmp_path)
    (tmp_path / "a.csv").write_bytes(b"image_path\n\xff\xfe.png\n")
    with pytest.raises(UserError, match="no CSV in UTF-8"):
        read_csv(tmp_path / "a.csv")


def test_missing_files_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    lines = "".join(f"{number}.png\n" for number in range(8))
    with pytest.raises(UserError) as caught:
        read_csv(write(tmp_path, f"image_path\na.png\n{lines}"))
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
            read_csv(path)
        assert read_csv(path, allow_outside_paths=True)[1].image_path == one


def test_paths_that_only_seem_to_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "data")
    write(tmp_path / "data", "image_path\n../data/a.png\n./b.png\n")
    assert len(read_csv(tmp_path / "link" / "data.csv")) == 2


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


def test_two_names_of_one_file_are_on_one_side(tmp_path: Path) -> None:
    """A symbolic link to a training image could be a validation image."""
    names = [f"{number}.png" for number in range(60)]
    path = write(tmp_path, "image_path\n" + "\n".join(names), files=" ".join(names))
    before = split_rows(read_csv(path), val_fraction=0.3, seed=0, folder=tmp_path)
    (tmp_path / "folder").symlink_to(tmp_path)
    for number in range(60):
        (tmp_path / f"link{number}.png").symlink_to(f"{number}.png")
    links = [f"link{number}.png" for number in range(60)]
    ways = [f"folder/{number}.png" for number in range(60)]
    path.write_text("image_path\n" + "\n".join(names + links + ways))
    train, val = split_rows(read_csv(path), val_fraction=0.3, seed=0, folder=tmp_path)
    sides = [{row % 60 for row in side.tolist()} for side in (train, val)]
    assert sides == [set(side.tolist()) for side in before]  # and the links change nothing


def test_one_file_on_both_sides_of_a_split_column(tmp_path: Path) -> None:
    path = write(tmp_path, "image_path,split\na.png,train\nlink.png,val\n")
    (tmp_path / "link.png").symlink_to("a.png")
    with pytest.raises(UserError, match=r"a\.png \(train\) and link\.png \(val\) are one file"):
        read_csv(path)


def test_a_csv_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "image_path\na.png\n")
    monkeypatch.setattr("utils.data.table.TABLE_BYTES", 10)
    with pytest.raises(UserError, match="17 bytes, but such a file may have 10 at most"):
        read_csv(path)
