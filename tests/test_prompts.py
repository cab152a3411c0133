"""Captions: text tokens in front of the grid, prompts, and what becomes of them in every script."""

import csv
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import shapes
from tests.conftest import TINY_GPT, write_images
from tests.test_conditions import make_tokenizer
from tests.test_transformer_generation import call, write_gpt
from transformer import GPT, GPTConfig, SamplingParams
from transformer.sampling import generate
from utils.data import captions
from utils.data.conditioning import choose_texts
from utils.data.indices import IndicesMeta, read_indices, write_indices
from utils.data.sources import Row
from utils.data.vocabulary import FILE, TextMeta, Vocabulary, read_vocabulary

CPU = ("--device", "cpu")
TEXTS = ("a red apple", "a green heart", "ein grüner Apfel", "")
CODES, TOKENS, LENGTH = 7, 5, 4  # indices, text tokens, text tokens of a caption


def make_model(**options: object) -> GPT:
    """A GPT with classes, conditions and captions whose weights are all random."""
    torch.manual_seed(0)
    grids = {"latent_dim": (3, 4), "condition_latent_dim": (1, 2), "condition_codebook_size": 3}
    text = {"caption_vocabulary_size": TOKENS, "caption_length": LENGTH}
    shape = {"num_layers": 2, "num_heads": 2, "dim": 16, "dropout": 0.0}
    model = GPT(GPTConfig(CODES, num_classes=2, **grids, **(text | shape | options)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def some_input() -> tuple[Tensor, Tensor]:
    """Prefixes of 7 tokens, of which the second has a caption of two tokens; grids."""
    prefix = torch.tensor([[0, 0, 1, 4, 3, 2, 1], [1, 2, 0, 0, 1, TOKENS, TOKENS]])
    return prefix, torch.randint(CODES, (2, 3, 4))


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_every_text_token_and_its_position_change_every_logit(positions: str) -> None:
    model = make_model(positions=positions, window_size=1)
    prefix, indices = some_input()
    before = model.logits(prefix, indices)
    for place in range(3, 7):
        other = prefix.clone()
        other[:, place] = (other[:, place] + 1) % TOKENS
        assert (model.logits(other, indices) != before).any(dim=2).all()
    swapped = prefix[:, [0, 1, 2, 4, 3, 5, 6]]
    assert (model.logits(swapped, indices) - before).abs().max() > 1e-3


@pytest.mark.parametrize("window", [0, 2])
def test_cached_sampling_with_all_parts_is_the_uncached_model(window: int) -> None:
    model, prefix = make_model(window_size=window), some_input()[0]
    scores = torch.zeros(2)
    sampled = generate(model, prefix, scores=scores)
    torch.testing.assert_close(scores, -model.loss(prefix, sampled).sum(dim=1))
    nothing = generate(model, model.config.null_prefix(prefix))
    assert torch.equal(generate(model, prefix, params=SamplingParams(guidance_scale=0.0)), nothing)
    assert model.config.null_prefix(prefix).tolist() == [[2, 3, 3, *[TOKENS] * LENGTH]] * 2


def test_every_part_is_dropped_alone_and_all_together() -> None:
    config = replace(make_model().config, class_dropout=0.2, caption_dropout=0.3)
    prefix = torch.zeros(40_000, 7, dtype=torch.long)
    dropped = config.drop_conditioning(prefix) != 0
    for columns in (dropped[:, 1:3], dropped[:, 3:]):
        assert torch.equal(columns.any(dim=1), columns.all(dim=1))
    patterns = (dropped[:, [0, 1, 3]].long() @ torch.tensor([1, 2, 4])).bincount(minlength=8)
    expected = torch.tensor([0.5, 0.15, 0.05, 0, 0.25, 0, 0, 0.05])
    torch.testing.assert_close(patterns / len(prefix), expected, atol=0.01, rtol=0)


def test_the_loss_on_text_changes_gradients_but_not_the_loss_of_the_indices() -> None:
    (prefix, indices), losses, gradients = some_input(), [], []
    for weight in (0.0, 0.5):
        model = make_model(text_weight=weight).train()
        losses.append(model.loss(prefix, indices))
        losses[-1].mean().backward()
        gradients.append(model.condition_embedding.weight.grad)
    torch.testing.assert_close(*losses)
    hidden = model(*model.flatten(indices), prefix=prefix)[:, :LENGTH]
    logits = hidden @ model.caption_embedding.weight.T
    nats = -logits.log_softmax(dim=2)[..., :TOKENS].gather(2, prefix[:, 3:, None] % TOKENS)
    mean = nats[..., 0][prefix[:, 3:] != TOKENS].sum() / (2 * LENGTH)
    (gradient,) = torch.autograd.grad(mean, model.condition_embedding.weight)
    torch.testing.assert_close(gradients[1] - gradients[0], 0.5 * gradient, atol=1e-6, rtol=1e-4)
    # A text token is predicted from those before it.
    other = prefix.clone()
    other[:, 4] = (other[:, 4] + 1) % TOKENS
    changed = (model(*model.flatten(indices), prefix=other)[:, :LENGTH] != hidden).any(dim=2)
    assert changed.tolist() == [[False, False, True, True]] * 2
    assert model.eval()(*model.flatten(indices), prefix=prefix).shape[1] == 13


def test_models_from_before_captions_still_load(own_folder: Path) -> None:
    config = asdict(make_model(caption_length=0).config)
    for name in [name for name in config if name.startswith(("caption", "text"))]:
        del config[name]
    model = GPT(GPTConfig.from_json({"model": "GPT", "format_version": 1, **config}))
    assert model.prefix_length == 3
    content = Vocabulary(CODES, (3, 4)).content()
    del content["captions"]
    Path(FILE).write_text(json.dumps(content))
    plain = GPTConfig(CODES, latent_dim=(3, 4))
    read_vocabulary(own_folder).check_model(plain, own_folder)


# --- text tokens ---------------------------------------------------------------------------------


def test_any_text_has_tokens_and_an_empty_one_is_not_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    meta = captions.train_tokenizer(TEXTS * 2, None)
    assert meta == captions.train_tokenizer(TEXTS[::-1], None)  # of the set of captions
    text = ["  A RED apple", "a red apple", "", "Красный круг 红色 🍎", "\udc80"]
    tokens = captions.encode(text, replace(meta, length=40))
    assert torch.equal(tokens[0], tokens[1])
    given = (tokens < meta.vocabulary_size).sum(dim=1)
    assert given[2] == 0 < min(given[0], given[3], given[4])
    assert tokens.max() == meta.vocabulary_size
    assert captions.encode(text, None) is None
    assert capsys.readouterr().err == ""
    long = captions.encode(["word " * 2000, "a"], meta)
    assert long.shape == (2, meta.length)
    warning = f"warning: 1 of 2 captions are longer than {meta.length} text tokens, and are cut"
    assert capsys.readouterr().err.startswith(warning)
    assert captions.train_tokenizer(["word " * 2000], None).length == captions.MAX_LENGTH


@pytest.mark.parametrize("damage", ["", "{}", '{"model": 3}'])
def test_a_damaged_tokenizer_is_one_line(damage: str) -> None:
    with pytest.raises(captions.UserError, match="tokenizer of the captions is damaged"):
        captions.encode(["a"], TextMeta(damage, 300, 4))
    meta = captions.train_tokenizer(TEXTS, None)
    with pytest.raises(captions.UserError, match="more tokens than it says"):
        captions.encode(["a red apple"], replace(meta, vocabulary_size=20))


# --- the scripts ---------------------------------------------------------------------------------


@pytest.fixture
def indices(own_folder: Path) -> Path:
    """An indices folder with captions, without labels."""
    rows = [Row(f"{n}.png", "", "", caption=TEXTS[n % 4]) for n in range(12)]
    grids = torch.arange(12 * 4).view(12, 2, 2) % CODES
    return write_indices(own_folder / "indices", grids, rows, IndicesMeta(CODES, (2, 2)))


def train(*flags: object) -> None:
    steps = "--max_steps", 2
    call("train", *TINY_GPT, *CPU, *steps, "--path_to_data", "indices", "--output_dir", *flags)


def test_from_the_csv_to_the_list_of_images(
    own_folder: Path, capsys: pytest.CaptureFixture[str], error_of: Callable[..., str]
) -> None:
    data = write_images(own_folder / "data")
    lines = data.read_text().splitlines()
    texts = [f'"{TEXTS[number % 4]}, ""quoted"""' for number in range(12)]
    data.write_text("\n".join(",".join(x) for x in zip(lines, ["Caption", *texts], strict=True)))
    make_tokenizer(own_folder / "tokenizer", (24, 40), 3)
    models = (*CPU, "--model_dir", "tokenizer")
    call("quantize_dataset", *models, "--path_to_data", data, "--flip", "--output_dir", "indices")
    assert "warning: --flip: captions of mirrored images" in capsys.readouterr().err
    assert read_indices("indices").rows[1].caption == 'a green heart, "quoted"'
    train("gpt", "--model_dir", "tokenizer")
    vocabulary = read_vocabulary("gpt")
    assert vocabulary.class_names == ("a", "b")
    assert GPT.from_pretrained("gpt/best").prefix_length == 1 + vocabulary.captions.length
    assert "--prompt" in capsys.readouterr().out

    Path("more.txt").write_text("\na green heart\n  \nein Kreis\n", encoding="utf-8")
    prompts = ("--prompt", "a red apple", "--prompt", "@more.txt", "--guidance_scale", 2)
    sampling = ("transformer_generation", *CPU, "--model_path", "gpt")
    call(*sampling, *prompts, "--num_images", 5, "--output_dir", "samples")
    given = ["a red apple", "a green heart", "ein Kreis", "a red apple", "a green heart"]
    assert [row.caption for row in read_indices("samples").rows] == given
    assert {row.label for row in read_indices("samples").rows} == {""}  # no class beside a prompt
    decode = ("vqvae.images_from_indexes", *models, "--indexes_path", "samples")
    call(*decode, "--output_dir", "images")
    with Path("images/images.csv").open(newline="") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == given

    # Completions keep label and caption of their image; the likelihood is of the captions.
    call(*sampling, "--complete", "indices", "--num_images", 3, "--output_dir", "completed")
    kept = [(row.label, row.caption) for row in read_indices("completed").rows]
    assert kept == [(row.label, row.caption) for row in read_indices("indices").rows[:3]]
    score = ("evaluate", "likelihood", *models, "--model_path", "gpt", "--path_to_data", data)
    figures = []
    for flags in ((), ("--unconditional",)):
        call(*score, *flags, "--output_dir", "score")
        found = json.loads(Path("score/likelihood.json").read_text())["metrics"]
        figures.append(found["bits_per_token"]["value"])
    assert figures[0] != figures[1]
    error = error_of(*sampling, "--prompt", "x", "--unconditional", "--output_dir", "no")
    assert "--prompt cannot be combined with --unconditional" in error


def test_each_label_comes_with_each_prompt() -> None:
    """In turn, two labels and two prompts made two of the four pairs."""
    words: dict = {"class_frequencies": False, "unconditional": False}
    flags = Namespace(labels=["b", "a"], prompt=["x", "y"], **words)
    rows = [Row("1.png", "a", "", caption="z")]
    for given in ([], rows):
        texts = choose_texts(flags, Vocabulary(CODES, (2, 2), class_names=("a", "b")), given, 5)
        assert [*zip(*texts, strict=True)] == [
            *(("b", "x"), ("b", "y"), ("a", "x"), ("a", "y"), ("b", "x"))
        ]


def test_a_guide_with_other_text_tokens_is_refused(error_of: Callable[..., str]) -> None:
    """Its config may be the same."""
    known = captions.train_tokenizer(TEXTS, None)
    write_gpt("gpt", Vocabulary(CODES, (2, 2), captions=known))
    other = replace(known, tokenizer=known.tokenizer.replace("Ġ", "ġ"))
    write_gpt("guide", Vocabulary(CODES, (2, 2), captions=other))
    guided = ("--guidance_scale", 2, "--guide_path", "guide", "--output_dir", "no")
    error = error_of("transformer_generation", *CPU, "--model_path", "gpt", *guided)
    assert "the guide in guide has other captions than the GPT" in error
    write_gpt("gpt", Vocabulary(CODES, (2, 2), class_names=("a", "b")))
    write_gpt("guide", Vocabulary(CODES, (2, 2), class_names=("b", "a")))
    error = error_of("transformer_generation", *CPU, "--model_path", "gpt", *guided)
    assert "the guide in guide has other class_names than the GPT" in error


def test_prompts_of_every_kind(
    indices: Path, error_of: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    train("gpt")
    sampling = ("transformer_generation", *CPU, "--model_path", "gpt", "--num_images", 3)
    call(*sampling, "--output_dir", "none")
    call(*sampling, "--prompt", "", "--output_dir", "empty")
    assert read_indices("none").grids[:].equal(read_indices("empty").grids[:])
    assert (indices / "manifest.csv").is_file()
    assert "caption" not in Path("empty/manifest.csv").read_text()
    capsys.readouterr()
    call(*sampling, "--prompt", "слово " * 1700, "--output_dir", "long")
    assert capsys.readouterr().err.count("warning: 3 of 3 captions are longer") == 1
    assert read_indices("long").rows[2].caption == "слово " * 1700
    error = error_of(*sampling, "--prompt", "@nowhere.txt", "--output_dir", "no")
    assert "cannot read the prompts in nowhere.txt" in error
    Path("blank.txt").write_text(" \n\n")
    error = error_of(*sampling, "--prompt", "@blank.txt", "--output_dir", "no")
    assert "blank.txt has no prompts; write one a line" in error

    flags = ("--path_to_data", "indices", "--caption_length", 0, "--text_weight", 1)
    error = error_of("train", *TINY_GPT, *CPU, *flags, "--output_dir", "no")
    assert "--text_weight has no effect without --caption_length above 0" in error
    train("plain", "--caption_length", 0)
    assert read_vocabulary("plain").captions is None
    error = error_of(*sampling, "--model_path", "plain", "--prompt", "x", "--output_dir", "no")
    assert "the GPT in plain was trained without captions; omit --prompt" in error
    assert not Path("no").exists()


def test_a_fine_tuned_gpt_keeps_the_text_tokens_of_the_first(indices: Path) -> None:
    train("first")
    rows = [row._replace(caption="other words") for row in read_indices(indices).rows]
    grids, meta = read_indices(indices).grids[:], IndicesMeta(CODES, (2, 2))
    write_indices("indices", grids, rows, meta)
    call("train", *CPU, "--max_steps", 1, "--batch_size", 4, "--path_to_data", "indices",
         "--init_from", "first", "--output_dir", "second")  # fmt: skip
    assert read_vocabulary("second").captions == read_vocabulary("first").captions


def test_a_resumed_training_with_captions_is_bitwise_the_same(indices: Path) -> None:
    train("whole", "--max_steps", 3)
    train("stopped", "--max_steps", 3, "--max_minutes", 1e-6)
    call("train", "--resume", "stopped", "--max_minutes", 9)
    name = "checkpoints/step-00000003/model.safetensors"
    files = [Path(folder, name).read_bytes() for folder in ("whole", "stopped")]
    assert files[0] == files[1]
    assert read_vocabulary("whole").captions == read_vocabulary("stopped").captions is not None


def test_without_the_package_one_line_says_what_to_install(
    indices: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    flags = (*TINY_GPT, *CPU, "--path_to_data", "indices", "--output_dir", "gpt")
    assert "pip install tokenizers" in error_of("train", *flags)


# --- the shapes of benchmarks/prompts.py ---------------------------------------------------------


def test_an_image_obeys_its_caption_and_no_other() -> None:
    held_out, known = (shapes.combinations(held_out=x) for x in (True, False))
    assert len(held_out) / (len(held_out) + len(known)) == pytest.approx(0.2, abs=0.001)
    assert not set(held_out) & set(known)
    generator = np.random.default_rng(0)
    for combination in held_out[::9]:
        image = shapes.draw(combination, generator)
        assert shapes.obeys(image, combination)
        fields = {"colour": shapes.COLOURS, "shape": shapes.SHAPES, "relation": shapes.RELATIONS}
        for field, values in fields.items():
            old = getattr(combination, field)
            other = next(value for value in values if value != old)
            assert not shapes.obeys(image, combination._replace(**{field: other}))
