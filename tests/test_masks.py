"""Completion by masks: one for each image, known pixels put back, and masks that do not fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_images
from tests.test_transformer_generation import CODES, GRID, call, sampled, write_gpt, write_tokenizer
from utils.data.indices import IndicesMeta, write_indices
from utils.data.masks import KnownPixels, known_positions, read_mask
from utils.data.sources import read_rows
from utils.data.vocabulary import Vocabulary

SIZE = (24, 40)
COMPLETE = ("transformer_generation", "--device", "cpu", "--model_path", "gpt", "--complete")


@pytest.fixture
def models(own_folder: Path) -> Path:
    """A tokenizer, a GPT of any order, images and their indices, in the current folder."""
    torch.manual_seed(0)
    sha256 = write_tokenizer(own_folder / "tokenizer")
    write_gpt("gpt", Vocabulary(CODES, GRID, sha256, class_names=("a", "b")), order_anneal=(1, 1))
    rows = read_rows(write_images(own_folder / "data", 4, size=SIZE))
    grids, meta = (
        torch.randint(CODES, (4, *GRID)),
        IndicesMeta(CODES, GRID, tokenizer_sha256=sha256),
    )
    write_indices(own_folder / "given", grids, rows, meta)
    return own_folder


def write_masks(folder: Path, names: list[str]) -> list[np.ndarray]:
    """Known are the left, the right, the border, and the middle with odd edges."""
    masks = np.zeros((4, *SIZE), bool)
    masks[0, :, :20], masks[1, :, 20:], masks[2], masks[3, 3:22, 5:33] = True, True, True, True
    masks[2, 8:16, 12:28] = False
    folder.mkdir()
    for number, (mask, name) in enumerate(zip(masks, names, strict=True)):
        grey = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
        if number % 2:
            picture = Image.new("RGB", grey.size, "white")
            picture.putalpha(grey)
        else:
            picture = grey
        picture.save(folder / f"{Path(name).stem}.png")
    return list(masks)


def test_each_image_has_a_mask_and_its_known_pixels_come_back_exactly(models: Path) -> None:
    rows = read_rows("data/data.csv")
    masks = write_masks(models / "masks", [row.image_path for row in rows])
    call(*COMPLETE, "given", "--mask", "masks", "--output_dir", "completed")
    given, completed = sampled(models / "given"), sampled(models / "completed")
    positions = known_positions(torch.from_numpy(np.stack(masks)), GRID)
    assert torch.equal(completed[positions], given[positions])
    assert all((a != b).any() for a, b in zip(completed, given, strict=True))
    assert not positions[3, 0].any()
    assert positions[3, 1, 2]

    decode = (
        "vqvae.images_from_indexes",
        "--indexes_path",
        "completed",
        "--model_dir",
        "tokenizer",
    )
    for name, flags in (
        ("plain", ()),
        ("exact", ("--path_to_data", "data/data.csv")),
        ("feathered", ("--path_to_data", "data/data.csv", "--feather", 2)),
    ):
        call(*decode, "--device", "cpu", "--output_dir", name, *flags)
    for number, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        original, plain, exact, feathered = (
            np.asarray(Image.open(file).convert("RGB")).astype(int)
            for file in (
                Path("data", row.image_path),
                *(Path(name, f"{number:05}.png") for name in ("plain", "exact", "feathered")),
            )
        )
        assert (exact[mask] == original[mask]).all()
        assert (exact[~mask] == plain[~mask]).all()
        assert (feathered[~mask] == plain[~mask]).all()
        assert (feathered[mask] != original[mask]).any()
    assert (feathered[8:16, 10:28] == original[8:16, 10:28]).all()


def test_the_originals_fade_over_the_feather() -> None:
    masks = torch.zeros(1, 1, 8, dtype=torch.bool)
    masks[..., :5] = True
    known, images = KnownPixels(masks, ["a", "b"]), torch.zeros(1, 1, 1, 8)
    rows, originals = torch.tensor([1]), torch.ones(1, 1, 1, 8)
    blended = known.blend(images, originals, rows, 2).flatten()
    assert blended.tolist() == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0])
    assert torch.equal(known.blend(images, originals, rows)[0], masks.float())


def test_opaque_or_light_pixels_are_known(tmp_path: Path) -> None:
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    picture = Image.new("RGB", (4, 1), "black")
    picture.putalpha(Image.fromarray(grey))
    picture.save(tmp_path / "alpha.png")
    for name in ("grey.png", "alpha.png"):
        assert read_mask(tmp_path / name).tolist() == [[False, False, True, True]]


def paint(file: str, size: tuple[int, int], value: int) -> None:
    Path(file).parent.mkdir(exist_ok=True)
    Image.new("L", size[::-1], value).save(file)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("white.png", "leaves nothing to sample"),
        ("black.png", "no latent position is known"),
        ("wrong.png", "has 24x41 pixels, which do not fit grids of 6x10"),
        ("two", "use one size"),
        ("few", "has no mask for"),
        ("bad.png", "cannot be read as a picture"),
        ("top:0", "no latent position is known"),
        ("center:1", "leaves nothing to sample"),
    ],
)
def test_masks_that_do_not_fit_are_one_line(
    models: Path, error_of: Callable[..., str], mask: str, message: str
) -> None:
    paint("white.png", SIZE, 255)
    paint("black.png", SIZE, 0)
    paint("wrong.png", (24, 41), 0)
    Path("bad.png").write_bytes(b"no picture")
    names = [Path(row.image_path).stem for row in read_rows("data/data.csv")]
    write_masks(models / "two", names)
    paint(f"two/{names[3]}.png", (48, 80), 128)
    write_masks(models / "few", names)
    Path("few", f"{names[2]}.png").unlink()
    assert message in error_of(*COMPLETE, "given", "--mask", mask, "--output_dir", "out")
    assert not Path("out").exists()


def test_originals_that_are_not_there_are_one_line(
    models: Path, error_of: Callable[..., str]
) -> None:
    flags = ("vqvae.images_from_indexes", "--model_dir", "tokenizer", "--device", "cpu")
    given = (*flags, "--indexes_path", "given", "--path_to_data", "data/data.csv")
    assert "holds no completed images" in error_of(*given)
    call(*COMPLETE, "given", "--output_dir", "completed")
    completed = (*flags, "--indexes_path", "completed")
    assert "--feather has no effect without --path_to_data" in error_of(*completed, "--feather", 2)
    other = write_images(models / "other", 1, size=SIZE)
    Path("other", read_rows(other)[0].image_path).rename("other/new.png")
    other.write_text("image_path\nnew.png\n")
    assert "which was completed" in error_of(*completed, "--path_to_data", other)
    file = Path("completed/known.npz")
    for damaged in (file.read_bytes()[:-30], b"", b"PK\x03\x04"):
        file.write_bytes(damaged)
        assert "known.npz is damaged" in error_of(*completed, "--path_to_data", "data/data.csv")
