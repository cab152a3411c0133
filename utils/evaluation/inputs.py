"""What the flags of evaluate.py name: sets of images, samples, and published feature networks."""

import argparse
import contextlib
import hashlib
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import addresses, cli, provenance
from utils.cli import UserError, one_line
from utils.data.images import ImageConfig, ImageDataset
from utils.data.indices import digest, lineage_of, read_indices
from utils.data.sources import split_rows
from utils.evaluation.distances import DENSITY_K
from utils.evaluation.features import DecodedImages, FeatureNetwork, Images, ImageSet
from utils.provenance import Lineage, LoadedModel, Split

SMALLEST = DENSITY_K + 1  # images, where sets are compared by their neighbours
LIST, GRID = "images.csv", "grid.png"  # in a folder of images_from_indexes.py
INCEPTION = ("2048", "logits_unbiased")  # the Inception Score takes logits without bias
DINOV2 = "huggingface.co/facebook/dinov2-large"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


class RealImages(NamedTuple):
    """Real images of a training, and real images held out from it."""

    train: ImageSet
    held_out: ImageSet
    split: dict[str, Any]  # `held_out`, in words; val_fraction and seed where they decided
    path: str  # of the former, for messages


class Samples(NamedTuple):
    """Samples and their origin, as far as it is known."""

    images: ImageSet
    place: Path  # their file or folder
    lineage: Lineage
    split: Split | None  # of the training's data
    hashes: dict[str, str]
    tokenizer: Any = None  # that of --model_dir, or None


def read_images(
    flags: argparse.Namespace,
    flag: str,
    *,
    at_least: int = 2,
    path: Path | None = None,
    **options: Any,
) -> ImageDataset:
    """The images that a flag names, or those at `path`; `options` are those of `ImageDataset`."""
    path = path or Path(getattr(flags, flag))
    if not path.exists():
        raise UserError(
            f"no such CSV file: {path}; --{flag} takes a CSV of image paths, or a folder with a "
            "folder of images for each class"
        )
    dataset = ImageDataset(path, cli.read_flags(ImageConfig, flags), **options)
    print(dataset)
    _check_count(dataset, path, at_least)
    return dataset


def _check_count(images: Images, path: Path, at_least: int = SMALLEST) -> None:
    if len(images) < at_least:
        raise UserError(
            f"{path} has only {len(images)} of the at least {at_least} images that are needed here"
        )


def read_real(
    flags: argparse.Namespace, samples: Images, split: Split | None, **options: Any
) -> RealImages:
    """The real images of --path_to_data; held out: --path_to_test, or its validation rows.

    `split` is that of the training, needed where the CSV has no column split.
    """
    path, size = flags.path_to_data, samples.size
    wanted = size if flags.image_size or flags.indexes_path else None
    options |= {"channels": samples.channels, "at_least": SMALLEST}
    real = read_images(flags, "path_to_data", size=wanted, **options)
    if real.size != size:
        sizes = ["x".join(map(str, one)) for one in (real.size, size)]
        raise UserError(
            f"the images in {path} have {sizes[0]} pixels, the samples {sizes[1]}; bring "
            "both to one size by --image_size H,W"
        )
    if flags.path_to_test:
        options |= {"value_range": real.value_range, "resampling": real.resampling}
        test = read_images(flags, "path_to_test", size=size, **options)
        described = {"held_out": "path_to_test"}
        return RealImages(ImageSet.whole(real), ImageSet.whole(test), described, path)
    described = {"held_out": "column split of path_to_data"}
    if not real.rows[0].split:
        if split is None:
            raise UserError(
                f"nothing says which images of {path} the training has seen; add others by "
                "--path_to_test, the tokenizer by --model_dir, or a column split"
            )
        described = {"held_out": "drawn from path_to_data as the training did", **asdict(split)}
    train, held_out = split_rows(real.rows, **asdict(split or Split(0.0, 0)))
    if min(len(train), len(held_out)) < SMALLEST:
        raise UserError(
            f"{path} has {len(held_out)} validation images, too few to compare with; give "
            "others by --path_to_test"
        )
    return RealImages(ImageSet(real, train), ImageSet(real, held_out), described, path)


def read_samples(flags: argparse.Namespace, tokenizer: LoadedModel | None) -> Samples:
    """The samples of --images, or of --indexes_path and their tokenizer."""
    if bool(flags.images) == bool(flags.indexes_path):
        raise UserError("give the samples by either --images or --indexes_path")
    if flags.images:
        samples = _read_pictures(flags, tokenizer and tokenizer.model.config.in_channels)
    elif flags.image_size:
        raise UserError(
            "--image_size cannot be combined with --indexes_path, whose images have the size that "
            "the tokenizer decodes; leave it out"
        )
    elif tokenizer is None:
        raise UserError("--indexes_path needs the tokenizer of the indices; add --model_dir")
    else:
        samples = _read_grids(flags.indexes_path, tokenizer)
    hashes = {f"{one.name}_sha256": one.sha256 for one in samples.lineage if one.sha256}
    models = {key: hashes[key] for key in ("tokenizer_sha256", "gpt_sha256") if key in hashes}
    samples = samples._replace(hashes=models | samples.hashes)
    if tokenizer is not None:
        split = tokenizer.provenance.split
        samples = samples._replace(split=split, tokenizer=tokenizer.model)
    return samples


