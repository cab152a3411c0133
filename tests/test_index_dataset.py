"""Several grids of every image: how they are made, picked in training, and refused."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TINY_GPT, write_images
from tests.test_transformer_generation import call
from utils.cli import UserError
from utils.data.images import ImageConfig, ImageDataset
from utils.data.index_dataset import IndexDataset, choose_crops, natural_order, read_crops
from utils.data.indices import IndicesMeta, read_indices, write_indices
from utils.data.sources import Row
from utils.files import CHECKSUMS, read_tensors, write_folder
from utils.provenance import LoadedModel, Provenance, model_files
from utils.training import loop
from utils.training.checkpoint import find_checkpoint
from vqvae import VQVAE, VQVAEConfig

COUNT, GRID = 12, (6, 10)


@pytest.fixture
def tokenizer(own_folder: Path) -> VQVAE:
    """An untrained tokenizer in tokenizer/, and images in data/data.csv."""
    torch.manual_seed(0)
    sizes = {"channels": 8, "codebook_size": 16, "codebook_dim": 4}
    model = VQVAE(VQVAEConfig.create(image_size=(24, 40), in_channels=3, **sizes)).eval()
    files = model_files(model, Provenance())
    write_folder(own_folder / "tokenizer", files)
    write_images(own_folder / "data", COUNT)
    return model


def quantize(output_dir: str, *flags: object) -> Path:
    call(
        *("quantize_dataset", "--model_dir", "tokenizer", "--path_to_data", "data/data.csv"),
        *("--device", "cpu", "--num_workers", 0, "--output_dir", output_dir, *flags),
    )
    return Path(output_dir)


def crops_of(folder: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / "crops.npy")).long()


def test_crops_are_of_the_larger_image_and_their_mirror_images_follow(tokenizer: VQVAE) -> None:
    plain = quantize("plain")
    folder = quantize("crops", "--crops", 3, "--flip")
    for name in ("indices.npy", "manifest.csv"):  # whoever wants no crops notices nothing
        assert (folder / name).read_bytes() == (plain / name).read_bytes()
    assert not (plain / "crops.npy").exists()
    crops = crops_of(folder)
    assert crops.shape == (COUNT, 6, *GRID)
    dataset = ImageDataset(
        "data/data.csv", ImageConfig(num_workers=0), size=(24, 40), random_crop=True
    )
    assert dataset.resize_size == (27, 45)
    row = 5
    canvas = dataset.pixels[row].float() / 127.5 - 1
    windows = torch.stack(
        [canvas[:, top : top + 24, left : left + 40] for top in range(4) for left in range(6)]
    )
    with torch.inference_mode():
        possible, mirrored = tokenizer.encode(windows), tokenizer.encode(windows.flip(3))
    for crop, mirror in zip(crops[row, :3], crops[row, 3:], strict=True):
        found = (possible == crop).all(dim=(1, 2))
        assert found.any()
        assert any(torch.equal(one, mirror) for one in mirrored[found])
    assert len({crop.numpy().tobytes() for crop in crops[row]}) > 3
    again = quantize("again", "--crops", 3, "--flip", "--batch_size", 5)
    assert torch.equal(crops_of(again), crops)
    assert not torch.equal(crops_of(quantize("other", "--crops", 3, "--flip", "--seed", 1)), crops)


def test_without_crops_the_image_and_its_mirror_image(tokenizer: VQVAE) -> None:
    crops = crops_of(quantize("flipped", "--flip"))
    assert torch.equal(crops[:, 0], read_indices("flipped").grids[:].long())
    images = next(ImageDataset("data/data.csv").batches([torch.arange(COUNT)], torch.device("cpu")))
    with torch.inference_mode():
        assert torch.equal(crops[:, 1], tokenizer.encode(images.flip(3)))


def test_the_choice_depends_on_seed_epoch_and_row_alone() -> None:
    chosen = choose_crops(1000, 4, seed=3, epoch=1)
    assert torch.equal(chosen, choose_crops(1000, 4, seed=3, epoch=1))
    for other in (choose_crops(1000, 4, 3, 2), choose_crops(1000, 4, 4, 1)):
        assert 0.15 < (other == chosen).float().mean() < 0.35
    assert torch.bincount(chosen).min() > 200


def test_batches_take_the_chosen_crop_of_each_row(own_folder: Path) -> None:
    rows = [Row(f"{number}.png", "", "") for number in range(9)]
    crops = torch.randint(16, (9, 4, 2, 3)).numpy().astype(np.uint8)
    meta = IndicesMeta(16, (2, 3))
    plain = torch.randint(16, (9, 2, 3))
    write_indices("indices", plain, rows, meta)
    np.save("indices/crops.npy", crops)
    data = IndexDataset(Path("indices"), None, latent_dim=None, val_fraction=0.5, seed=3)
    order = torch.randperm(9)
    chosen = choose_crops(9, 4, seed=3, epoch=1)[order]
    expected = torch.from_numpy(crops[order.numpy(), chosen.numpy()]).long()
    for size in (1, 4, 9):
        grids = torch.cat([batch[1] for batch in data.batches(order.split(size), epoch=1)])
        assert torch.equal(grids, expected)
    assert torch.equal(next(data.batches([order]))[1], plain[order])


def test_training_resumes_exactly_and_validates_on_the_plain_grids(
    tokenizer: VQVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize("indices", "--crops", 4, "--flip")
    quantize("plain")
    training = ("train", *TINY_GPT, "--device", "cpu", "--max_epochs", 3, "--path_to_data")
    call(*training, "indices", "--output_dir", "whole")
    call(*training, "plain", "--output_dir", "no-crops")
    real, steps = loop.end_step, []

    def end_step(*arguments: object, **options: object) -> bool:
        steps.append(len(steps))
        if len(steps) == 4:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "end_step", end_step)
    with pytest.raises(SystemExit):
        call(*training, "indices", "--output_dir", "parts")
    call(*training, "indices", "--resume", "parts")
    last = [find_checkpoint(name, "") / "model.safetensors" for name in ("whole", "parts")]
    weights = [read_tensors(path) for path in last]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    def validations(folder: str) -> list[float]:
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        return [x["val/bits_per_token"] for x in lines if "val/bits_per_token" in x]

    assert validations("whole")[0] == validations("no-crops")[0]
    assert validations("whole")[-1] != validations("no-crops")[-1]


def test_what_does_not_fit_is_refused(tokenizer: VQVAE, error_of: Callable[..., str]) -> None:
    folder = quantize("indices", "--crops", 2)
    indices = read_indices(folder)
    good = np.load(folder / "crops.npy")
    sums = json.loads((folder / CHECKSUMS).read_text())
    del sums["crops.npy"]  # as who changes it on purpose does
    (folder / CHECKSUMS).write_text(json.dumps(sums))
    for array, complaint in (
        (good[1:], r"manifest\.csv has 12 rows for 11 grids in crops\.npy"),
        (
            good.astype(np.uint16),
            r"holds uint16 \(12, 2, 6, 10\), but meta\.json says uint8 \(N, crops, 6, 10\)",
        ),
        (good[..., :-1], "holds uint8"),
        (good + np.uint8(16), "holds the index"),
    ):
        np.save(folder / "crops.npy", array)
        with pytest.raises(UserError, match=complaint):
            read_crops(folder, indices)
    (folder / "crops.npy").write_bytes(b"\x93NUMPY")
    error = error_of("train", "--path_to_data", "indices", *TINY_GPT)
    assert "crops.npy is damaged" in error


@pytest.mark.parametrize(("index", "position"), [(8, "line 2, number 3"), (99, "line 1, number 1")])
def test_a_text_file_beyond_the_codebook_of_the_tokenizer_is_refused(
    own_folder: Path, index: int, position: str
) -> None:
    """As of one that counts its codes from 1; without the tokenizer it is read."""
    shape = {"channels": 8, "codebook_size": 8, "codebook_dim": 4, "patch_size": 4}
    model = VQVAE(VQVAEConfig.create(image_size=(8, 8), in_channels=1, **shape))
    loaded = LoadedModel(model, "0" * 64, own_folder, Provenance())
    options = {"latent_dim": (2, 2), "val_fraction": 0.2, "seed": 0}
    grids = np.arange(24).reshape(6, 4) % 8
    np.savetxt("fits.txt", grids, fmt="%d")
    IndexDataset(Path("fits.txt"), loaded, **options)
    grids[(1, 2) if index == 8 else (0, 0)] = index
    np.savetxt("t.txt", grids, fmt="%d")
    with pytest.raises(
        UserError, match=rf"t\.txt {position}: {index} is not an index of the codebook"
    ):
        IndexDataset(Path("t.txt"), loaded, **options)
    assert IndexDataset(Path("t.txt"), None, **options).vocabulary.codebook_size == index + 1


def test_flex_attention_needs_cuda(tokenizer: VQVAE, error_of: Callable[..., str]) -> None:
    quantize("indices")
    flags = ("--path_to_data", "indices", "--flex_attention", "--device", "cpu", *TINY_GPT)
    assert "--flex_attention needs CUDA" in error_of("train", *flags)


def test_classes_are_in_natural_order() -> None:
    """Classes 0 to 11 were shown as 0, 1, 10, 11, 2."""
    for names in (["0", "2", "10", "11"], ["a2", "a10", "b1"], ["0001", "01", "1", "2", "NA"], []):
        assert sorted(set(names), key=natural_order) == names
