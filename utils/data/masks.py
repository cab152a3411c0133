"""Masks of completions: which pixels of each image are known; their positions; their blending."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.cli import UserError, user_error
from utils.data.decoding import complaint, open_image
from utils.data.images import ImageDataset

KNOWN = "known.npz"  # in an indices folder of completions: `KnownPixels`
# Where the known part begins, or of `border` the unknown: first, in the middle or last, in halves.
REGIONS = {"top": 0, "bottom": 2, "left": 0, "right": 2, "center": 1, "border": 1}


class KnownPixels(NamedTuple):
    """Of completed images: which pixels are known, and the image file that they are of."""

    masks: Tensor  # (1 or N, H, W), bool, of any size in proportion to the images
    image_paths: Sequence[str]  # (N,), of the data source

    def save(self, folder: Path) -> None:
        """Write known.npz into a folder of indices."""
        paths = np.array(self.image_paths)
        np.savez_compressed(folder / KNOWN, masks=self.masks.numpy(), image_paths=paths)

    @classmethod
    def load(cls, folder: Path) -> "KnownPixels | None":
        """Those of a folder of indices, None if not completed; a UserError for a damaged file."""
        if not (folder / KNOWN).is_file():
            return None
        text = f"{folder / KNOWN} is damaged: %s; complete the images again"
        # numpy raises nearly every type on a damaged file.
        with user_error(text, Exception), np.load(folder / KNOWN, allow_pickle=False) as arrays:
            masks, paths = torch.from_numpy(arrays["masks"]), arrays["image_paths"].tolist()
            if masks.dtype != torch.bool or masks.dim() != 3 or len(masks) not in (1, len(paths)):
                raise ValueError(f"masks are {tuple(masks.shape)} for {len(paths)} images")
        return cls(masks, paths)

    def rows_in(self, data: ImageDataset) -> Tensor:
        """The row numbers (N,) of the images in their source; a UserError if it lacks one."""
        numbers = {row.image_path: number for number, row in enumerate(data.rows)}
        missing = [path for path in self.image_paths if path not in numbers]
        if missing:
            raise UserError(f"{data.path} has no image {missing[0]}, which was completed")
        return torch.tensor([numbers[path] for path in self.image_paths])

    def blend(self, images: Tensor, originals: Tensor, rows: Tensor, feather: int = 0) -> Tensor:
        """Decoded images (B, C, H, W) of these rows, with the known pixels of the originals.

        The originals fade over `feather` pixels at the border of what is not known.
        """
        masks = self.masks.expand(len(self.image_paths), -1, -1)[rows, None].to(images)
        weights = [F.interpolate(masks, size=images.shape[2:])]
        for _ in range(feather):  # each one pixel less
            weights.append(-F.max_pool2d(-weights[-1], 3, stride=1, padding=1))
        return torch.lerp(images, originals, torch.stack(weights).mean(dim=0))


def region_mask(text: str, size: tuple[int, int]) -> Tensor:
    """The known mask of a grid of `size`, (h, w), bool: `top:0.5` is its upper half.

    `center` is the middle half of rows and of columns, `border` all but the middle.
    """
    name, _, fraction = text.partition(":")
    try:
        known = float(fraction)
    except ValueError:
        known = -1.0
    if name not in REGIONS or not 0 <= known <= 1:
        raise UserError(
            f"--mask {text} is neither a picture nor a folder of pictures; expected these, or "
            f"{', '.join(REGIONS)} and a fraction, as top:0.5"
        )
    lines = []
    for length in size:
        count = round((1 - known if name == "border" else known) * length)
        number = torch.arange(length) - (length - count) * REGIONS[name] // 2
        lines.append((number >= 0) & (number < count))
    rows, columns = lines[0][:, None].expand(size), lines[1].expand(size)
    both = rows & columns
    return {"top": rows, "bottom": rows, "center": both, "border": ~both}.get(name, columns)


def read_mask(file: Path) -> Tensor:
    """The known pixels (H, W), bool, of a picture: opaque ones if it has alpha, else light ones."""
    try:
        with open_image(file) as picture:
            alpha = picture.has_transparency_data
            grey = picture.convert("RGBA").getchannel("A") if alpha else picture.convert("L")
            return torch.from_numpy(np.asarray(grey) >= 128)
    except MemoryError:  # which is no property of the file
        raise
    except Exception as error:
        text = f"--mask {file} cannot be read as a picture: {complaint(file, error)}"
        raise UserError(text) from error


def covered_pixels(layer: Image.Image, size: tuple[int, int]) -> Tensor:
    """The pixels of an image of `size` (H, W) that a layer over an enlarged one covers, bool."""
    alpha = torch.tensor(np.asarray(layer.convert("RGBA").getchannel("A")))
    return F.adaptive_max_pool2d(alpha[None].float(), size)[0] > 0


def read_masks(text: str, image_paths: Sequence[str], size: tuple[int, int]) -> Tensor:
    """The known pixels of images in grids of `size` (h, w): (1, H, W), or (N, H, W) of a folder.

    In a folder, the mask of train/5/0.jpg is train/5/0.png or 0.png. A UserError if `text` names no
    mask, or one of other proportions, or one that leaves nothing to sample, or nothing known.
    """
    files = [Path(text)]
    if text.partition(":")[0] in REGIONS or not (files[0].is_file() or files[0].is_dir()):
        masks = [region_mask(text, size)]
    else:
        if files[0].is_dir():
            files = [_find_mask(files[0], Path(name)) for name in image_paths]
        masks = [read_mask(file) for file in files]
    for file, mask in zip(files, masks, strict=True):
        height, width = mask.shape
        known = known_positions(mask[None], size)
        text, error = f"--mask {file} has {height}x{width} pixels, ", ""
        if mask.shape != masks[0].shape:
            error = f"but {files[0]} {masks[0].shape[0]}x{masks[0].shape[1]}; use one size"
        elif height * size[1] != width * size[0] or height < size[0]:
            error = f"which do not fit grids of {size[0]}x{size[1]}; use the size of the images"
        elif known.all():
            error = "and leaves nothing to sample; paint what to sample black, or transparent"
        elif not known.any():
            error = "and no latent position is known; omit --complete to sample whole images"
        if error:
            raise UserError(text + error)
    return torch.stack(masks)


def known_positions(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """The latent positions of which all pixels (N, H, W) are known, (N, *size), bool."""
    return F.adaptive_max_pool2d((~masks)[:, None].float(), size)[:, 0] == 0


def _find_mask(folder: Path, image: Path) -> Path:
    places = folder / image.with_suffix(".png"), folder / f"{image.stem}.png"
    found = [place for place in places if place.is_file()]
    if not found:
        raise UserError(f"--mask {folder} has no mask for {image}; add {places[1].name}")
    return found[0]
