"""The indices folder and the text file: written, read back, and refused where they do not fit."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_shards
from utils.cli import UserError
from utils.data.indices import (
    IndicesMeta,
    new_folder,
    read_indices,
    save_grids,
    smallest_type,
    write_indices,
)
from utils.data.sources import Row
from utils.provenance import LoadedModel, Provenance

META = IndicesMeta(codebook_size=300, latent_dim=(2, 5), tokenizer_sha256="ab" * 32)
ROWS = [
    Row(f"folder {number}/ä,{number}.png", label, "train")
    for number, label in enumerate(["0001", "NA", "", 'say "x"', "a\nb", "5", "6"])
]
GRIDS = torch.arange(70).reshape(7, 2, 5) + 229


def written(folder: Path) -> Path:
    return write_indices(folder / "indices", GRIDS, ROWS, META)


def unsealed(folder: Path) -> Path:
    """As it was written before indices folders had checksums."""
    (written(folder) / "sha256.json").unlink()
    return folder / "indices"


@pytest.mark.parametrize("per_shard", [7, 3, 1])
def test_round_trip(tmp_path: Path, per_shard: int) -> None:
    folder = write_shards(tmp_path / "indices", GRIDS, ROWS, META, per_shard)
    indices = read_indices(folder)
    assert torch.equal(indices.grids[:].long(), GRIDS)
    assert list(indices.rows) == ROWS
    assert indices.meta == META
    assert indices.meta.shape == (2, 5)
    expected = {7: ["indices.npy"], 3: 3, 1: 7}[per_shard]
    files = sorted(file.name for file in folder.glob("*.npy"))
    assert files == expected or len(files) == expected


@pytest.mark.parametrize(
    ("size", "kind"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65537, "uint32")]
)
def test_the_smallest_type_holds_the_largest_index(tmp_path: Path, size: int, kind: str) -> None:
    assert smallest_type(size) == kind
    meta = IndicesMeta(codebook_size=size, latent_dim=(1, 2))
    grid = torch.tensor([[[0, size - 1]]])
    folder = write_indices(tmp_path / "indices", grid, ROWS[:1], meta)
    assert np.load(folder / "indices.npy").dtype == kind
    assert read_indices(folder).grids[:].tolist() == [[[0, size - 1]]]


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    """An index of 300 and more was wrapped to another one without a word."""
    folder = written(tmp_path)
    for grids, rows in ((GRIDS + 2, ROWS), (GRIDS - 230, ROWS)):
        with pytest.raises(ValueError, match="codes"):
            write_indices(folder, grids, rows, META)
    assert torch.equal(read_indices(folder).grids[:].long(), GRIDS)


def test_text_beside_the_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "indices", ROWS, META, text=True) as staging:
        save_grids(staging / "indices.npy", GRIDS, META.codebook_size)
    indices = read_indices(tmp_path / "indices" / "indices.txt", latent_dim=(2, 5))
    assert torch.equal(indices.grids[:].long(), GRIDS)
    assert indices.meta == IndicesMeta(int(GRIDS.max()) + 1, (2, 5))


def test_written_again_it_takes_the_place_of_the_old(tmp_path: Path) -> None:
    write_shards(tmp_path / "indices", GRIDS, ROWS, META, 1)
    folder = write_indices(tmp_path / "indices", GRIDS[:2] - 200, ROWS[:2], META)
    assert torch.equal(read_indices(folder).grids[:].long(), GRIDS[:2] - 200)
    assert [path.name for path in tmp_path.iterdir()] == ["indices"]


def test_interrupted_writing_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder was removed before the new one had its name."""
    folder = written(tmp_path)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_indices(folder, GRIDS - 1, ROWS, META)
    assert torch.equal(read_indices(folder).grids[:].long(), GRIDS)


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "indices").mkdir()
    written(tmp_path)  # an empty folder is taken
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("text")
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="thesis exists and is not empty"):
        write_indices(tmp_path / "thesis", GRIDS, ROWS, META)
    with pytest.raises(UserError, match=r"cannot write to .*file: Not a directory"):
        write_indices(tmp_path / "file", GRIDS, ROWS, META)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "text"


