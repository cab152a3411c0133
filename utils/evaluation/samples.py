"""The samples that an evaluation judges: pictures or indices, and what is known of them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from utils import addresses, provenance
from utils.cli import UserError
from utils.data.indices import digest, lineage_of, read_indices
from utils.evaluation.decoded import DecodedImages
from utils.evaluation.parts import Part, check_count, read_images
from utils.provenance import Lineage, LoadedModel, Split

LIST, GRID = "images.csv", "grid.png"  # in a folder of images_from_indexes.py


class Tokens(NamedTuple):
    """How to compare indices: those of the samples' rows, and images -> their indices."""

    grids: Tensor
    encode: Callable[[Tensor], Tensor]
    codebook_size: int
    depth: int


class Samples(NamedTuple):
    """Samples, and what they say of where they come from.

    Attributes:
        part: all of them.
        place: the file or folder that they lie in.
        hashes: SHA-256 of the samples and, where it is known, of the models that drew them.
        run_id: MLflow's of the GPT that drew them, "" if not known.
        split: of the training's data, None if not known.
        tokens: None for pictures.
    """

    part: Part
    place: Path
    hashes: dict[str, str]
    run_id: str
    split: Split | None
    tokens: Tokens | None = None


def drawn_by(lineage: Lineage) -> str:
    """The run of the GPT that drew what has this lineage; "" where it does not say so."""
    return next((stage.run_id for stage in reversed(lineage) if stage.name == "samples"), "")


def read_samples(
    images: str | None,
    indexes_path: str | None,
    tokenizer: LoadedModel | None,
    size: tuple[int, int] | None,
    **options: Any,
) -> Samples:
    """The samples that the flags name: `read_pictures`, or `read_drawn` with their tokenizer.

    Raises:
        UserError: neither, both, or what does not go together; see there.
    """
    if bool(images) == bool(indexes_path):
        raise UserError("give the samples by either --images or --indexes_path")
    if images:
        return read_pictures(Path(images), size, **options)
    if size:
        raise UserError(
            "--image_size does not go with --indexes_path, whose images have the size that the "
            "tokenizer decodes; leave it out"
        )
    if tokenizer is None:
        raise UserError("--indexes_path needs the tokenizer of the indices; add --model_dir")
    path = addresses.fetch(indexes_path)
    samples = read_drawn(path, tokenizer)
    if path != Path(indexes_path):  # fetched to a folder that nobody will look into
        samples = samples._replace(place=Path("outputs", *indexes_path.split("/")[1:]))
    return samples


def read_pictures(path: Path, size: tuple[int, int] | None, **options: Any) -> Samples:
    """A folder of images_from_indexes.py, or any CSV of images.

    Args:
        path: of the folder, its images.csv, or another CSV.
        size: height and width to resize and crop to; None: what all images have.
        options: of `ImageDataset`.

    Raises:
        UserError: see `ImageDataset`; neither of them is there, or too few images.
    """
    table = path / LIST if path.is_dir() else path
    if not table.is_file():
        raise UserError(
            f"no images at {path}; --images takes a folder of images_from_indexes.py, with its "
            f"{LIST}, or a CSV of image paths"
        )
    images = read_images(table, "--images", size, **options)
    check_count(images, str(path))
    folder = table.parent if table.name == LIST else None
    grid = folder / GRID if folder and (folder / GRID).is_file() else None
    lineage = provenance.of_picture(grid) if grid else ()
    sha256 = hashlib.sha256()
    for file in images.files:
        sha256.update(Path(file).read_bytes())
    return Samples(
        Part.whole(images),
        folder or table,
        {"samples_sha256": sha256.hexdigest()} | _models(lineage),
        drawn_by(lineage),
        provenance.split_of_picture(grid) if grid else None,
    )


def read_drawn(path: Path, tokenizer: LoadedModel) -> Samples:
    """Indices, to be decoded as they are looked at.

    Raises:
        UserError: see `read_indices`; indices of another tokenizer, or too few of them.
    """
    model, config, origin = tokenizer.model, tokenizer.model.config, tokenizer.provenance
    indices = read_indices(path, codebook_size=config.codebook_size, depth=config.depth)
    if indices.meta is not None:
        indices.meta.check_tokenizer(tokenizer, path)
    size = tuple(side * config.downsampling for side in indices.latent_dim)
    decoded = DecodedImages(indices.tensor(), indices.rows, model.decode, config.in_channels, size)
    check_count(decoded, str(path))
    return Samples(
        Part.whole(decoded),
        path,
        {"samples_sha256": digest(path)}
        | _models(lineage_of(path))
        | {"tokenizer_sha256": tokenizer.sha256},
        indices.meta.gpt_run_id if indices.meta is not None else "",
        Split(origin.val_fraction, origin.seed),
        Tokens(decoded.grids, model.encode, config.codebook_size, config.depth),
    )


def _models(lineage: Lineage) -> dict[str, str]:
    """The SHA-256 of the last tokenizer and of the last GPT of a lineage."""
    return {
        f"{stage.name}_sha256": stage.sha256
        for stage in lineage
        if stage.name in ("tokenizer", "gpt") and stage.sha256
    }
