"""transformer_generation.py and evaluate.py likelihood, on models that nobody trained."""

import csv
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import transformer_generation
from tests.conftest import write_images
from transformer import GPT, GPTConfig, SamplingParams, sampling
from transformer.sampling import generate_rows
from utils import cli
from utils.data.indices import IndicesMeta, read_indices, write_indices
from utils.data.sources import Row
from utils.data.vocabulary import FILE, Vocabulary
from utils.files import sha256, write_folder
from utils.provenance import Provenance, model_files
from vqvae import VQVAE, VQVAEConfig

CODES, GRID = 16, (6, 10)
MODELS = ("--model_path", "gpt", "--device", "cpu")


def write_tokenizer(folder: Path, depth: int = 1) -> str:
    """A tokenizer that nobody trained; the SHA-256 of its weights."""
    sizes = {"channels": 8, "codebook_size": CODES, "codebook_dim": 4}
    if depth > 1:
        sizes |= {"quantizer": "residual", "depth": depth}
    tokenizer = VQVAE(VQVAEConfig.create(image_size=(24, 40), in_channels=3, **sizes))
    write_folder(folder, model_files(tokenizer, Provenance()))
    return sha256(folder / "model.safetensors")


def write_gpt(folder: str, words: Vocabulary, **shape: object) -> None:
    """A GPT that nobody trained, with a head that makes a choice."""
    shape = {"num_layers": 1, "num_heads": 2, "dim": 16} | shape
    gpt = GPT(GPTConfig(**words.model_values, **shape))
    torch.nn.init.normal_(gpt.head.weight)
    files = model_files(gpt, Provenance()) | {FILE: words.content()}
    write_folder(Path(folder), files)


@pytest.fixture
def models(own_folder: Path) -> Path:
    """A tokenizer, a windowed GPT and indices of both, in the current folder."""
    torch.manual_seed(0)
    sha256 = write_tokenizer(own_folder / "tokenizer")
    write_gpt("gpt", Vocabulary(CODES, GRID, sha256, class_names=("a", "b")), window_size=3)
    rows = [Row(f"{number}.png", "ab"[number % 2], "") for number in range(4)]
    grids = torch.randint(CODES, (4, *GRID))
    write_indices(
        own_folder / "given", grids, rows, IndicesMeta(CODES, GRID, tokenizer_sha256=sha256)
    )
    return own_folder


def call(module_name: str, *arguments: object) -> None:
    """Run a script in this process."""
    module, before = importlib.import_module(module_name), sys.argv
    sys.argv = [module_name, *map(str, arguments)]
    try:
        cli.run(module.main, module.make_parser())
    finally:
        sys.argv = before


def sampled(folder: Path) -> torch.Tensor:
    return read_indices(folder).grids[:].long()


def test_given_cells_stay_and_are_shown(models: Path) -> None:
    call(
        *("transformer_generation", *MODELS, "--complete", "given", "--mask", "left:0.5"),
        *("--num_images", 3, "--candidates", 2, "--variations", 2, "--model_dir", "tokenizer"),
        *("--output_dir", "completed"),
    )
    given, completed = sampled(models / "given"), sampled(models / "completed")
    assert completed.shape == (6, *GRID)
    assert torch.equal(completed[:, :, :5], given[:3].repeat_interleave(2, dim=0)[:, :, :5])
    assert not torch.equal(completed[0], completed[1])
    assert [row.label for row in read_indices("completed").rows] == list("aabbaa")
    with Image.open(models / "completed" / "completions.png") as picture:
        assert max(picture.size) >= 512


def test_a_picture_says_what_stays(models: Path) -> None:
    mask = np.zeros((60, 100), np.uint8)
    mask[:20, 50:] = 255
    Image.fromarray(mask).save("mask.png")
    call(
        *("transformer_generation", *MODELS, "--complete", "given", "--mask", "mask.png"),
        *("--output_dir", "completed"),
    )
    same = (sampled(models / "completed") == sampled(models / "given")).all(dim=0)
    assert same[:2, 5:].all()
    assert same.sum() < 20


