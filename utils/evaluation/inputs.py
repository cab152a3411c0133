"""What the flags of evaluate.py name: sets of images, samples, and published feature networks."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import addresses, cli, provenance
from utils.cli import UserError, user_error
from utils.data.finding import expand
from utils.data.images import ImageConfig, ImageDataset
from utils.data.indices import digest, lineage_of, read_indices
from utils.data.sources import Row, open_file, split_rows
from utils.evaluation.distances import DENSITY_K
from utils.evaluation.features import DecodedImages, FeatureNetwork, Images, ImageSet
from utils.provenance import Lineage, LoadedModel, Split

# Images; samples are compared by their neighbours.
NEEDED = {"reconstructions": 2, "likelihood": 2, "samples": DENSITY_K + 1}
LIST, GRID, NPZ = "images.csv", "grid.png", "samples.npz"  # in a folder of images_from_indexes.py
INCEPTION = ("2048", "logits_unbiased")  # the Inception Score takes logits without bias
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of its pixels


class RealImages(NamedTuple):
    """Real images of a training, and real images held out from it."""

    train: ImageSet
    held_out: ImageSet
    split: dict[str, Any]  # `held_out`, in words; val_fraction and seed where they decided


class PixelImages:
    """The .npz of samples that OpenAI's guided-diffusion evaluates: arr_0 (N, H, W, 3), uint8."""

    def __init__(self, flags: argparse.Namespace, path: Path, channels: int | None) -> None:
        """Read the pixels, of which a tokenizer may take fewer channels; a UserError for others."""
        if flags.image_size:
            raise UserError("--image_size cannot be combined with an .npz; leave it out")
        if channels == 4:
            raise UserError(f"{path} has no transparency, which the tokenizer has; give PNG files")
        text = f"{path} is not a valid .npz of samples, arr_0 of uint8 (N, H, W, 3): %s; "
        text += "write it again"
        # numpy raises nearly every type on a damaged file.
        with user_error(text, Exception), np.load(path, allow_pickle=False) as arrays:
            pixels = arrays["arr_0"]
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
                raise ValueError(f"arr_0 is {pixels.dtype} {pixels.shape}")
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, :channels]
        self.channels, self.size, self.files = channels or 3, pixels.shape[1:3], [path]
        self.rows = [Row(f"{number:05}.png", "", "") for number in range(len(pixels))]
        _check_count(flags, self, path)

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, batches_of_rows: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The images of each batch of row numbers, (B, C, H, W) in [-1, 1]."""
        yield from (self.pixels[rows].to(device) / 127.5 - 1 for rows in batches_of_rows)


class Samples(NamedTuple):
    """Samples and their origin, as far as it is known."""

    images: Images
    place: Path  # their file or folder
    sha256: str
    lineage: Lineage
    split: Split | None = None  # of the training's data


def read_images(
    flags: argparse.Namespace, flag: str, path: str | Path = "", **options: Any
) -> ImageDataset:
    """The images that a flag names, or those at `path`; `options` are those of `ImageDataset`."""
    path = path or getattr(flags, flag)
    if not all(part.exists() for part in expand(path)):
        takes = f"--{flag} takes a CSV of images, or a folder of class folders"
        raise UserError(f"no such CSV file: {path}; {takes}")
    dataset = ImageDataset(path, cli.read_flags(ImageConfig, flags), **options)
    print(dataset)
    _check_count(flags, dataset, path)
    return dataset


def _check_count(flags: argparse.Namespace, images: Images, path: str | Path) -> None:
    needed = NEEDED[flags.kind]
    if len(images) < needed:
        raise UserError(f"{path} has only {len(images)} images; give {needed} or more")


def read_real(
    flags: argparse.Namespace, samples: Images, split: Split | None, **options: Any
) -> RealImages:
    """The real images of --path_to_data; held out: --path_to_test, or its validation rows.

    `split` is that of the training, needed where the CSV has no column split.
    """
    path, size = flags.path_to_data, samples.size
    wanted = size if flags.image_size or flags.indexes_path else None
    options["channels"] = samples.channels
    real = read_images(flags, "path_to_data", size=wanted, **options)
    if real.size != size:
        sizes = ["x".join(map(str, one)) for one in (real.size, size)]
        raise UserError(
            f"the images in {path} have {sizes[0]} pixels, the samples {sizes[1]}; resize them by "
            "--image_size H,W"
        )
    if flags.path_to_test:
        options |= {"value_range": real.value_range, "resampling": real.resampling}
        test = read_images(flags, "path_to_test", size=size, **options)
        return RealImages(ImageSet.whole(real), ImageSet.whole(test), {"held_out": "path_to_test"})
    described = {"held_out": "column split of path_to_data"}
    if not real.rows[0].split:
        if split is None:
            raise UserError(
                f"nothing says which images of {path} the training has seen; add others by "
                "--path_to_test, the tokenizer by --model_dir, or a column split"
            )
        described = {"held_out": "split from path_to_data as in the training", **asdict(split)}
    train, held_out = split_rows(real.rows, **asdict(split or Split(0.0, 0)))
    if min(len(train), len(held_out)) < NEEDED[flags.kind]:
        few = f"{path} has {len(held_out)} validation images, too few to compare with"
        raise UserError(f"{few}; give others by --path_to_test")
    return RealImages(ImageSet(real, train), ImageSet(real, held_out), described)


def read_samples(flags: argparse.Namespace, tokenizer: LoadedModel | None) -> Samples:
    """The samples of --images, a CSV or what images_from_indexes.py wrote, or of --indexes_path."""
    if bool(flags.images) == bool(flags.indexes_path):
        raise UserError("give the samples by either --images or --indexes_path")
    if flags.images:
        path = Path(flags.images)
        table = path / LIST if path.is_dir() else path
        if not table.is_file():
            takes = "--images takes a folder of images_from_indexes.py, a CSV, or an .npz"
            raise UserError(f"no images at {path}; {takes}")
        channels = tokenizer and tokenizer.model.config.in_channels
        if table.suffix == ".npz":
            images: Any = PixelImages(flags, table, channels)
        else:
            images = read_images(flags, "images", table, size=flags.image_size, channels=channels)
        place, grid = table.parent if table.name == LIST else table, table.with_name(GRID)
        sha256 = hashlib.sha256()
        for file in images.files:
            with open_file(file) as content:
                sha256.update(content.read())
        written = table.name in (LIST, NPZ) and grid.is_file()
        known = provenance.of_picture(grid) if written else ((),)
        return Samples(images, place, sha256.hexdigest(), *known)
    if flags.image_size:
        raise UserError("--image_size cannot be combined with --indexes_path; leave it out")
    if tokenizer is None:
        raise UserError("--indexes_path needs the tokenizer of the indices; add --model_dir")
    address, config = flags.indexes_path, tokenizer.model.config
    path = addresses.fetch(address)
    indices = read_indices(path, codebook_size=config.codebook_size, depth=config.depth)
    indices.meta.check_tokenizer(tokenizer.sha256, tokenizer.folder, owner=path)
    decoded = DecodedImages(indices.grids, indices.rows, tokenizer.model)
    _check_count(flags, decoded, path)
    # What was fetched lies in a cache.
    place = path if path == Path(address) else Path("outputs", *address.split("/")[1:])
    return Samples(decoded, place, digest(path), lineage_of(path))


class _Inception(nn.Module):
    """torch-fidelity's port of the network of the first FID, with its own resizing to 299."""

    preprocessing = "8 bits, RGB, TensorFlow's bilinear resizing to 299x299"

    def __init__(self, path: str) -> None:
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity

        # torch-fidelity unpickles the file without restrictions; this refuses one with anything
        # besides tensors in it.
        if path:
            torch.load(path, map_location="cpu", weights_only=True)
        else:
            torch.hub.load_state_dict_from_url(fidelity.URL_INCEPTION_V3, weights_only=True)
        self.inner = fidelity.FeatureExtractorInceptionV3(
            "inception", list(INCEPTION), feature_extractor_weights_path=path or None
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images[:, :3].expand(-1, 3, -1, -1).add(1).mul(127.5).round()
        features, logits = self.inner(pixels.clamp(0, 255).to(torch.uint8))
        return features, logits


class _Dinov2(nn.Module):
    """transformers' DINOv2: the normalised class token of images of 224x224 (arXiv 2306.04675)."""

    preprocessing = "RGB, antialiased bicubic resizing to 224x224, ImageNet's mean and std"

    def __init__(self, path: str) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        if not Path(path or "-").is_dir():
            raise OSError(f"no folder {path}".strip())
        if not AutoConfig.from_pretrained(path).model_type.startswith("dinov2"):
            raise ValueError("another network")
        self.inner = AutoModel.from_pretrained(path, use_safetensors=True)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        images = images[:, :3].expand(-1, 3, -1, -1)
        images = F.interpolate(images, size=(224, 224), mode="bicubic", antialias=True)
        mean, deviation = torch.tensor(IMAGENET, device=images.device)[..., None, None]
        pixels = ((images.clamp(-1, 1) + 1) / 2 - mean) / deviation
        return self.inner(pixels).pooler_output, None


# Each network, its package, and where its weights are.
PUBLISHED: dict[str, tuple[Any, str, str]] = {
    "inception": (_Inception, "torch-fidelity", "the .pth of github.com/toshas/torch-fidelity"),
    "dinov2": (_Dinov2, "transformers", "the folder huggingface.co/facebook/dinov2-large"),
}


def open_network(name: str | None, path: str, device: torch.device) -> FeatureNetwork | None:
    """Inception or DINOv2; None for another name of --features, which has nothing to open.

    `path` is the weights file of Inception ("" downloads it), or the folder of DINOv2.
    """
    if name not in PUBLISHED:
        if path:
            raise UserError("--feature_weights needs --features inception or dinov2; add one")
        return None
    make, package, weights = PUBLISHED[name]
    with user_error(f"--features {name} needs {package}: pip install {package}", ImportError):
        import_module(package.replace("-", "_"))
    text = f"--features {name} cannot use {path or 'what it downloads'} (%s); give {weights} as "
    text += "--feature_weights, or use --features classifier"
    with user_error(text, Exception):  # no network, no such file, other weights: of many types
        network = make(path).requires_grad_(False).eval().to(device)
    return FeatureNetwork(name, network, make.preprocessing)
