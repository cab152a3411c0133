"""Conditions and residual codes through the scripts, from the CSV to the likelihood."""

import csv
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from tests.conftest import TINY_GPT, write_images
from tests.test_transformer_generation import call
from transformer import GPT, GPTConfig
from utils.cli import UserError
from utils.data.conditioning import choose_conditions, load_conditions
from utils.data.index_dataset import read_conditions
from utils.data.indices import IndicesMeta, read_indices, save_grids, write_indices
from utils.data.sources import Row, read_rows
from utils.data.vocabulary import FILE, GridMeta, Vocabulary, read_vocabulary
from utils.evaluation.features import Settings
from utils.files import sha256, write_folder
from utils.provenance import Provenance, model_files
from vqvae import VQVAE, VQVAEConfig

CPU = ("--device", "cpu")


def make_tokenizer(folder: Path, size: tuple[int, int], channels: int, **options: object) -> Path:
    """A tokenizer that was never trained."""
    torch.manual_seed(sum(size))
    shape = {"channels": 8, "codebook_size": 16, "codebook_dim": 4} | options
    model = VQVAE(VQVAEConfig.create(image_size=size, in_channels=channels, **shape))
    write_folder(folder, model_files(model, Provenance()))
    return folder


@pytest.fixture
def data(own_folder: Path) -> Path:
    """data.csv of RGB images with small grey ones as conditions; low.csv of these alone."""
    folder = write_images(own_folder / "data").parent
    (folder / "low").mkdir()
    rows = read_rows(folder / "data.csv")
    both, low = ["image_path,label,condition_path"], ["image_path,label"]
    for row in rows:
        small = Image.open(folder / row.image_path).convert("L").resize((12, 8))
        small.save(folder / "low" / row.image_path)
        both.append(f"{row.image_path},{row.label},low/{row.image_path}")
        low.append(f"low/{row.image_path},{row.label}")
    (folder / "data.csv").write_text("\n".join(both))
    (folder / "low.csv").write_text("\n".join(low))
    make_tokenizer(own_folder / "tokenizer", (24, 40), 3, quantizer="residual", depth=2)
    make_tokenizer(own_folder / "low", (8, 12), 1, codebook_size=32)
    return folder / "data.csv"


def quantize(data: Path, output: str, *flags: object) -> Path:
    call("quantize_dataset", *CPU, "--path_to_data", data, "--output_dir", output, *flags)
    return Path(output)