def test_refusals_name_both_values(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert read_indices(folder, latent_dim=(2, 5), codebook_size=300).meta == META
    with pytest.raises(UserError, match=r"latent_dim \(2, 5\), but here it must be \(5, 2\)"):
        read_indices(folder, latent_dim=(5, 2))
    with pytest.raises(UserError, match="codebook_size 300, but here it must be 512"):
        read_indices(folder, codebook_size=512)
    other = LoadedModel(None, "cd" * 32, Path("other/best"), Provenance())
    with pytest.raises(UserError, match=r"tokenizer abababababab .*other/best is cdcdcdcdcdcd"):
        META.check_tokenizer(other.sha256, other.folder, owner=folder)
    META.check_tokenizer("ab" * 32, other.folder, owner=folder)
    IndicesMeta(300, (2, 5)).check_tokenizer(other.sha256, other.folder)  # it is not known


def test_no_indices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no indices at .*none"):
        read_indices(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not an indices folder: it has no meta\.json"):
        read_indices(tmp_path)


def change_meta(folder: Path, **values: object) -> None:
    file = folder / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"codebook_size": 1}, r"meta\.json is damaged: codebook_size must be at least 2, got 1"),
        ({"codebook_size": "300"}, r"meta\.json is damaged: codebook_size"),
        ({"latent_dim": [2]}, r"meta\.json is damaged: latent_dim"),
        ({"latent_dim": 5}, r"meta\.json is damaged"),
        ({"colour": 1}, r"meta\.json is damaged: .*colour"),
        (
            {"latent_dim": [5, 2]},
            r"\(7, 2, 5\), but meta\.json says uint16 \(N, 5, 2\)",
        ),
        ({"codebook_size": 298}, "holds the index 298, but its codebook has only 298 codes"),
        ({"codebook_size": 256}, r"holds uint16 .* says uint8 \(N, 2, 5\)"),
        ({"codebook_size": 10**15}, r"meta\.json is damaged: codebook_size"),
        ({"depth": True}, r"meta\.json is damaged: depth must be int, got True"),
    ],
)
def test_damaged_meta(tmp_path: Path, values: dict, complaint: str) -> None:
    folder = unsealed(tmp_path)
    change_meta(folder, **values)
    with pytest.raises(UserError, match=complaint):
        read_indices(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"codebook_size": 3}'])
def test_unreadable_meta(tmp_path: Path, content: str) -> None:
    folder = unsealed(tmp_path)
    (folder / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json"):
        read_indices(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has no column image_path"),
        (b"image_path,label,split\na.png,1,train\n", "has 1 rows for 7 grids"),
        (
            b"image_path,label,split\n" + b"a.png,1\n" * 7,
            ".*2 fields, but the first line has 3",
        ),
        (b"path,label,split\n" + b"a.png,1,train\n" * 7, "has no column image_path"),
        (b"\xff\xfe", "has no column image_path"),
        (
            b"image_path,label,split\n" + b"a.png,1,test\n" * 7,
            "row 1 .*: split is 'test'",
        ),
        (None, ".*No such file"),
    ],
)
def test_damaged_manifest(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    """These ended in a traceback: FileNotFoundError, TypeError, UnicodeDecodeError."""
    manifest = unsealed(tmp_path) / "manifest.csv"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_bytes(content)
    with pytest.raises(UserError, match=rf"manifest\.csv:? .*{complaint}"):
        read_indices(manifest.parent)


def test_damaged_array(tmp_path: Path) -> None:
    folder = unsealed(tmp_path)
    file = folder / "indices.npy"
    good = file.read_bytes()
    np.savez(file.with_suffix(".npz"), GRIDS.numpy())
    zipped = file.with_suffix(".npz").read_bytes()
    for bad in (b"", b"hello", good[:-1], good[:40], zipped):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"indices\.npy is damaged"):
            read_indices(folder)
    for array in (GRIDS.numpy(), GRIDS.numpy().astype(np.uint16)[:0], np.uint16(3)):
        np.save(file, array)
        with pytest.raises(UserError, match=r"indices\.npy holds"):
            read_indices(folder)
    np.save(file, np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"indices\.npy is damaged"):
        read_indices(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"has 7 rows for 0 grids"):
        read_indices(folder)


