"""LlamaGen's GPTs, against outputs of its own code (tests/published.json)."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import run_script
from tests.published import GUIDANCE, assert_recorded, gpt_inputs, make_weights, read_records
from tests.test_kv_cache import step_by_step
from tests.test_transformer_generation import call
from transformer import GPT, SamplingParams, convert
from transformer.convert import from_llamagen
from transformer.sampling import generate
from utils import cli
from utils.data.indices import IndicesMeta, read_indices, write_indices
from utils.data.sources import Row
from utils.data.vocabulary import read_vocabulary
from utils.provenance import load_model

RECORDS = {name: record for name, record in read_records().items() if "GPT" in name}
CONFIG = RECORDS["LlamaGen GPT"]["config"]
LAYERS, DIM, HEADS = CONFIG["n_layer"], CONFIG["dim"], CONFIG["n_head"]
CODES, CLASSES = CONFIG["vocab_size"], CONFIG["num_classes"]
WEIGHTS = make_weights("LlamaGen GPT")


@pytest.mark.parametrize("window", [0, 9])  # more than the grid is none
@pytest.mark.parametrize("name", RECORDS)
def test_llamagen_logits_are_the_same(name: str, window: int) -> None:
    published = from_llamagen(make_weights(name), (4, 4), HEADS)
    model = GPT(replace(published.config, window_size=window)).eval()
    model.load_state_dict(published.state_dict())
    classes, indices = gpt_inputs(CONFIG)
    with torch.no_grad():
        assert_recorded(model.logits(classes, indices), RECORDS[name]["logits"])
    steps = step_by_step(model, classes, indices, model.make_cache(3))
    assert_recorded(steps, RECORDS[name]["logits"])


def test_llamagen_generates_the_same() -> None:
    """The most likely tokens of each class with guidance, from its cache and from ours."""
    model = from_llamagen(WEIGHTS, (4, 4), HEADS)
    params = SamplingParams(temperature=0, guidance_scale=GUIDANCE)
    found = generate(model, torch.arange(CLASSES), params=params)
    assert found.flatten(1).tolist() == RECORDS["LlamaGen GPT"]["generated"]
    assert len(found.unique()) > 8


def test_llamagen_weights_that_do_not_fit_are_refused() -> None:
    for change, message in (
        ({"cls_embedding.embedding_table.weight": None}, "has no 'cls_embedding"),
        ({"layers.1.feed_forward.w3.weight": None}, "has no 'layers.1"),
        ({"extra": torch.zeros(1)}, "unknown weights: extra"),
        ({"tok_embeddings.weight": None}, "has no 'tok_embeddings.weight'"),
        ({"layers.0.attention.wqkv.weight": None}, "has no 'layers.0.attention.wqkv"),
        ({"layers.0.attention.wqkv.weight": torch.zeros(8, DIM)}, "num_kv_heads must be at least"),
        (
            {"layers.1.attention.wqkv.weight": torch.zeros(8, DIM)},
            r"layers\.1\.attention\.wqkv\.weight must be",
        ),
        ({"layers.0.feed_forward.w1.weight": None}, "has no 'layers.0.feed_forward.w1"),
        ({"layers.x.what": torch.zeros(1)}, r"unknown weights: layers\.x\.what"),
        ({"layers.9999.what": torch.zeros(1)}, r"unknown weights: layers\.9999\.what"),
        ({"output.weight": torch.zeros(7, DIM)}, "output.weight must be"),
    ):
        weights = {k: v for k, v in (WEIGHTS | change).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            from_llamagen(weights, (4, 4), HEADS)
    layerless = {k: v for k, v in WEIGHTS.items() if not k.startswith("layers.")}
    with pytest.raises(ValueError, match=r"has no 'layers\.0"):
        from_llamagen(layerless, (4, 4), HEADS)
    for heads in (-2, 5):
        with pytest.raises(ValueError, match=f"has no {heads} heads"):
            from_llamagen(WEIGHTS, (4, 4), heads)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("cls_embedding.cap_proj.fc1.weight", "text-to-image GPT of LlamaGen"),
        ("word_embed.weight", "transformer of VAR"),
        ("encoder.conv_in.weight", "vqvae.convert"),
    ],
)
def test_other_models_are_named(key: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"this is .*{name}"):
        from_llamagen({key: torch.zeros(2, 2), "tok_embeddings.weight": torch.zeros(2, 2)}, (4, 4))


@pytest.mark.parametrize("wrapper", ["module.", "model._orig_mod.", "ema.", "state_dict.gpt."])
def test_a_gpt_in_a_wrapper_is_read(wrapper: str, tmp_path: Path) -> None:
    weights = {wrapper + name: weight for name, weight in WEIGHTS.items()}
    torch.save(weights | {"args": argparse.Namespace(lr=1)}, tmp_path / "c2i.pt")
    words = ("--from", "llamagen", "--checkpoint", tmp_path / "c2i.pt", "--latent_dim", "4")
    words = (*words, "--num_heads", HEADS, "--output_dir", tmp_path / "gpt")
    convert.main(convert.make_parser().parse_args([*map(str, words)]))
    found = load_model(tmp_path / "gpt", GPT).model.state_dict()
    torch.testing.assert_close(found, from_llamagen(WEIGHTS, (4, 4), HEADS).state_dict())


def test_nothing_is_written_over_nor_read_before_that_is_clear(tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "chapter.txt").write_text("years of work")
    words = ("--from", "llamagen", "--checkpoint", "nowhere", "--output_dir", tmp_path / "gpt")
    flags = convert.make_parser().parse_args([*map(str, words)])
    with pytest.raises(cli.UserError, match="gpt exists and is not empty"):
        convert.main(flags)
    assert (tmp_path / "gpt" / "chapter.txt").read_text() == "years of work"


def test_a_checkpoint_becomes_a_model_folder(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "steps": 7}, tmp_path / "c2i.pt")
    done = run_script(
        *("transformer/convert.py", "--from", "llamagen"),
        *("--checkpoint", tmp_path / "c2i.pt", "--latent_dim", "4", "--num_heads", HEADS),
        *("--output_dir", tmp_path / "gpt"),
    )
    assert "transformer_generation.py --model_path" in done.stdout
    model = load_model(tmp_path / "gpt", GPT).model
    torch.testing.assert_close(
        model.state_dict(), from_llamagen(WEIGHTS, (4, 4), HEADS).state_dict()
    )


def test_a_converted_gpt_learns_new_classes(own_folder: Path) -> None:
    """Three of them, each of which is one grid, from eight images each."""
    torch.save({"model": WEIGHTS}, "c2i.pt")
    flags = ("--checkpoint", "c2i.pt", "--latent_dim", "4", "--num_heads", str(HEADS))
    words = ("--from", "llamagen", *flags, "--output_dir", "gpt")
    convert.main(convert.make_parser().parse_args(words))
    names = ("apple", "bell", "cup")
    patterns = torch.randint(CODES, (3, 4, 4), generator=torch.Generator().manual_seed(1))
    rows = [Row("", names[n % 3], "val" if n >= 24 else "train") for n in range(30)]
    grids = patterns[torch.arange(30) % 3]
    write_indices("indices", grids, rows, IndicesMeta(CODES, (4, 4)))
    tuning = ("--init_from", "gpt", "--max_steps", 60, "--learning_rate", 1e-2, "--dropout", 0)
    call("train", "--path_to_data", "indices", *tuning, "--batch_size", 12, "--device", "cpu",
         "--output_dir", "tuned")  # fmt: skip
    assert read_vocabulary("tuned").class_names == names
    call("transformer_generation", "--model_path", "tuned", "--num_images", 6, "--temperature", 0,
         "--guidance_scale", 1.5, "--device", "cpu", "--output_dir", "new")  # fmt: skip
    found = read_indices("new")
    assert [row.label for row in found.rows] == [*names, *names]
    assert found.grids[:].long().equal(patterns.repeat(2, 1, 1))


def to_llamagen(model: GPT) -> dict[str, Tensor]:
    """The weights of a GPT under LlamaGen's names, whose queries and keys turn neighbours."""
    weights, own = {}, model.state_dict()
    rows = 2 * DIM
    for number in range(LAYERS):
        for ours, theirs in convert.KEYS.items():
            weight = own[ours.format(i=number)]
            if ours.endswith("qkv.weight"):
                halves = weight[:rows].unflatten(0, (-1, 2, DIM // HEADS // 2))
                weight = torch.cat([halves.transpose(1, 2).flatten(0, 2), weight[rows:]])
            for key, part in zip(theirs, weight.chunk(len(theirs)), strict=True):
                weights[key.format(i=number)] = part
    return weights


def test_a_wrong_reading_shows_in_the_samples() -> None:
    """With another number of heads or another grid it is read without an error."""
    torch.manual_seed(0)
    model = from_llamagen(WEIGHTS, (4, 4), HEADS).train()
    classes = torch.arange(CLASSES)
    grids = torch.randint(CODES, (CLASSES, 4, 4))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(classes, grids).mean().backward()
        optimizer.step()
    weights = to_llamagen(model.eval())
    right = from_llamagen(weights, (4, 4), HEADS)
    torch.testing.assert_close(right.state_dict(), model.state_dict())
    bits = convert.sample_bits(right)
    assert bits < 0.4
    for grid, heads in (((4, 4), 2), ((2, 8), HEADS)):
        assert convert.sample_bits(from_llamagen(weights, grid, heads)) > 2.5 * bits
