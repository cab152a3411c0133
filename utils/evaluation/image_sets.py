"""The images that an evaluation compares: rows of data sets and samples, read and checked."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils import addresses, provenance
from utils.cli import UserError
from utils.data.images import ImageDataset
from utils.data.indices import digest, lineage_of, read_indices
from utils.data.sources import Row, epoch_order, split_rows
from utils.evaluation.distances import DENSITY_K
from utils.evaluation.features import Images
from utils.evaluation.samples import DecodedImages
from utils.provenance import Lineage, LoadedModel, Split

SMALLEST = DENSITY_K + 1  # images, where sets are compared by their neighbours
LIST, GRID = "images.csv", "grid.png"  # in a folder of images_from_indexes.py


class ImageSet(NamedTuple):
    """Some rows of a source of images."""

    images: Images
    row_numbers: Tensor

    @classmethod
    def whole(cls, images: Images) -> "ImageSet":
        """All rows."""
        return cls(images, torch.arange(len(images)))

    @property
    def rows(self) -> list[Row]:
        """The rows of the table."""
        return [self.images.rows[row] for row in self.row_numbers.tolist()]

    @property
    def labels(self) -> list[str]:
        """Of each row; "" where there is none."""
        return [row.label for row in self.rows]

    def sample(self, count: int, seed: int) -> "ImageSet":
        """`count` random rows."""
        chosen = epoch_order(self.row_numbers, seed, 0)[:count].sort().values
        return ImageSet(self.images, chosen)

    def load(self, positions: Tensor, device: torch.device) -> Tensor:
        """The images at some positions of the rows, (n, C, H, W) in [-1, 1]."""
        return next(iter(self.images.batches([self.row_numbers[positions.cpu()]], device)))


class RealImages(NamedTuple):
    """Real images of a training, and real images held out from it."""

    train: ImageSet
    held_out: ImageSet
    split: dict[str, Any]  # `held_out`, in words; val_fraction and seed where they decided


class Samples(NamedTuple):
    """Samples and their origin, as far as it is known."""

    images: ImageSet
    place: Path  # their file or folder
    hashes: dict[str, str]  # SHA-256 of the samples and of the models that generated them
    run_id: str  # MLflow's of the GPT that generated them, or ""
    split: Split | None  # of the training's data
    tokenizer: Any = None  # of samples that are `DecodedImages`; None for pictures


def read_images(
    path: str | Path,
    flag: str,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    at_least: int = 2,
    **options: Any,
) -> ImageDataset:
    """The images of a CSV, see `ImageDataset`, which takes the options.

    Raises:
        UserError: see there; no such CSV, which `flag` named; fewer than `at_least` images.
    """
    if not Path(path).exists():
        raise UserError(
            f"no such CSV file: {path}; {flag} takes a CSV of image paths, or a folder with a "
            "folder of images for each class"
        )
    dataset = ImageDataset(path, size=size, channels=channels, **options)
    print(dataset)
    _check_count(dataset, str(path), at_least)
    return dataset


def _check_count(images: Images, what: str, at_least: int = SMALLEST) -> None:
    if len(images) < at_least:
        raise UserError(
            f"{what} has only {len(images)} of the at least {at_least} images that are needed here"
        )


def read_real(
    path_to_data: str,
    path_to_test: str | None,
    split: Split | None,
    samples: Images,
    *,
    resize: bool = False,
    **options: Any,
) -> RealImages:
    """Real images of a training (a CSV), and images held out: another CSV, or its validation rows.

    `split` is that of the training, needed where the CSV has no column split. `resize` brings the
    real images to the size of the samples.

    Raises:
        UserError: see `ImageDataset`; too few images, another size, or an unknown split.
    """
    size, channels = samples.size if resize else None, samples.channels
    real = read_images(path_to_data, "--path_to_data", size, channels, SMALLEST, **options)
    if real.size != samples.size:
        sizes = ["x".join(map(str, images.size)) for images in (real, samples)]
        raise UserError(
            f"the images in {path_to_data} have {sizes[0]} pixels, the samples {sizes[1]}; bring "
            "both to one size by --image_size H,W"
        )
    if path_to_test:
        options |= {"value_range": real.value_range, "resampling": real.resampling}
        test = read_images(path_to_test, "--path_to_test", real.size, channels, SMALLEST, **options)
        sets = ImageSet.whole(real), ImageSet.whole(test)
        return RealImages(*sets, {"held_out": "path_to_test"})
    described: dict[str, Any] = {"held_out": "column split of path_to_data"}
    if not real.rows[0].split:
        if split is None:
            raise UserError(
                f"nothing says which images of {path_to_data} the training has seen; add others by "
                "--path_to_test, the tokenizer by --model_dir, or a column split"
            )
        described = {"held_out": "drawn from path_to_data as the training did", **asdict(split)}
    train, held_out = split_rows(
        real.rows,
        val_fraction=split.val_fraction if split else 0.0,
        seed=split.seed if split else 0,
    )
    if min(len(train), len(held_out)) < SMALLEST:
        raise UserError(
            f"{path_to_data} has {len(held_out)} validation images, too few to compare with; give "
            "others by --path_to_test"
        )
    return RealImages(ImageSet(real, train), ImageSet(real, held_out), described)


def read_samples(
    images: str | None,
    indexes_path: str | None,
    tokenizer: LoadedModel | None,
    size: tuple[int, int] | None,
    **options: Any,
) -> Samples:
    """The samples that the flags name: pictures, or indices with their tokenizer.

    Raises:
        UserError: neither, both, or flags that cannot be combined; see `read_pictures` and
            `read_grids`.
    """
    if bool(images) == bool(indexes_path):
        raise UserError("give the samples by either --images or --indexes_path")
    if images:
        return read_pictures(Path(images), size, **options)
    if size:
        raise UserError(
            "--image_size cannot be combined with --indexes_path, whose images have the size that "
            "the tokenizer decodes; leave it out"
        )
    if tokenizer is None:
        raise UserError("--indexes_path needs the tokenizer of the indices; add --model_dir")
    path = addresses.fetch(str(indexes_path))
    samples = read_grids(path, tokenizer)
    if path != Path(str(indexes_path)):  # fetched to a temporary folder
        samples = samples._replace(place=Path("outputs", *str(indexes_path).split("/")[1:]))
    return samples


def read_pictures(path: Path, size: tuple[int, int] | None, **options: Any) -> Samples:
    """Samples as a folder of images_from_indexes.py, its images.csv, or any CSV of images.

    Raises:
        UserError: see `ImageDataset`; neither of them is there, or too few images.
    """
    table = path / LIST if path.is_dir() else path
    if not table.is_file():
        raise UserError(
            f"no images at {path}; --images takes a folder of images_from_indexes.py, with its "
            f"{LIST}, or a CSV of image paths"
        )
    images = read_images(table, "--images", size, at_least=SMALLEST, **options)
    folder = table.parent if table.name == LIST else None
    grid = folder / GRID if folder and (folder / GRID).is_file() else None
    lineage, split = provenance.of_picture(grid) if grid else ((), None)
    sha256 = hashlib.sha256()
    for file in images.files:
        sha256.update(Path(file).read_bytes())
    return Samples(
        ImageSet.whole(images),
        folder or table,
        {"samples_sha256": sha256.hexdigest()} | _model_hashes(lineage),
        sampling_run(lineage),
        split,
    )


def read_grids(path: Path, tokenizer: LoadedModel) -> Samples:
    """Samples as indices, which are decoded when they are needed.

    Raises:
        UserError: see `read_indices`; indices of another tokenizer, or too few of them.
    """
    model, config, origin = tokenizer.model, tokenizer.model.config, tokenizer.provenance
    indices = read_indices(path, codebook_size=config.codebook_size, depth=config.depth)
    if indices.meta is not None:
        indices.meta.check_tokenizer(tokenizer.sha256, tokenizer.folder, owner=path)
    size = tuple(side * config.downsampling for side in indices.latent_dim)
    decoded = DecodedImages(indices.tensor(), indices.rows, model.decode, config.in_channels, size)
    _check_count(decoded, str(path))
    return Samples(
        ImageSet.whole(decoded),
        path,
        {"samples_sha256": digest(path)}
        | _model_hashes(lineage_of(path))
        | {"tokenizer_sha256": tokenizer.sha256},
        indices.meta.gpt_run_id if indices.meta is not None else "",
        origin.split,
        model,
    )


def sampling_run(lineage: Lineage) -> str:
    """The run of the GPT that generated what has this lineage; "" if it is not known."""
    return next((stage.run_id for stage in reversed(lineage) if stage.name == "samples"), "")


def _model_hashes(lineage: Lineage) -> dict[str, str]:
    """The SHA-256 of the last tokenizer and of the last GPT of a lineage."""
    return {
        f"{stage.name}_sha256": stage.sha256
        for stage in lineage
        if stage.name in ("tokenizer", "gpt") and stage.sha256
    }
