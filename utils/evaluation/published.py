"""The published feature networks: Inception, through which FID is defined, and DINOv2."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.cli import UserError, one_line
from utils.evaluation.features import FeatureNetwork

INCEPTION = ("2048", "logits_unbiased")  # the Inception Score takes logits without bias
DINOV2 = "huggingface.co/facebook/dinov2-large"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


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
            loaded: Any = AutoModel.from_pretrained(
                path, use_safetensors=True, output_loading_info=True
            )
            self.inner, loading = loaded
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

    Raises:
        UserError: its package or its weights are missing, or they are of another network.
    """
    make: Any = {"inception": _Inception, "dinov2": _Dinov2}.get(name or "")
    if make is not None:
        network = make(path).requires_grad_(False).eval().to(device)
        return FeatureNetwork(str(name), network, make.preprocessing)
    if path:
        raise UserError(
            "--feature_weights belongs to --features inception or dinov2; add one of them"
        )
    return None


def _no_package(name: str, package: str) -> UserError:
    return UserError(f"--features {name} needs the package {package}: pip install {package}")


def _no_weights(name: str, error: Exception, where: str) -> UserError:
    return UserError(
        f"--features {name} has no weights ({one_line(error, 150)}); download {where} and give "
        "its path as --feature_weights, or use --features classifier"
    )


def _wrong_weights(name: str, path: str, right: str) -> UserError:
    return UserError(
        f"{path or 'the download'} does not hold the weights of {name}; --feature_weights takes "
        f"those of {right}"
    )