@pytest.mark.filterwarnings("ignore")  # numpy's, of invalid headers
def test_a_flipped_bit_in_the_header_of_the_array(tmp_path: Path) -> None:
    """Refused in one line, or read as it was (spaces may become tabs)."""
    folder = unsealed(tmp_path)
    good = (folder / "indices.npy").read_bytes()
    generator, refused = random.Random(0), 0
    for _ in range(300):
        bad = bytearray(good)
        bad[generator.randrange(128)] ^= 1 << generator.randrange(8)
        (folder / "indices.npy").write_bytes(bad)
        try:
            indices = read_indices(folder)
        except UserError:
            refused += 1
        else:
            assert indices.grids.shape == (7, 2, 5)
    assert refused > 100


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    """A flipped bit in an index or a label was trained on."""
    folder = write_shards(tmp_path / "indices", GRIDS, ROWS, META, 3)
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        if file.name != "sha256.json":
            file.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
            with pytest.raises(UserError, match=f"{file.name} is damaged: its SHA-256"):
                read_indices(folder)
            file.write_bytes(good)
    assert len(read_indices(folder).rows) == 7
    (folder / "sha256.json").unlink()
    assert len(read_indices(folder).rows) == 7


def test_a_link_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder = unsealed(tmp_path)
    for name in ("manifest.csv", "indices.npy"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is a link that leads out of its folder"):
            read_indices(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    (tmp_path / "link").symlink_to(folder)  # of the whole folder, as for a large disk
    assert len(read_indices(tmp_path / "link").rows) == 7


def text_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "indices.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "0 1 2 3\n7 6 5 4\n",
        "0 1 2 3\r\n7 6 5 4",
        "\ufeff  0 1  2\t3\n7 6 5 4\n\n \n",
        "0 01 000000000002 3\n7 6 5 4",
    ],
)
def test_text_file(tmp_path: Path, content: str) -> None:
    indices = read_indices(text_file(tmp_path, content))
    assert indices.grids[:].tolist() == [[[0, 1], [2, 3]], [[7, 6], [5, 4]]]
    assert indices.grids[:].dtype == torch.uint8
    assert len(indices.rows) == 2


def test_text_file_of_a_grid_that_is_no_square(tmp_path: Path) -> None:
    path = text_file(tmp_path, "0 1 2 3 4 5\n")
    assert read_indices(path, latent_dim=(2, 3)).grids[:].tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert read_indices(path, latent_dim=(3, 2)).grids[:].tolist() == [[[0, 1], [2, 3], [4, 5]]]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("0 1 2 3\n0 1 x 3\n", "line 2, number 3: x is not an index .* from 0 to 15"),
        ("0 -1 2 3\n", "line 1, number 2: -1 is not an index"),
        ("0 1.5 2 3\n", r"line 1, number 2: 1\.5 is not an index"),
        ("0 1 2 ²\n", "line 1, number 4: ² is not an index"),
        ("0 1 2 16\n", "line 1, number 4: 16 is not an index of the codebook; .* from 0 to 15"),
        ("0 1 2 " + "0" * 20 + "9" * 5000, "line 1, number 4: 0+ is not an index"),
        ("0 1 2 3\n0 1 2\n", "line 2: it has 3 indices, but a grid of 2,2 takes 4"),
        ("0 1 2 3\n0 1 2 3 4\n", "line 2: it has 5 indices, but a grid of 2,2 takes 4"),
        ("0 1 2 3 4\n", "line 1: it has 5 indices, but a grid of 2,2 takes 4; .*--latent_dim H,W"),
        ("0 1 2 3\n\n7 6 5 4\n", "line 2: it has 0 indices"),
        ("0 1 2 3\n7 6 5 4\n \t\n0 1 2 3\n\n", "line 3: it has 0 indices"),
        ("once upon a time\n", "line 1, number 1: once is not an index"),
        ("", "line 1: it has 0 indices"),
        (b"\x89PNG\xff\x00", "is not a text file of indices: .*utf-8"),
    ],
)
def test_mistakes_in_a_text_file_have_line_and_column(
    tmp_path: Path, content: str | bytes, complaint: str
) -> None:
    with pytest.raises(UserError, match=rf"indices\.txt {complaint}"):
        read_indices(text_file(tmp_path, content), codebook_size=16)


@pytest.mark.parametrize("content", ["0 1 2 3 4", "0 1 2 3 4 5 6"])
def test_a_text_file_of_another_grid(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"line 1: it has \d indices, but a grid of 2,3 takes 6"):
        read_indices(text_file(tmp_path, content), latent_dim=(2, 3))
