"""Everything that a user can get wrong: one line that says what, where, and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import TINY_GPT, TINY_TOKENIZER, write_images
from transformer import GPT, GPTConfig
from utils.data.indices import IndicesMeta, write_indices
from utils.data.sources import Row
from utils.data.vocabulary import FILE, Vocabulary
from utils.files import write_folder
from utils.provenance import Provenance, load_model, model_files
from vqvae import VQVAE, VQVAEConfig

Call = Callable[..., str]
GRID = (6, 10)


@pytest.fixture
def data(own_folder: Path) -> Path:
    return write_images(own_folder / "data")


@pytest.fixture
def tokenizer(own_folder: Path) -> Path:
    """A tokenizer for 24x40 RGB images that was never trained."""
    return make_tokenizer(own_folder / "tokenizer")


def make_tokenizer(folder: Path, codebook_size: int = 16) -> Path:
    config = VQVAEConfig.create(
        image_size=(24, 40),
        in_channels=3,
        channels=8,
        codebook_size=codebook_size,
        codebook_dim=4,
    )
    write_folder(folder, model_files(VQVAE(config), Provenance()))
    return folder


@pytest.fixture
def gpt(own_folder: Path, tokenizer: Path) -> Path:
    """A GPT of the classes a and b for the tokenizer."""
    config = GPTConfig(
        codebook_size=16, num_classes=2, latent_dim=GRID, dim=16, num_heads=2, num_layers=1
    )
    sha256 = load_model(tokenizer, VQVAE).sha256
    words = Vocabulary(16, GRID, sha256, class_names=("a", "b"))
    files = model_files(GPT(config), Provenance()) | {FILE: words.content()}
    write_folder(own_folder / "gpt", files)
    return own_folder / "gpt"


@pytest.fixture
def indices(own_folder: Path, tokenizer: Path) -> Path:
    """An indices folder of the tokenizer."""
    sha256 = load_model(tokenizer, VQVAE).sha256
    rows = [Row(f"{n}.png", "ab"[n % 2], "val" if n > 8 else "train") for n in range(12)]
    meta = IndicesMeta(16, GRID, tokenizer_sha256=sha256)
    return write_indices(own_folder / "indices", torch.randint(0, 16, (12, *GRID)), rows, meta)


def train_tokenizer(error_of: Call, path: Path, *flags: object) -> str:
    error = error_of("train_vqvae", "--path_to_data", path, *TINY_TOKENIZER, *flags)
    assert not Path("outputs").exists()  # nothing was begun
    assert not Path("mlflow.db").exists()
    return error


# --- the CSV and the images ---------------------------------------------------------------------


def test_no_such_csv(error_of: Call) -> None:
    assert "no such CSV file: nowhere.csv" in train_tokenizer(error_of, Path("nowhere.csv"))


def test_no_column(error_of: Call, data: Path) -> None:
    data.write_text("file,label\n0.png,a\n")
    error = train_tokenizer(error_of, data)
    assert "no column image_path" in error
    assert "file,label" in error


def test_empty_csv(error_of: Call, data: Path) -> None:
    data.write_text("image_path,label\n")
    assert "lists no images" in train_tokenizer(error_of, data)
    data.write_text("")
    assert "has no column image_path" in train_tokenizer(error_of, data)


def test_missing_files_are_counted_and_the_first_five_named(error_of: Call, data: Path) -> None:
    data.write_text("image_path\n0.png\n" + "".join(f"gone{n}.png\n" for n in range(8)))
    error = train_tokenizer(error_of, data)
    assert "8 of 9 files" in error
    assert "gone0.png, gone1.png, gone2.png, gone3.png, gone4.png and 3 more" in error


@pytest.mark.parametrize("damage", ["no image", "truncated", "zero bytes"])
def test_damaged_images_are_named_with_their_row(error_of: Call, data: Path, damage: str) -> None:
    path = data.parent / "3.png"
    content = path.read_bytes()
    damaged = {
        "no image": b"these are words",
        "truncated": content[: len(content) // 2],
        "zero bytes": b"",
    }
    path.write_bytes(damaged[damage])
    error = train_tokenizer(error_of, data)
    assert "1 of 12 files" in error
    assert "row 4 3.png" in error


def test_mixed_sizes(error_of: Call, data: Path) -> None:
    Image.new("RGB", (50, 30)).save(data.parent / "5.png")
    error = train_tokenizer(error_of, data)
    assert "24x40 (0.png), 30x50 (5.png)" in error
    assert "--image_size" in error


def test_a_size_that_does_not_divide(error_of: Call, data: Path) -> None:
    error = train_tokenizer(error_of, data, "--image_size", "25,40")
    assert "25,40 is not a multiple of the downsampling factor 4" in error


def test_too_few_images_for_a_batch(error_of: Call, data: Path) -> None:
    error = train_tokenizer(error_of, data, "--batch_size", 64)
    assert "11 training images are too few for one batch of 64" in error


def test_paths_that_leave_the_folder(error_of: Call, data: Path) -> None:
    Image.new("RGB", (40, 24)).save("secret.png")
    data.write_text(data.read_text() + "../secret.png,a\n")
    error = train_tokenizer(error_of, data)
    assert "../secret.png" in error
    assert "--allow_outside_paths" in error


def test_values_out_of_range(error_of: Call, data: Path) -> None:
    assert "learning_rate" in train_tokenizer(error_of, data, "--learning_rate", -1)
    assert "codebook_size" in train_tokenizer(error_of, data, "--codebook_size", 1)
    assert "val_fraction" in train_tokenizer(error_of, data, "--val_fraction", 2)


def test_values_out_of_range_for_the_gpt(error_of: Call, indices: Path) -> None:
    """A share of validation below 0 was a traceback after the run had been opened."""
    for flag, value in (("val_fraction", -0.1), ("val_fraction", 1), ("fd_samples", -1)):
        error = error_of("train", "--path_to_data", indices, *TINY_GPT, f"--{flag}", value)
        assert f"{flag} must " in error
    assert not Path("outputs").exists()


def test_nothing_to_resume(error_of: Call, data: Path) -> None:
    assert "no checkpoint there" in train_tokenizer(error_of, data, "--resume", "nowhere")


# --- runs, model folders ------------------------------------------------------------------------


def test_wrong_run_id(error_of: Call, data: Path, tokenizer: Path) -> None:
    flags = ("--model_dir", tokenizer, "--path_to_data", data, "--run_id", "0123abc")
    assert "no MLflow run '0123abc'" in error_of("quantize_dataset", *flags)
    assert not list(Path().rglob("indices.npy"))


def test_a_run_that_is_not_there_as_an_address(error_of: Call, data: Path) -> None:
    flags = ("--model_dir", "runs:/0123abc/checkpoints", "--path_to_data", data)
    assert "runs:/0123abc/checkpoints" in error_of("quantize_dataset", *flags)


def test_a_folder_that_is_no_model(error_of: Call, data: Path) -> None:
    error = error_of("quantize_dataset", "--model_dir", data.parent, "--path_to_data", data)
    assert "is not a model folder" in error
    error = error_of("quantize_dataset", "--model_dir", "nowhere", "--path_to_data", data)
    assert "no such model folder: nowhere" in error


def test_a_model_of_the_wrong_kind(error_of: Call, data: Path, tokenizer: Path, gpt: Path) -> None:
    error = error_of("quantize_dataset", "--model_dir", gpt, "--path_to_data", data)
    assert "holds a GPT, but a VQVAE is needed" in error
    error = error_of("transformer_generation", "--model_path", tokenizer)
    assert "holds a VQVAE, but a GPT is needed" in error


def test_no_run_that_has_ended_is_touched_by_a_typo(error_of: Call, gpt: Path) -> None:
    error = error_of("transformer_generation", "--model_path", gpt, "--run_id", "")
    assert "no MLflow run ''" in error


@pytest.mark.parametrize("change", [{"num_res_blocks": 10**9}, {"channels": 10**9}])
def test_a_config_that_asks_for_all_of_the_machine(
    error_of: Call, data: Path, tokenizer: Path, change: dict
) -> None:
    """Whoever changed config.json can change sha256.json, too; it was built for ever."""
    (tokenizer / "sha256.json").unlink()
    file = tokenizer / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    error = error_of("quantize_dataset", "--model_dir", tokenizer, "--path_to_data", data)
    assert "config.json" in error


def test_a_mask_that_is_no_picture(error_of: Call, gpt: Path, indices: Path) -> None:
    Path("mask.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    flags = ("--model_path", gpt, "--complete", indices, "--mask", "mask.png")
    assert (
        "cannot be read as a picture: not an image that can be read: it is a PostScript file"
        in error_of("transformer_generation", *flags)
    )


# --- what does not belong together --------------------------------------------------------------


def test_unknown_label(error_of: Call, gpt: Path) -> None:
    error = error_of("transformer_generation", "--model_path", gpt, "--labels", "a", "cat")
    assert "unknown label cat; the classes are: a, b" in error


def test_sampling_values_out_of_range(error_of: Call, gpt: Path) -> None:
    error = error_of("transformer_generation", "--model_path", gpt, "--temperature", -1)
    assert "temperature must be at least 0" in error
    error = error_of("transformer_generation", "--model_path", gpt, "--top_p", 1.5)
    assert "top_p" in error


def test_a_vocabulary_of_another_gpt(error_of: Call, gpt: Path, own_folder: Path) -> None:
    other = own_folder / "other"
    write_folder(other, {FILE: Vocabulary(16, GRID, class_names=("a", "b", "c")).content()})
    flags = ("--model_path", gpt, "--vocabulary_path", other)
    error = error_of("transformer_generation", *flags)
    assert "num_classes is 3, the GPT's 2" in error


def test_another_grid(error_of: Call, indices: Path) -> None:
    flags = ("--path_to_data", indices, "--latent_dim", "10,6")
    error = error_of("train", *flags, *TINY_GPT)
    assert "(10, 6)" in error
    assert "(6, 10)" in error


def test_indices_of_another_tokenizer(error_of: Call, indices: Path, own_folder: Path) -> None:
    torch.manual_seed(1)
    other = make_tokenizer(own_folder / "other")
    for script, flag in (
        ("train", "--path_to_data"),
        ("vqvae.images_from_indexes", "--indexes_path"),
    ):
        error = error_of(script, flag, indices, "--model_dir", other)
        assert "belongs to the tokenizer" in error
    larger = make_tokenizer(own_folder / "larger", codebook_size=32)
    error = error_of("vqvae.images_from_indexes", "--indexes_path", indices, "--model_dir", larger)
    assert "16" in error
    assert "32" in error


# --- text files of indices ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1 2 3 4\n1 2 99 4\n", "line 2, number 3: 99 is not an index"),
        ("1 2 3 4\n1 2 3\n", "line 2: it has 3 indices, but a grid of 2,2 takes 4"),
        ("1 2 x 4\n", "line 1, number 3: x is not an index"),
        ("1 2 -3 4\n", "line 1, number 3: -3 is not an index"),
        ("1 2 3\n", "it has 3 indices, but a grid of 1,1 takes 1"),
        ("", "line 1: it has 0 indices"),
    ],
)
def test_text_files(error_of: Call, tokenizer: Path, text: str, complaint: str) -> None:
    Path("indices.txt").write_text(text)
    flags = ("--indexes_path", "indices.txt", "--model_dir", tokenizer, "--output_dir", "images")
    assert complaint in error_of("vqvae.images_from_indexes", *flags)
    assert not Path("images").exists()


def test_a_text_file_of_another_length(error_of: Call, tokenizer: Path) -> None:
    Path("indices.txt").write_text("1 2 3 4\n")
    flags = ("--indexes_path", "indices.txt", "--latent_dim", "6,10", "--model_dir", tokenizer)
    error = error_of("vqvae.images_from_indexes", *flags)
    assert "line 1: it has 4 indices, but a grid of 6,10 takes 60" in error


def test_images_of_an_earlier_call_outlive_a_refused_one(
    error_of: Call, tokenizer: Path, indices: Path, own_folder: Path
) -> None:
    Path("images").mkdir()
    for name in ("images.csv", "00000.png"):
        Path("images", name).write_text("of an earlier call")
    flags = ("--indexes_path", indices, "--model_dir", tokenizer, "--output_dir", "images")
    error_of("vqvae.images_from_indexes", *flags, "--run_id", "0" * 32)
    assert Path("images/00000.png").read_text() == "of an earlier call"


def test_a_full_folder_is_not_overwritten(
    error_of: Call, data: Path, tokenizer: Path, gpt: Path, indices: Path
) -> None:
    Path("mine").mkdir()
    Path("mine/00000.png").write_text("precious")
    flags = ("--indexes_path", indices, "--model_dir", tokenizer, "--output_dir", "mine")
    assert "is not empty" in error_of("vqvae.images_from_indexes", *flags)
    flags = ("--path_to_data", data, "--model_dir", tokenizer, "--output_dir", "mine")
    assert "exists and is not empty" in error_of("quantize_dataset", *flags)
    flags = ("--model_path", gpt, "--output_dir", "mine")
    assert "exists and is not empty" in error_of("transformer_generation", *flags)
    assert Path("mine/00000.png").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    error_of: Call, data: Path, tokenizer: Path, gpt: Path, indices: Path
) -> None:
    """Some scripts ended in a traceback, and some did so after their work."""
    scripts = {
        "train_vqvae": ("--path_to_data", data),
        "quantize_dataset": ("--model_dir", tokenizer, "--path_to_data", data),
        "train": ("--path_to_data", indices),
        "transformer_generation": ("--model_path", gpt),
        "evaluate": ("reconstructions", "--model_dir", tokenizer, "--path_to_data", data),
        "vqvae.images_from_indexes": ("--indexes_path", indices, "--model_dir", tokenizer),
        "vqvae.convert": ("--to", "taming", "--checkpoint", tokenizer),
        "transformer.convert": ("--from", "llamagen", "--checkpoint", "c2i.pt"),
        "utils.data.download": ("digits",),
    }
    Path("outputs").touch()
    for script, flags in scripts.items():
        for place in ("outputs/here", "/proc/here/there"):
            error = error_of(script, *flags, "--output_dir", place)
            assert f"cannot write to {place}" in error
    for script in list(scripts)[:5]:  # where each writes without the flag
        assert "cannot write to outputs" in error_of(script, *scripts[script])
    assert not Path("mlflow.db").exists()
