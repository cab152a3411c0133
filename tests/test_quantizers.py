"""The contract of all quantizers, over the table."""

import json
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae import QUANTIZERS, VQVAE, VQVAEConfig
from vqvae.config import all_options
from vqvae.quantizers import Quantizer, QuantizerOptions
from vqvae.quantizers.codebook import CodebookQuantizer, CollapseMonitor, nearest_codes
from vqvae.quantizers.vector import VectorQuantizer

EVERY = pytest.mark.parametrize("name", QUANTIZERS)


def those(kind: type[Quantizer]) -> pytest.MarkDecorator:
    """The quantizers of a kind."""
    return pytest.mark.parametrize(
        "name", [n for n, q in QUANTIZERS.items() if issubclass(q, kind)]
    )


# After 150 steps on scikit-learn's digits with 64 codes: MSE on [0, 1] at most, usage at least.
# A quantizer that is not listed must be as good as the weakest.
WEAKEST = (0.036, 0.3)
DIGITS = {
    "vq": (0.019, 0.9),
    "ema": (0.019, 0.9),
    "cosine": (0.019, 0.9),
    "gumbel": (0.02, 0.9),
    "fsq": (0.016, 0.9),
    "lfq": (0.017, 0.9),
    "ibq": (0.018, 0.6),
    "residual": (0.012, 0.9),
}


def options(name: str, **settings: object) -> QuantizerOptions:
    return VQVAEConfig.create(quantizer=name, **settings).quantizer_options


def make(name: str, **settings: object) -> Quantizer:
    torch.manual_seed(0)
    return QUANTIZERS[name](options(name, **(settings or {"codebook_size": 64})))


def encodings(quantizer: Quantizer, *, batch: int = 3, requires_grad: bool = False) -> Tensor:
    dim = quantizer.options.codebook_dim
    random = torch.Generator().manual_seed(1)
    return torch.randn(batch, dim, 4, 5, generator=random).requires_grad_(requires_grad)


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_embed_returns_exactly_the_decoder_input(name: str, training: bool) -> None:
    quantizer = make(name).train(training)
    for _ in range(3):  # also while codes are initialised, move and are reset
        z_e = encodings(quantizer)
        z_q, indices, losses = quantizer(z_e)
        assert torch.equal(quantizer.embed(indices), z_q)
        assert z_q.shape == z_e.shape
        assert indices.shape[:3] == (3, 4, 5)
        assert indices.dtype == torch.int64
        assert indices.min() >= 0
        assert indices.max() < quantizer.options.codebook_size
        assert all(loss.shape == () for loss in losses.values())


@EVERY
def test_nearest_agrees_with_forward(name: str) -> None:
    quantizer = make(name).eval()
    z_e = encodings(quantizer)
    assert torch.equal(quantizer.nearest(z_e), quantizer(z_e).indices)


@EVERY
def test_the_gradient_reaches_the_encoder_and_is_finite(name: str) -> None:
    quantizer = make(name)
    z_e = encodings(quantizer, requires_grad=True)
    z_q, _, losses = quantizer(z_e)
    (z_q.square().mean() + sum(losses.values())).backward()
    assert z_e.grad.isfinite().all()
    assert z_e.grad.abs().sum() > 0


@EVERY
def test_arithmetic_is_in_float32_under_autocast(name: str) -> None:
    quantizer = make(name).eval()
    z_e = encodings(quantizer)
    plain = quantizer(z_e)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(z_e)
        assert torch.equal(quantizer.nearest(z_e), plain.indices)
        assert torch.equal(quantizer.embed(cast.indices), plain.z_q)
    assert torch.equal(cast.z_q, plain.z_q)
    assert cast.z_q.dtype == torch.float32


@EVERY
def test_count_has_a_place_for_each_code_of_each_depth(name: str) -> None:
    quantizer = make(name).eval()
    indices = quantizer.nearest(encodings(quantizer))
    counts = quantizer.count(indices)
    assert counts.shape == (quantizer.options.num_codes,)
    assert counts.sum() == indices.numel()


@EVERY
def test_a_config_survives_its_own_values(name: str) -> None:
    one = make(name).options
    assert options(name, **vars(one)) == one
    config = VQVAEConfig.create(quantizer=name, codebook_size=16, image_size=(8, 8), dropout=0.5)
    assert VQVAEConfig.create(**json.loads(json.dumps(config.to_dict()))) == config
    assert (config.codebook_size, config.depth) == (16, config.quantizer_options.depth)