def test_from_the_csv_to_the_likelihood(data: Path) -> None:
    both = quantize(data, "both", "--model_dir", "tokenizer", "--condition_model_dir", "low")
    low = quantize(data.with_name("low.csv"), "alone", "--model_dir", "low")
    meta = json.loads((both / "meta.json").read_text())
    assert meta["depth"] == 2
    assert meta["condition"]["codebook_size"] == 32
    assert meta["condition"]["latent_dim"] == [2, 3]
    assert meta["condition"]["tokenizer_sha256"] == sha256(Path("low/model.safetensors"))
    assert np.load(both / "indices.npy").shape == (12, 6, 10, 2)
    assert (np.load(both / "condition.npy") == np.load(low / "indices.npy")).all()
    assert read_indices(both, depth=2).rows[3].condition_path == "low/3.png"

    flags = (*CPU, *TINY_GPT, "--max_epochs", 2, "--order_anneal", "0.3,0.6")
    call("train", "--path_to_data", both, "--model_dir", "tokenizer", *flags, "--output_dir", "gpt")
    words = read_vocabulary("gpt")
    assert words.condition == GridMeta(32, (2, 3), meta["condition"]["tokenizer_sha256"])
    assert words.depth == 2

    model = ("--model_path", "gpt", *CPU)
    for given in (both, low):  # conditions beside images, and alone
        flags = ("--conditions", given, "--num_images", 14, "--guidance_scale", 2)
        call("transformer_generation", *model, *flags, "--output_dir", "sampled")
        sampled = read_indices("sampled", depth=2)
        taken = [number % 12 for number in range(14)]
        expected = np.load(both / "condition.npy")[taken]
        assert (np.load("sampled/condition.npy") == expected).all()
        assert [row.condition_path for row in sampled.rows] == [f"low/{n}.png" for n in taken]
        assert [row.label for row in sampled.rows] == ["ab"[n % 2] for n in taken]
    call("transformer_generation", *model, "--num_images", 2, "--output_dir", "untold")
    assert not Path("untold/condition.npy").exists()
    assert read_indices("untold", depth=2).meta.condition is None

    completion = ("--complete", both, "--mask", "left:0.5", "--num_images", 3, "--variations", 2)
    shown = ("--candidates", 2, "--model_dir", "tokenizer", "--output_dir", "completed")
    call("transformer_generation", *model, *completion, *shown)
    kept = read_indices("completed", depth=2).grids[:][:, :, :5]
    assert torch.equal(kept, read_indices(both, depth=2).grids[[0, 0, 1, 1, 2, 2]][:, :, :5])
    assert (np.load("completed/condition.npy") == expected[[0, 0, 1, 1, 2, 2]]).all()

    decode = ("--model_dir", "tokenizer", "--condition_model_dir", "low", "--output_dir", "images")
    call("vqvae.images_from_indexes", *CPU, "--indexes_path", "sampled", *decode)
    with Image.open("images/grid.png") as picture, Image.open("images/00000.png") as image:
        assert image.size == (40, 24)
        assert picture.mode == "RGB"

    score = ("--model_path", "gpt", "--model_dir", "tokenizer", "--path_to_data", data, *CPU)
    call("evaluate", "likelihood", *score, "--condition_model_dir", "low", "--output_dir", "score")
    figures = json.loads(Path("score/likelihood.json").read_text())["metrics"]
    bits = {name: figures[name]["value"] for name in ("bits_per_pixel", "bits_per_token")}
    assert bits["bits_per_pixel"] == pytest.approx(bits["bits_per_token"] * 120 / 960)
    with Path("score/likelihood.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12


def make_gpt(folder: str, condition: GridMeta | None, **options: object) -> None:
    """A GPT that was never trained, for the grids of the tokenizer."""
    words = Vocabulary(16, (6, 10), class_names=("a", "b"), depth=2, condition=condition)
    shape = {"num_layers": 1, "num_heads": 2, "dim": 16} | options
    gpt = GPT(GPTConfig(**words.model_values, **shape))
    files = model_files(gpt, Provenance()) | {FILE: words.content()}
    write_folder(Path(folder), files)


@pytest.fixture
def models(data: Path) -> GridMeta:
    """GPTs with conditions, without, and never without them; indices without; those of low."""
    condition = GridMeta(32, (2, 3), sha256(Path("low/model.safetensors")))
    make_gpt("told", condition)
    make_gpt("untold", None)
    make_gpt("always", condition, condition_dropout=0.0)
    rows = [Row(f"{number}.png", "a", "") for number in range(3)]
    grids = torch.zeros(3, 6, 10, 2, dtype=torch.long)
    write_indices("plain", grids, rows, IndicesMeta(16, (6, 10), depth=2))
    other = IndicesMeta(32, (2, 3), tokenizer_sha256="f" * 64)
    write_indices("other", grids[:, :2, :3, 0], rows, other)
    return condition


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("told --complete plain", "plain has no conditions, which this GPT needs"),
        ("told --conditions plain", "has codebook_size 32, but plain has codebook_size 16"),
        ("told --conditions other", "but that of other is ffffffffffff"),
        ("told --latent_dim 9,21", "grids must be (6, 10), got (9, 21)"),
        ("untold --conditions other", "the GPT in untold takes no conditions"),
        ("always", "needs a condition"),
    ],
)
def test_conditions_that_do_not_fit_the_gpt_are_one_line(
    models: GridMeta, error_of: Callable[..., str], words: str, message: str
) -> None:
    flags = ("--num_images", 2, *CPU)
    assert message in error_of("transformer_generation", "--model_path", *words.split(), *flags)