def _read_pictures(flags: argparse.Namespace, channels: int | None) -> Samples:
    """A folder of images_from_indexes.py, its images.csv, or any CSV of images."""
    path = Path(flags.images)
    table = path / LIST if path.is_dir() else path
    if not table.is_file():
        raise UserError(
            f"no images at {path}; --images takes a folder of images_from_indexes.py or a CSV of "
            "image paths"
        )
    options = {"size": flags.image_size, "channels": channels}
    images = read_images(flags, "images", at_least=SMALLEST, path=table, **options)
    place = table.parent if table.name == LIST else table
    grid = place / GRID
    lineage, split = provenance.of_picture(grid) if grid.is_file() else ((), None)
    sha256 = hashlib.sha256()
    for file in images.files:
        sha256.update(Path(file).read_bytes())
    hashes = {"samples_sha256": sha256.hexdigest()}
    return Samples(ImageSet.whole(images), place, lineage, split, hashes)


def _read_grids(address: str, tokenizer: LoadedModel) -> Samples:
    """Indices, which are decoded when they are needed."""
    path, model, config = addresses.fetch(address), tokenizer.model, tokenizer.model.config
    indices = read_indices(path, codebook_size=config.codebook_size, depth=config.depth)
    if indices.meta is not None:
        indices.meta.check_tokenizer(tokenizer.sha256, tokenizer.folder, owner=path)
    size = tuple(side * config.downsampling for side in indices.latent_dim)
    decoded = DecodedImages(indices.tensor(), indices.rows, model.decode, config.in_channels, size)
    _check_count(decoded, path)
    # What was fetched lies in a temporary folder.
    place = path if path == Path(address) else Path("outputs", *address.split("/")[1:])
    hashes = {"samples_sha256": digest(path), "tokenizer_sha256": tokenizer.sha256}
    return Samples(ImageSet.whole(decoded), place, lineage_of(path), None, hashes)


def sampling_run(lineage: Lineage) -> str:
    """The run of the GPT that generated what has this lineage; "" if it is not known."""
    return next((stage.run_id for stage in reversed(lineage) if stage.name == "samples"), "")


# --- the networks of published distances --------------------------------------------------------


class _Inception(nn.Module):
    """torch-fidelity's port of the network of the first FID, with its own resizing to 299."""

    preprocessing = "8 bits, RGB, TensorFlow's bilinear resizing to 299x299"

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except ImportError as error:
            raise _no_package("inception", "torch-fidelity") from error
        url = fidelity.URL_INCEPTION_V3
        try:
            if path:
                torch.load(path, map_location="cpu", weights_only=True)
            else:
                print(f"taking the weights of Inception from {url} or torch.hub's cache")
                with contextlib.redirect_stderr(io.StringIO()):  # where it repeats the address
                    torch.hub.load_state_dict_from_url(url, weights_only=True)
        except Exception as error:  # no network, no such file, or no weights: of many types
            raise _no_weights("inception", error, url) from error
        # torch-fidelity unpickles the file without restrictions. The lines above have read the
        # same file and would have refused one with anything besides tensors in it.
        try:
            self.inner = fidelity.FeatureExtractorInceptionV3(
                "inception", list(INCEPTION), feature_extractor_weights_path=path or None
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise _wrong_weights("inception", path, url) from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images[:, :3].expand(-1, 3, -1, -1).add(1).mul(127.5).round()
        features, logits = self.inner(pixels.clamp(0, 255).to(torch.uint8))
        return features, logits


class _Dinov2(nn.Module):
    """transformers' DINOv2: the normalised class token of images of 224x224 (arXiv 2306.04675)."""

    preprocessing = "RGB, antialiased bicubic resizing to 224x224, ImageNet's mean and std"

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError as error:
            raise _no_package("dinov2", "transformers") from error
        if not Path(path or "-").is_dir():
            missing = OSError(f"no folder {path}".strip())
            raise _no_weights("dinov2", missing, f"the folder {DINOV2}")
        try:
            if not AutoConfig.from_pretrained(path).model_type.startswith("dinov2"):
                raise ValueError("another network")
            options: Any = {"use_safetensors": True, "output_loading_info": True}
            self.inner, loading = AutoModel.from_pretrained(path, **options)
            if loading["missing_keys"] or loading["mismatched_keys"]:
                raise ValueError("other weights")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _wrong_weights("dinov2", path, DINOV2) from error

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        images = F.interpolate(
            images[:, :3].expand(-1, 3, -1, -1), size=(224, 224), mode="bicubic", antialias=True
        )
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (MEAN, STD))
        pixels = ((images.clamp(-1, 1) + 1) / 2 - mean) / std
        return self.inner(pixels).pooler_output, None


def open_network(name: str | None, path: str, device: torch.device) -> FeatureNetwork | None:
    """Inception or DINOv2; None for another name of --features, which has nothing to open.

    `path` is the weights file of Inception ("" downloads it), or the folder of DINOv2.
    """
    make: Any = {"inception": _Inception, "dinov2": _Dinov2}.get(name or "")
    if make is not None:
        network = make(path).requires_grad_(False).eval().to(device)
        return FeatureNetwork(str(name), network, make.preprocessing)
    if path:
        raise UserError("--feature_weights needs --features inception or dinov2; add one of them")
    return None


def _no_package(name: str, package: str) -> UserError:
    return UserError(f"--features {name} needs the package {package}: pip install {package}")


def _no_weights(name: str, error: Exception, where: str) -> UserError:
    return UserError(
        f"--features {name} has no weights ({one_line(error, 150)}); download {where} and give "
        "its path as --feature_weights, or use --features classifier"
    )


def _wrong_weights(name: str, path: str, right: str) -> UserError:
    found = f"{path or 'the download'} does not hold the weights of {name}"
    return UserError(f"{found}; --feature_weights takes those of {right}")