@EVERY
def test_options_have_help_and_their_own_defaults(name: str) -> None:
    kind = QUANTIZERS[name].Options
    assert all(each.metadata["help"] for each in fields(kind))
    assert options(name) == kind()
    assert {each.name for each in fields(kind)} <= {each.name for each in fields(all_options())}


@EVERY
def test_every_quantizer_learns_digits(name: str) -> None:
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    train, held_out = images[:1500], images[1500:]
    torch.manual_seed(0)
    shape = {"image_size": (8, 8), "in_channels": 1, "patch_size": 2, "channels": 32}
    model = VQVAE(VQVAEConfig.create(quantizer=name, codebook_size=64, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    steps = 150
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = train[torch.randint(len(train), (64,))]
        reconstruction, quantized = model(batch)
        loss = F.mse_loss(reconstruction, batch) + sum(quantized.losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.quantizer.end_step()
    model.eval()
    with torch.inference_mode():
        indices = model.encode(held_out)
        mse = float(F.mse_loss(model.decode(indices), held_out)) / 4
        usage = float((model.quantizer.count(indices) > 0).float().mean())
    worst, least = DIGITS.get(name, WEAKEST)
    assert mse < worst
    assert usage > least


@those(VectorQuantizer)
def test_the_chosen_code_is_the_nearest(name: str) -> None:
    quantizer = make(name).eval()
    vectors = quantizer.project(encodings(quantizer).permute(0, 2, 3, 1))
    distances = (vectors[..., None, :].double() - quantizer.codebook.double()).square().sum(-1)
    assert torch.equal(quantizer.nearest(encodings(quantizer)), distances.argmin(-1))


@those(CodebookQuantizer)
def test_codes_start_as_the_k_means_centres_of_the_first_batch(name: str) -> None:
    quantizer = make(name, codebook_size=2, codebook_dim=4)
    clusters = [torch.randn(50, 4) * 0.1 + centre for centre in (torch.eye(4)[0], torch.eye(4)[2])]
    vectors = torch.cat(clusters)[torch.randperm(100)]
    quantizer.quantize(vectors)
    means = quantizer.project(torch.stack([quantizer.project(c).mean(dim=0) for c in clusters]))
    found = quantizer.codebook[quantizer.codebook[:, 0].argsort(descending=True)]
    torch.testing.assert_close(found, means, atol=1e-5, rtol=0)


def test_the_nearest_code_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codebook = torch.randn(100, 8), torch.randn(64, 8)
    whole = nearest_codes(vectors, codebook)
    monkeypatch.setattr("vqvae.quantizers.codebook.CHUNK", 64 * 7)
    assert torch.equal(nearest_codes(vectors, codebook), whole)


@pytest.mark.parametrize("name", ["vq", "gumbel", "ibq"])
def test_the_scores_of_all_vectors_never_exist_at_once(name: str) -> None:
    """32,768 x 262,144 scores would be 32 GiB; here a twelfth of both, in the same chunks.

    Where there is no gradient, `gumbel` and `ibq` made all of them.
    """
    quantizer, largest = make(name, codebook_size=21845, codebook_dim=8).eval(), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with torch.no_grad(), Watch():
        z_q, indices, _ = quantizer.quantize(torch.randn(2730, 8))
        assert torch.equal(quantizer.lookup(indices), z_q)
    assert largest <= 1 << 24


@pytest.mark.parametrize("levels", [(2, 2), (3, 5), (8, 6, 5), (8, 5, 5, 5), (7, 2, 4)])
def test_fsq_indices_and_codes_are_a_bijection(levels: tuple[int, ...]) -> None:
    quantizer = make("fsq", levels=levels)
    indices = torch.arange(quantizer.options.codebook_size)
    codes = quantizer.lookup(indices)
    assert len(codes.unique(dim=0)) == len(indices)
    halves = torch.tensor(levels) // 2
    assert torch.equal(quantizer.index(codes * halves + halves), indices)
    # Every level is within reach of the encoder: its bound is the inverse of the tanh.
    reached = quantizer.assign(torch.linspace(-9, 9, 4001)[:, None].expand(-1, len(levels)))
    for dimension, count in enumerate(levels):
        steps = reached // quantizer.strides[dimension] % count
        assert len(steps.unique()) == count


@pytest.mark.parametrize("levels", [(2, 2, 2), (8, 2), (3, 2, 5), (4, 4)])
def test_every_dimension_of_fsq_starts_alive(levels: tuple[int, ...]) -> None:
    """With 2 levels, the tanh began at its end: one level for all, and hardly a gradient."""
    quantizer = make("fsq", levels=levels)
    vectors = torch.randn(500, len(levels), requires_grad=True)
    z_q, indices, _ = quantizer.quantize(vectors)
    z_q.sum().backward()
    assert (vectors.grad.abs().mean(dim=0) > 0.1).all()
    for dimension, count in enumerate(levels):
        used = (indices // quantizer.strides[dimension] % count).bincount(minlength=count)
        assert used.min() > 500 / count / 10


def test_fsq_agrees_with_an_independent_implementation() -> None:
    oracle = pytest.importorskip("vector_quantize_pytorch").FSQ([8, 5, 5, 5])
    quantizer = make("fsq", levels=(8, 5, 5, 5)).eval()
    z_e = encodings(quantizer)
    codes, indices = oracle(z_e)
    z_q, own, _ = quantizer(z_e)
    assert torch.allclose(z_q, codes)
    assert torch.equal(own, indices.long())


@pytest.mark.parametrize("bits", [1, 3, 9, 12])
def test_lfq_indices_and_codes_are_a_bijection(bits: int) -> None:
    quantizer = make("lfq", codebook_size=2**bits)
    indices = torch.arange(2**bits)
    assert torch.equal(quantizer.assign(quantizer.lookup(indices)), indices)


def test_residual_codes_have_an_entropy_term_also_where_nothing_is_left_over() -> None:
    """It had none, and would have been NaN where all codes of a depth are 0."""
    quantizer = make("residual", codebook_size=4, entropy_weight=0.1)
    vectors = torch.eye(4, 8).repeat(9, 1).requires_grad_()  # the first depth has them all
    _, _, losses = quantizer.quantize(vectors)
    assert float(quantizer.layers[1].codebook.abs().sum()) == 0
    assert losses["entropy"].isfinite()
    losses["entropy"].backward()
    assert vectors.grad.isfinite().all()


@pytest.mark.parametrize("similarity", ["distance", "inner_product"])
def test_ibq_chooses_codes_by_the_similarity_that_it_starts_them_by(similarity: str) -> None:
    """Codes were k-means centres, but chosen by inner product: the longest ones won."""
    quantizer = make("ibq", codebook_size=64, similarity=similarity)
    vectors = torch.randn(5000, 8) + 2
    quantizer.initialise(vectors)
    indices = quantizer.assign(vectors)
    assert len(indices.unique()) > 0.8 * 64
    assert torch.equal(quantizer.logits(vectors).argmax(dim=1), indices)
    scaled = QUANTIZERS["ibq"](quantizer.options)
    scaled.initialise(100 * vectors)
    if similarity == "distance":  # has no scale
        logits = scaled.logits(100 * vectors)
        torch.testing.assert_close(logits, quantizer.logits(vectors), atol=1e-3, rtol=1e-3)


def test_gumbel_starts_from_k_means_with_every_code_in_use() -> None:
    """It started from random codes, most of which no vector ever chose."""
    quantizer = make("gumbel", codebook_size=64)
    centres = torch.randn(64, 8) * 3
    vectors = (centres[:, None] + 0.1 * torch.randn(64, 20, 8)).flatten(0, 1)
    quantizer.quantize(vectors)
    distances = torch.cdist(vectors, quantizer.codebook).square()
    spread = distances.min(dim=1).values.mean()
    logits = quantizer.proj(vectors)
    expected = (-distances / spread).softmax(dim=1)
    torch.testing.assert_close(logits.softmax(dim=1), expected, atol=1e-3, rtol=1e-3)
    assert len(quantizer.assign(vectors).unique()) > 0.9 * 64


def test_the_temperature_of_gumbel_falls_exponentially_to_its_final_value() -> None:
    quantizer = make("gumbel", temperature=1.0, final_temperature=0.01, temperature_steps=2)
    found = []
    for _ in range(4):
        found.append(float(quantizer.current_temperature()))
        quantizer.end_step()
    assert found == pytest.approx([1, 0.1, 0.01, 0.01])
    assert float(make("gumbel").current_temperature()) == 1


def test_residual_comes_closer_with_every_depth() -> None:
    quantizer = make("residual", depth=4)
    vectors = torch.randn(640, 8)
    quantizer.quantize(vectors)
    quantizer.eval()
    indices = quantizer.assign(vectors)
    rest = vectors
    errors = [float(rest.square().mean())]
    for depth, layer in enumerate(quantizer.layers):
        rest = rest - layer.lookup(indices[:, depth])
        errors.append(float(rest.square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert torch.allclose(vectors - rest, quantizer.lookup(indices), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quantizer": "nearest"}, "must be one of"),
        ({"quantizer": "fsq", "codebook_size": 1000}, "power of two"),
        ({"quantizer": "fsq", "levels": (8, 5), "codebook_size": 64}, "codebook_size 64"),
        ({"quantizer": "fsq", "levels": (8, 1)}, "levels must be at least 2, got 1"),
        ({"quantizer": "lfq", "codebook_size": 100}, "power of two"),
        ({"quantizer": "lfq", "codebook_size": 64, "codebook_dim": 8}, "give 256; leave it out"),
        ({"quantizer": "vq", "levels": (8, 5)}, "levels has no effect with the quantizer vq"),
        ({"quantizer": "vq", "depth": 2}, "depth has no effect with the quantizer vq"),
        ({"quantizer": "gumbel", "gradient": "rotation"}, "gradient has no effect"),
        ({"quantizer": "fsq", "entropy_weight": 0.1}, "entropy_weight has no effect"),
        ({"quantizer": "fsq", "commitment_cost": 1.0}, "commitment_cost has no effect"),
        ({"quantizer": "lfq", "dead_code_threshold": 0.1}, "dead_code_threshold has no effect"),
        ({"gradient": "reinforce"}, "gradient must be one of"),
        ({"colour": 1}, "'colour' is unknown"),
        ({"codebook_size": 1}, "at least 2"),
        ({"codebook_size": "64"}, "codebook_size must be int, got '64'"),
        ({"codebook_size": True}, "codebook_size must be int, got True"),
        ({"codebook_size": 10**30}, "codebook_size must be at most"),
        ({"quantizer": "fsq", "levels": [8, "5"]}, "levels must be tuple"),
        ({"commitment_cost": -1.0}, "commitment_cost must be at least 0, got -1"),
        ({"commitment_cost": float("nan")}, "commitment_cost must be at least 0, got nan"),
        ({"dead_code_threshold": float("inf")}, "dead_code_threshold must be at least 0, got inf"),
        (
            {"quantizer": "lfq", "entropy_weight": float("nan")},
            "entropy_weight must be at least 0, got nan",
        ),
        ({"quantizer": "lfq", "codebook_dim": 70}, "codebook_dim must be at most 24"),
        ({"quantizer": "fsq", "levels": (1000,) * 9}, "at most 16777216"),
        ({"quantizer": "residual", "codebook_size": 1 << 23}, "at most 16,777,216"),
    ],
)
def test_invalid_settings_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        VQVAEConfig.create(**settings)


# --- collapse -------------------------------------------------------------------------------------


@EVERY
def test_a_collapse_is_reported_and_the_codes_are_reset_at_most_three_times(name: str) -> None:
    quantizer = make(name)
    resets = quantizer.supports_reset
    monitor = CollapseMonitor(reset=resets)
    counts = torch.zeros(quantizer.options.num_codes)
    counts[0] = 3 * len(counts)
    assert monitor.check(quantizer, counts, final=False) == []  # fewer indices than suffice
    # A reset at the end would leave no trained codes.
    assert len(monitor.check(quantizer, counts * 2, final=True)) == 1
    for number in range(5):
        lines = monitor.check(quantizer, counts * 2, final=False)
        assert quantizer.usage_hint in lines[0]
        assert len(lines) == 1 + (resets and number < 3)
        if hasattr(quantizer, "initialised"):
            assert not quantizer.initialised
    assert monitor.check(quantizer, 4.0 + 0 * counts, final=False) == []  # all codes are in use
    again = CollapseMonitor(reset=resets)
    again.load_state_dict(monitor.state_dict())
    assert again.num_resets == (3 if resets else 0)