def test_larger_grids_with_guidance(models: Path) -> None:
    for position_extension in ("slide", "extrapolate", "interpolate"):
        call(
            *("transformer_generation", *MODELS, "--num_images", 2, "--latent_dim", "9,21"),
            *(
                "--position_extension",
                position_extension,
                "--guidance_scale",
                2,
                "--guidance_schedule",
                "cosine",
            ),
            *("--min_p", 0.05, "--output_dir", position_extension),
        )
        assert sampled(models / position_extension).shape == (2, 9, 21)


def test_rows_reach_the_disk_while_a_tall_grid_is_sampled(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sampled lies in the file already; an interruption leaves neither half nor nothing."""
    flags = ("--num_images", 2, "--latent_dim", "40,6", "--output_dir", "tall", "--text")
    call("transformer_generation", *MODELS, *flags)
    whole = sampled(models / "tall")
    assert np.loadtxt("tall/indices.txt", dtype=int).reshape(whole.shape).tolist() == whole.tolist()
    seen = []

    def interrupted(*arguments: object, **options: object) -> Iterator[torch.Tensor]:
        for number, row in enumerate(generate_rows(*arguments, **options)):
            yield row
            if number == 25:
                seen.append(np.load("tall.tmp/indices.npy")[:, :26])
                raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "generate_rows", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        call("transformer_generation", *MODELS, *flags)
    assert exit_info.value.code == 130
    assert seen[0].tolist() == whole[:, :26].tolist()
    assert torch.equal(sampled(models / "tall"), whole)
    assert not Path("tall.tmp").exists()


def test_labels_stay_with_completions_that_were_not_told_them(models: Path) -> None:
    call(
        *("transformer_generation", *MODELS, "--complete", "given", "--unconditional"),
        *("--output_dir", "completed"),
    )
    assert [row.label for row in read_indices("completed").rows] == list("abab")
    call("transformer_generation", *MODELS, "--complete", "given", "--output_dir", "told")
    assert not torch.equal(sampled(models / "completed"), sampled(models / "told"))


def test_classes_may_be_sampled_as_often_as_they_occur(
    models: Path, error_of: Callable[..., str]
) -> None:
    names, counts = ("a", "b", "c", "none"), (90, 9, 1, 0)
    write_gpt("uneven", Vocabulary(CODES, GRID, class_names=names, class_counts=counts))
    flags = ("--model_path", "uneven", "--device", "cpu", "--class_frequencies")
    for count, expected in ((100, {"a": 90, "b": 9, "c": 1}), (10, {"a": 9, "b": 1})):
        output = f"of-{count}"
        call("transformer_generation", *flags, "--num_images", count, "--output_dir", output)
        labels = [row.label for row in read_indices(output).rows]
        assert {label: labels.count(label) for label in set(labels)} == expected
    error = error_of("transformer_generation", *flags, "--labels", "a")
    assert "--class_frequencies cannot be combined with --labels" in error
    error = error_of("transformer_generation", *MODELS, "--class_frequencies")
    assert "does not hold how often each class occurs" in error


def test_images_can_be_completed_as_another_class(models: Path) -> None:
    """Also those of a text file, which has no labels."""
    np.savetxt("given.txt", sampled(models / "given").flatten(1), fmt="%d")
    told = {}
    for number, (given, labels) in enumerate(
        [("given", "a"), ("given", "b"), ("given.txt", "a"), ("given.txt", "b")]
    ):
        flags = ("--complete", given, "--labels", labels, "--output_dir", f"told{number}")
        call("transformer_generation", *MODELS, *flags)
        assert {row.label for row in read_indices(f"told{number}").rows} == {labels}
        told[given, labels] = sampled(models / f"told{number}")
    for labels in ("a", "b"):
        assert torch.equal(told["given", labels], told["given.txt", labels])
    assert not torch.equal(told["given", "a"], told["given", "b"])


def test_a_hint_where_classes_are_sampled_without_guidance(
    models: Path, capsys: pytest.CaptureFixture
) -> None:
    for flags, hinted in (
        ((), True),
        (("--guidance_scale", 2), False),
        (("--unconditional",), False),
        (("--complete", "given"), False),
    ):
        capsys.readouterr()
        call("transformer_generation", *MODELS, "--num_images", 1, *flags)
        assert ("hint: " in capsys.readouterr().out) == hinted
    # Without --output_dir each call has a folder of its own.
    assert len([x for x in (models / "gpt").parent.rglob("samples*") if x.is_dir()]) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compile",), "--compile needs a CUDA device"),
        (("--complete", "given", "--mask", "top:1.5"), "as top:0.5"),
        (("--complete", "given", "--mask", "top:1"), "nothing to sample"),
        (("--complete", "given", "--mask", "none.png"), "neither a picture"),
        (("--complete", "given", "--steps", "4"), "needs a GPT trained in random orders"),
        (("--complete", "nowhere"), "no indices at nowhere"),
        (("--guidance_scale", "-1"), "guidance_scale"),
        (("--min_p", "2"), "min_p"),
        (("--variations", "3"), "--variations needs --complete"),
        (("--complete", "given", "--latent_dim", "9,21"), "omit --latent_dim"),
        (("--mask", "top:0.5"), "--mask needs --complete"),
        (("--unconditional", "--labels", "a"), "--labels cannot be combined with --unconditional"),
        (("--complete", "given", "--candidates", "2"), "--mask top:0.5 leaves none there"),
        (("--complete", "given", "--model_dir", "foreign"), "belongs to the tokenizer"),
        (("--temperature", "nan"), "temperature must be at least 0, got nan"),
        (("--temperature", "inf"), "temperature must be below inf, got inf"),
        (("--guidance_scale", "nan"), "guidance_scale must be at least 0, got nan"),
        (("--guidance_scale", "inf"), "guidance_scale must be below inf, got inf"),
    ],
)
def test_what_cannot_be_is_one_line(
    models: Path, error_of: Callable[..., str], flags: tuple[str, ...], message: str
) -> None:
    """All before anything is sampled: what the output folder held stays."""
    write_tokenizer(models / "foreign", depth=2)
    assert message in error_of("transformer_generation", *MODELS, *flags)
    assert not Path("outputs").exists()


def test_guidance_needs_something_to_compare(
    models: Path, error_of: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    write_gpt("plain", Vocabulary(CODES, GRID))
    flags = ("--device", "cpu", "--num_images", 1)
    guided = (*flags, "--guidance_scale", 2)
    error = error_of("transformer_generation", "--model_path", "plain", *guided)
    assert "has neither classes nor conditions" in error
    write_gpt("always", Vocabulary(CODES, GRID, class_names=("a", "b")), class_dropout=0.0)
    for more in (guided, (*flags, "--unconditional")):
        call("transformer_generation", "--model_path", "always", *more, "--output_dir", "sampled")
        assert "warning: this GPT was hardly trained without a class" in capsys.readouterr().err
    call("transformer_generation", "--model_path", "always", *flags, "--output_dir", "sampled")
    assert "warning" not in capsys.readouterr().err


def test_a_text_file_has_the_grids_of_the_model(models: Path) -> None:
    """As many numbers as make a square were one, whatever the model samples."""
    write_gpt("wide", Vocabulary(CODES, (2, 8)))
    Path("given.txt").write_text(" ".join(map(str, range(16))) + "\n")
    flags = ("--complete", "given.txt", "--mask", "left:0.5", "--output_dir", "completed")
    call("transformer_generation", "--model_path", "wide", "--device", "cpu", *flags)
    assert sampled(Path("completed")).shape == (1, 2, 8)
    assert sampled(Path("completed"))[0, :, :4].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]


def test_what_comes_next_can_be_typed(models: Path, capsys: pytest.CaptureFixture) -> None:
    """Without a known run of the tokenizer its address was runs://checkpoints."""
    flags = ("--complete", "given", "--num_images", 1, "--output_dir", "completed")
    call("transformer_generation", *MODELS, *flags)
    said = capsys.readouterr().out
    assert said.rstrip().endswith("--model_dir TOKENIZER")
    assert "known, completed and original images: with --model_dir" in said


def test_bfloat16_draws_with_positions_of_full_precision(models: Path) -> None:
    call(
        *("transformer_generation", *MODELS, "--precision", "bf16", "--num_images", 2),
        *("--output_dir", "coarse"),
    )
    assert sampled(Path("coarse")).shape == (2, *GRID)
    model = GPT(GPTConfig(CODES, latent_dim=GRID, num_layers=1, num_heads=2, dim=16))
    model.to(torch.bfloat16)
    positions = model.grid.coordinates(model.grid.raster())
    cos, _ = model._rotary(model.grid, model.grid.raster(), begins=False)
    assert positions.dtype == cos.dtype == torch.float32
    assert model.make_cache(1).keys[0].dtype == torch.bfloat16


def test_an_error_in_the_code_is_not_the_users(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(sampling, "generate_rows", broken)
    with pytest.raises(ValueError, match="a bug"):
        call("transformer_generation", *MODELS, "--num_images", 1, "--output_dir", "sampled")


def test_a_vocabulary_of_its_own_is_recorded_with_its_own_digest(models: Path) -> None:
    """The weights' digest stood there. Beside the GPT it is a part of it, made with it again."""
    content = (models / "gpt" / FILE).read_bytes()
    Path("words.json").write_bytes(content)
    for number, (path, digest) in enumerate(
        (
            ("words.json", sha256(Path("words.json"))),
            (f"gpt/{FILE}", sha256(Path("gpt/model.safetensors"))),
        )
    ):
        flags = ("--vocabulary_path", path, "--num_images", 1, "--output_dir", f"sampled{number}")
        call("transformer_generation", *MODELS, *flags)
        assert read_indices(f"sampled{number}").meta.lineage[-1].inputs[path] == digest


def test_indices_of_another_tokenizer_are_refused(
    models: Path, error_of: Callable[..., str]
) -> None:
    meta = IndicesMeta(CODES, GRID, tokenizer_sha256="f" * 64)
    write_indices("other", torch.zeros(1, *GRID, dtype=torch.long), [Row("0.png", "", "")], meta)
    error = error_of("transformer_generation", *MODELS, "--complete", "other")
    assert "but that of other is ffffffffffff" in error


def test_likelihood_ranks_all_images(models: Path) -> None:
    data = write_images(models / "data")
    call(
        *("evaluate", "likelihood", *MODELS, "--model_dir", "tokenizer"),
        *("--path_to_data", data, "--output_dir", "ranked"),
    )
    with (models / "ranked" / "likelihood.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    bits = [float(row["bits_per_token"]) for row in rows]
    assert sorted(row["image_path"] for row in rows) == sorted(f"{n}.png" for n in range(12))
    assert bits == sorted(bits)
    values = json.loads((models / "ranked" / "likelihood.json").read_text())
    values = {key: figure["value"] for key, figure in values["metrics"].items()}
    assert values["bits_per_token"] == pytest.approx(sum(bits) / 12, abs=1e-3)
    assert values["bits_per_pixel"] == pytest.approx(values["bits_per_token"] * 60 / 960)
    assert (models / "ranked" / "lowest_likelihood.png").is_file()


def test_named_sizes_fill_in_what_is_not_given() -> None:
    config = GPTConfig(codebook_size=8, size="L")
    shape = (config.num_layers, config.dim, config.num_heads, config.hidden_dim)
    assert shape == (24, 1024, 16, 2816)
    few = GPTConfig(codebook_size=8, size="B", num_layers=2, num_kv_heads=2)
    assert (few.num_layers, few.num_kv_heads, few.dim) == (2, 2, 768)
    assert GPTConfig(**asdict(config)) == config
    assert GPTConfig(codebook_size=8, dim=128).hidden_dim == 384
    with pytest.raises(ValueError, match="num_kv_heads"):
        GPTConfig(codebook_size=8, num_kv_heads=3)


def test_batches_take_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(GPTConfig(CODES, latent_dim=GRID, num_layers=1, num_heads=1, dim=32))
    each = model.make_cache(1).nbytes + 32 * CODES
    for free, guided, expected in (
        (1 << 40, False, transformer_generation.BATCH_SIZE),
        (20 * each, False, 10),
        (20 * each, True, 5),  # twice as many grids
        (0, False, 1),
    ):
        monkeypatch.setattr(transformer_generation, "available_memory", lambda free=free: free)
        params = SamplingParams(guidance_scale=2.0 if guided else 1.0)
        chosen = transformer_generation.choose_batch_size(model, None, GRID, params)
        assert chosen == expected