def test_conditions_that_the_other_scripts_cannot_take(
    models: GridMeta, data: Path, error_of: Callable[..., str]
) -> None:
    images = ("--model_dir", "tokenizer", "--path_to_data", data, *CPU, "--condition_model_dir")
    error = error_of("quantize_dataset", *images, "tokenizer")
    assert "has depth 2, but conditions have depth 1" in error
    images = ("--model_dir", "low", "--path_to_data", "data/low.csv", *CPU)
    error = error_of("quantize_dataset", *images, "--condition_model_dir", "low")
    assert "low.csv has no column condition_path" in error
    decode = ("--indexes_path", "plain", "--model_dir", "tokenizer", *CPU)
    error = error_of("vqvae.images_from_indexes", *decode, "--condition_model_dir", "low")
    assert "plain has no conditions" in error
    for gpt, address, message in (
        ("told", None, "takes conditions; add --condition_model_dir"),
        ("untold", "low", "takes no conditions; leave"),
        ("told", "tokenizer", "the condition of told belongs to the tokenizer"),
    ):
        flags = Namespace(model_path=gpt, condition_model_dir=address, skip_bad_images=0)
        settings = Settings(torch.device("cpu"), 4, 0)
        with pytest.raises(UserError, match=message):
            evaluate.encode_conditions(flags, read_vocabulary(gpt), settings)


def test_damaged_conditions(own_folder: Path) -> None:
    grids, rows = torch.zeros(2, 2, 2, dtype=torch.long), [Row("a.png", "", "")] * 2
    meta = IndicesMeta(16, (2, 2), condition=GridMeta(300, (1, 3)))
    conditions = torch.tensor([[[0, 1, 299]], [[2, 3, 4]]])
    path = write_indices("indices", grids, rows, meta)
    save_grids(path / "condition.npy", conditions, 300)
    indices = read_indices(path)
    assert indices.meta == meta
    assert read_conditions(path, indices)[:].dtype == torch.uint16
    assert read_conditions(path, indices)[:].long().equal(conditions)
    flags = Namespace(conditions="indices", complete="", variations=2)
    own = Vocabulary(16, (2, 2), condition=GridMeta(300, (1, 3)))
    taken = choose_conditions(flags, own, 6, required=True)
    assert taken.grids[:].long().equal(conditions[[0, 0, 1, 1, 0, 0]])
    Path("low.txt").write_text("0 1 2 300\n")
    square = GridMeta(301, (2, 2))
    found = load_conditions(Path("low.txt"), square, allow_images=True)
    assert found.grids[:].tolist() == [[[0, 1], [2, 300]]]
    with pytest.raises(UserError, match="line 1, number 4: 300 is not an index of the codebook"):
        load_conditions(Path("low.txt"), replace(square, codebook_size=300), allow_images=True)
    with pytest.raises(UserError, match=r"\(3, 1\), but indices has latent_dim \(1, 3\)"):
        load_conditions(path, GridMeta(300, (3, 1)), allow_images=False)
    (path / "sha256.json").unlink()
    array = np.load(path / "condition.npy")
    for bad in (array.astype(np.int32), array + 1, array[:, :, :2]):
        np.save(path / "condition.npy", bad)
        with pytest.raises(UserError, match=r"condition\.npy holds"):
            read_conditions(path, indices)
    np.save(path / "condition.npy", array[:1])
    with pytest.raises(UserError, match=r"has 2 rows for 1 grids in condition\.npy"):
        read_conditions(path, indices)
    (path / "condition.npy").unlink()
    with pytest.raises(UserError, match=r"has 2 rows for 0 grids in condition\.npy"):
        read_conditions(path, indices)
    plain = replace(indices.meta, condition=None)
    assert read_conditions(path, indices._replace(meta=plain)) is None


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("none.png", "1 of 2 files .* do not exist, .*: none.png"),
        ("", "row 2: condition_path is empty"),
    ],
)
def test_the_files_of_the_conditions_are_checked(data: Path, second: str, message: str) -> None:
    lines = ["image_path,condition_path", "0.png,low/0.png", f"1.png,{second}"]
    (data.parent / "bad.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        read_rows(data.parent / "bad.csv")
