"""LlamaGen's checkpoints: the same logits as its forward pass, written down here on its own."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import ROOT
from tests.forks import run_forked
from tests.test_kv_cache import step_by_step
from transformer import GPT, convert
from transformer.convert import from_llamagen
from utils import cli
from utils.provenance import load_model

LAYERS, DIM, HIDDEN, HEADS, CODES, CLASSES = 2, 32, 48, 4, 13, 5


def make_weights(kv_heads: int = HEADS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    weights = {
        "cls_embedding.embedding_table.weight": random(CLASSES + 1, DIM),
        "tok_embeddings.weight": random(CODES, DIM),
        "norm.weight": 1 + random(DIM),
        "output.weight": random(CODES, DIM),
    }
    for number in range(LAYERS):
        weights |= {
            f"layers.{number}.attention.wqkv.weight": random(
                (HEADS + 2 * kv_heads) * DIM // HEADS, DIM
            ),
            f"layers.{number}.attention.wo.weight": random(DIM, DIM),
            f"layers.{number}.feed_forward.w1.weight": random(HIDDEN, DIM),
            f"layers.{number}.feed_forward.w3.weight": random(HIDDEN, DIM),
            f"layers.{number}.feed_forward.w2.weight": random(DIM, HIDDEN),
            f"layers.{number}.attention_norm.weight": 1 + random(DIM),
            f"layers.{number}.ffn_norm.weight": 1 + random(DIM),
        }
    return weights


def turning(grid: tuple[int, int], head_dim: int) -> Tensor:
    """exp(i * angle) of every position, (1 + h*w, head_dim / 2); 0 at the class."""
    quarter = head_dim // 4
    speed = 10000.0 ** (-2.0 * torch.arange(quarter) / (head_dim / 2))
    lines = [torch.zeros(head_dim // 2, dtype=torch.complex64)]
    for row in range(grid[0]):
        for column in range(grid[1]):
            angle = torch.cat([row * speed, column * speed])
            lines.append(torch.polar(torch.ones_like(angle), angle))
    return torch.stack(lines)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


def reference(weights: dict[str, Tensor], classes: Tensor, indices: Tensor, kv: int) -> Tensor:
    """Logits of all positions, (B, h*w, CODES): neighbouring pairs turned as complex numbers."""
    head_dim = DIM // HEADS
    turns = turning(indices.shape[1:], head_dim)[:-1]
    x = torch.cat(
        [
            weights["cls_embedding.embedding_table.weight"][classes][:, None],
            weights["tok_embeddings.weight"][indices.flatten(1)[:, :-1]],
        ],
        dim=1,
    )
    length = x.shape[1]
    future = torch.ones(length, length).triu(1).bool()
    for number in range(LAYERS):
        part = {k: v for k, v in weights.items() if k.startswith(f"layers.{number}.")}
        w = {k.removeprefix(f"layers.{number}.").removesuffix(".weight"): part[k] for k in part}
        qkv = norm(x, w["attention_norm"]) @ w["attention.wqkv"].T
        q, k, v = qkv.split([DIM, kv * head_dim, kv * head_dim], dim=-1)
        heads = []
        for head in range(HEADS):
            shared = head * kv // HEADS

            def turned(y: Tensor, which: int) -> Tensor:
                y = y[..., which * head_dim : (which + 1) * head_dim]
                pairs = torch.complex(y[..., 0::2], y[..., 1::2]) * turns
                return torch.view_as_real(pairs).flatten(-2)

            scores = turned(q, head) @ turned(k, shared).transpose(1, 2) / head_dim**0.5
            scores = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
            heads.append(scores @ v[..., shared * head_dim : (shared + 1) * head_dim])
        x = x + torch.cat(heads, dim=-1) @ w["attention.wo"].T
        y = norm(x, w["ffn_norm"])
        y = F.silu(y @ w["feed_forward.w1"].T) * (y @ w["feed_forward.w3"].T)
        x = x + y @ w["feed_forward.w2"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("window", [0, 9])  # more than the grid is none
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (8, 2)], ids=["square", "wide", "tall"])
def test_llamagen_logits_are_the_same(
    grid: tuple[int, int], kv_heads: int, window: int, dtype: torch.dtype
) -> None:
    weights = {name: weight.to(dtype) for name, weight in make_weights(kv_heads).items()}
    published = from_llamagen(weights, grid, HEADS)
    model = GPT(replace(published.config, window_size=window)).to(dtype).eval()
    model.load_state_dict(published.state_dict())
    indices = torch.randint(CODES, (3, *grid), generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([0, 3, CLASSES])
    with torch.no_grad():
        logits = model.logits(classes, indices)
    steps = step_by_step(model, classes, indices, model.make_cache(3))
    expected = reference(weights, classes, indices, kv_heads)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps, expected, rtol=1e-4, atol=1e-5)


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
        ({"layers.9999.what": torch.zeros(1)}, "has no .layers.2"),
        ({"output.weight": torch.zeros(7, DIM)}, "output.weight must be"),
    ):
        weights = {k: v for k, v in (make_weights() | change).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            from_llamagen(weights, (4, 4), HEADS)
    layerless = {k: v for k, v in make_weights().items() if not k.startswith("layers.")}
    with pytest.raises(ValueError, match=r"has no 'layers\.0"):
        from_llamagen(layerless, (4, 4), HEADS)
    for heads in (-2, 5):
        with pytest.raises(ValueError, match=f"has no {heads} heads"):
            from_llamagen(make_weights(), (4, 4), heads)


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
    weights = {wrapper + name: weight for name, weight in make_weights().items()}
    torch.save(weights | {"args": argparse.Namespace(lr=1)}, tmp_path / "c2i.pt")
    words = ("--from", "llamagen", "--checkpoint", tmp_path / "c2i.pt", "--latent_dim", "4")
    words = (*words, "--num_heads", HEADS, "--output_dir", tmp_path / "gpt")
    convert.main(convert.make_parser().parse_args([*map(str, words)]))
    found = load_model(tmp_path / "gpt", GPT).model.state_dict()
    torch.testing.assert_close(found, from_llamagen(make_weights(), (4, 4), HEADS).state_dict())


def test_nothing_is_written_over_nor_read_before_that_is_clear(tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "chapter.txt").write_text("years of work")
    words = ("--from", "llamagen", "--checkpoint", "nowhere", "--output_dir", tmp_path / "gpt")
    flags = convert.make_parser().parse_args([*map(str, words)])
    with pytest.raises(cli.UserError, match="gpt exists and is not empty"):
        convert.main(flags)
    assert (tmp_path / "gpt" / "chapter.txt").read_text() == "years of work"


def test_a_checkpoint_becomes_a_model_folder(tmp_path: Path) -> None:
    torch.save({"model": make_weights(), "steps": 7}, tmp_path / "c2i.pt")
    done = run_forked(
        *(ROOT / "transformer/convert.py", "--from", "llamagen"),
        *("--checkpoint", tmp_path / "c2i.pt", "--latent_dim", "4", "--num_heads", HEADS),
        *("--output_dir", tmp_path / "gpt"),
        check=True,
    )
    assert "transformer_generation.py --model_path" in done.stdout
    model = load_model(tmp_path / "gpt", GPT).model
    torch.testing.assert_close(
        model.state_dict(), from_llamagen(make_weights(), (4, 4), HEADS).state_dict()
    )


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
    model = from_llamagen(make_weights(), (4, 4), HEADS).train()
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
