"""Initial weights against a table, and the first losses against an independent implementation."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer import GPT, GPTConfig

LAYERS, DIM, HEADS, HIDDEN = 2, 32, 2, 64
SMALLER = 0.02 / math.sqrt(2 * LAYERS)
# Mean and deviation of every parameter: GPT-2's (and nanoGPT's), but for the head, which starts at
# zero as in LlamaGen.
TABLE = {
    r"prefix_embedding\.weight": (0, 0.02),
    r"condition_embedding\.weight": (0, 0.02),
    r"token_embedding\.weight": (0, 0.02),
    r"position_embedding": (0, 0.02),
    r"target_embedding\.weight": (0, 0.02),
    r"blocks\.\d\.norm_attention\.weight": (1, 0),
    r"blocks\.\d\.attention\.qkv\.weight": (0, 0.02),
    r"blocks\.\d\.attention\.gain": (1, 0),
    r"blocks\.\d\.attention\.out\.weight": (0, SMALLER),
    r"blocks\.\d\.norm_feed_forward\.weight": (1, 0),
    r"blocks\.\d\.feed_forward\.gate_and_value\.weight": (0, 0.02),
    r"blocks\.\d\.feed_forward\.out\.weight": (0, SMALLER),
    r"norm\.weight": (1, 0),
    r"head\.weight": (0, 0),
}
SHAPE = {"num_layers": LAYERS, "num_heads": HEADS, "dim": DIM, "hidden_dim": HIDDEN}


def check(name: str, parameter: Tensor, mean: float, deviation: float) -> None:
    """Mean and deviation of the numbers, to 4 and a half standard errors."""
    x, error = parameter.detach().double().flatten(), deviation / math.sqrt(parameter.numel())
    assert float(x.mean()) == pytest.approx(mean, abs=4.5 * error), name
    assert float(x.std(correction=0)) == pytest.approx(deviation, abs=3.2 * error), name


def test_every_parameter_starts_as_the_table_says() -> None:
    torch.manual_seed(0)
    embeddings = {"positions": "both", "order_anneal": (0.5, 0.75), "depth": 2}
    grids = {"latent_dim": (6, 7), "condition_latent_dim": (2, 3), "condition_codebook_size": 50}
    model = GPT(GPTConfig(codebook_size=60, num_classes=9, **grids, **embeddings, **SHAPE))
    unused = set(TABLE)
    for name, parameter in model.named_parameters():
        (pattern,) = [x for x in TABLE if re.fullmatch(x, name)]
        unused.discard(pattern)
        check(name, parameter, *TABLE[pattern])
    assert not unused


# --- beside `transformers` ------------------------------------------------------------------------

CODES, CLASSES, GRID = 16, 3, (3, 4)


def rotary_2d(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """cos and sin (1, T, head_dim): the first frequencies turn by rows, the others by columns."""
    size = DIM // HEADS // 4
    frequency = [100 ** (-i / size) for i in range(size)]
    places = [(0, 0)] + [(i + 1, j + 1) for i in range(GRID[0]) for j in range(GRID[1])]
    angles = [[a * f for a in place for f in frequency] * 2 for place in places]
    angles = torch.tensor(angles, dtype=torch.float64)[None, : x.shape[1]]
    return angles.cos().to(x), angles.sin().to(x)


def make_peer(name: str) -> nn.Module:
    """Llama (as in LlamaGen) or Qwen3 (Llama with QK-norm), initialised by `transformers`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = getattr(transformers, name + "Config")(
        vocab_size=CODES + CLASSES + 1,
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM // HEADS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
    )
    peer = getattr(transformers, name + "ForCausalLM")(config)
    peer.model.rotary_emb.forward = rotary_2d
    with torch.no_grad():  # the two lines of our table that Llama does not have
        peer.lm_head.weight.zero_()
        for layer in peer.model.layers:
            layer.self_attn.o_proj.weight.div_(math.sqrt(2 * LAYERS))
            layer.mlp.down_proj.weight.div_(math.sqrt(2 * LAYERS))
    return peer


def pairs(model: GPT, peer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every parameter of the model, or a part of it, and the peer's."""
    tokens, classes = peer.model.embed_tokens.weight.split([CODES, CLASSES + 1])
    found = [
        (model.token_embedding.weight, tokens),
        (model.prefix_embedding.weight, classes),
        (model.norm.weight, peer.model.norm.weight),
        (model.head.weight, peer.lm_head.weight[:CODES]),
    ]
    for own, other in zip(model.blocks, peer.model.layers, strict=True):
        attention, mlp = other.self_attn, other.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        found += [
            (own.norm_attention.weight, other.input_layernorm.weight),
            *zip(own.attention.qkv.weight.chunk(3), [x.weight for x in projections], strict=True),
            (own.attention.out.weight, attention.o_proj.weight),
            (own.norm_feed_forward.weight, other.post_attention_layernorm.weight),
            (own.feed_forward.gate_and_value.weight[:HIDDEN], mlp.gate_proj.weight),
            (own.feed_forward.gate_and_value.weight[HIDDEN:], mlp.up_proj.weight),
            (own.feed_forward.out.weight, mlp.down_proj.weight),
        ]
        if own.attention.gain is not None:
            norms = attention.q_norm, attention.k_norm
            found += zip(own.attention.gain.flatten(1), [x.weight for x in norms], strict=True)
    assert sum(x.numel() for x, _ in found) == sum(x.numel() for x in model.parameters())
    return found


@pytest.mark.parametrize(("name", "qk_norm"), [("Llama", False), ("Qwen3", True)])
def test_the_first_200_losses_are_those_of_transformers(name: str, qk_norm: bool) -> None:
    """Same initial statistics; from the same random weights, each with gains of its own."""
    torch.manual_seed(0)
    kind = {"num_classes": CLASSES, "latent_dim": GRID, "dropout": 0.0, "qk_norm": qk_norm}
    kind["positions"] = "rotary"
    model, peer = GPT(GPTConfig(CODES, **kind, **SHAPE)), make_peer(name)
    for own, other in pairs(model, peer):
        check(str(own.shape), own, *(float(x.detach()) for x in (other.mean(), other.std())))
        if other.std() > 0:
            own.data.copy_(other)
    optimizers = [torch.optim.AdamW(x.parameters(), lr=1e-3, fused=True) for x in (model, peer)]
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(200):
        classes = torch.randint(CLASSES + 1, (8,), generator=generator)
        starts = torch.randint(CODES, (8, 1), generator=generator)
        indices = (starts + torch.arange(12) * (classes[:, None] + 1)) % CODES
        tokens = torch.cat([classes[:, None] + CODES, indices[:, :-1]], dim=1)
        logits = peer(tokens).logits[..., :CODES]
        both = [
            model.loss(classes, indices.view(8, *GRID)).mean(),
            F.cross_entropy(logits.transpose(1, 2), indices),
        ]
        for loss, optimizer in zip(both, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in both])
    own, other = zip(*losses, strict=True)
    assert own == pytest.approx(other, rel=1e-4)
    assert own[-1] < 0.7 * own[0]
