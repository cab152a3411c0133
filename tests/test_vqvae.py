"""Architecture and presets of the tokenizer."""

import json
from pathlib import Path

import pytest
import torch

import train_vqvae
from vqvae import PRESETS, QUANTIZERS, VQVAE, VQVAEConfig
from vqvae.model import Attention, ResidualBlock

SMALL = {"image_size": (16, 32), "in_channels": 3, "channels": 32}
SHAPES = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patch_size": 1, "channel_multipliers": (1, 2, 2), "num_res_blocks": 2},
        {"patch_size": 2, "channel_multipliers": (1, 2), "attention_levels": (0, 1)},
        {"mid_blocks": 2, "mid_attention": True, "z_channels": 12},
        {"quantizer": "residual", "depth": 3},
    ],
)


@SHAPES
def test_a_decoded_image_has_the_shape_of_the_encoded(settings: dict) -> None:
    model = VQVAE(VQVAEConfig.create(**SMALL, **settings)).eval()
    images = torch.rand(2, 3, 16, 32) * 2 - 1
    indices = model.encode(images)
    config = model.config
    assert indices.shape[:3] == (2, *config.latent_dim)
    assert indices.shape[3:] == ((config.depth,) if config.depth > 1 else ())
    decoded = model.decode(indices)
    assert decoded.shape == images.shape
    output = model(images)
    assert torch.equal(output.quantized.indices, indices)
    assert torch.equal(output.quantized.z_q, model.embed(indices))
    assert torch.allclose(output.reconstruction.clamp(-1, 1), decoded)


def test_attention_is_softmax_over_all_cells() -> None:
    torch.manual_seed(0)
    attention, x = Attention(VQVAEConfig(), 32), torch.randn(2, 32, 3, 5)
    q, k, v = (
        project(attention.norm(x)).flatten(2) for project in (attention.q, attention.k, attention.v)
    )
    weights = (torch.einsum("bci,bcj->bij", q, k) * 32**-0.5).softmax(dim=2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    assert torch.allclose(attention(x), x + attention.proj_out(mixed), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "channels", "groups"),
    [({"channels_per_group": 8}, width, groups) for width, groups in ((32, 4), (64, 8), (12, 3))]
    + [({}, width, groups) for width, groups in ((32, 32), (512, 32), (12, 4))],
)
def test_groups_of_group_norm_have_a_given_number_or_size(
    settings: dict, channels: int, groups: int
) -> None:
    """32 groups of 32 channels normalise each channel by itself."""
    norm = ResidualBlock(VQVAEConfig(**settings), channels, channels).norm1
    assert norm.num_groups == groups


def test_published_presets_have_32_groups_and_their_own_codes() -> None:
    configs = {name: VQVAEConfig.from_preset(name) for name in PRESETS if name != "vqvae-small"}
    assert all(config.channels_per_group == 0 for config in configs.values())
    codes = {x: (c.quantizer, c.codebook_size, c.codebook_dim) for x, c in configs.items()}
    # taming-transformers' f8 is a Gumbel VQGAN of 8,192 codes, its f16 has up to 16,384.
    assert codes["vqgan-f8"] == codes["vqgan-f8-s2d"] == ("gumbel", 8192, 256)
    assert codes["vqgan-f16"] == codes["vqgan-f16-s2d"] == ("vq", 16384, 256)
    assert codes["llamagen-f16"] == ("cosine", 16384, 8)
    other = VQVAEConfig.from_preset("vqgan-f8", quantizer="fsq", levels=(8, 8, 8))
    assert (other.codebook_size, other.codebook_dim) == (512, 3)


@pytest.mark.parametrize(
    ("preset", "factor"),
    [(name, int(name.split("-")[1][1:])) for name in PRESETS if "-f" in name],
)
def test_presets_are_buildable_and_downsample_by_their_name(preset: str, factor: int) -> None:
    config = VQVAEConfig.from_preset(preset, image_size=(256, 256), in_channels=3)
    assert config.downsampling == factor
    with torch.device("meta"):
        VQVAE(config)


def test_flags_override_a_preset_wherever_they_stand() -> None:
    words = "--path_to_data x --codebook_size 99 --preset vqgan-f16 --no-mid_attention"
    _, config = train_vqvae.read_start(
        train_vqvae.StartConfig(), train_vqvae.make_parser().parse_args(words.split())
    )
    assert (config.codebook_size, config.codebook_dim) == (99, 256)
    assert not config.mid_attention
    assert config.channel_multipliers == (1, 1, 2, 2, 4)
    plain = train_vqvae.make_parser().parse_args(["--path_to_data", "x"])
    assert train_vqvae.read_start(train_vqvae.StartConfig(), plain)[1] == VQVAEConfig()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"attention_levels": (1,)}, "attention_levels"),
        ({"image_size": (30, 32)}, "multiple"),
        ({"mid_blocks": 0}, "mid_blocks"),
        ({"z_channels": -1}, "z_channels"),
        ({"channels": "64"}, "channels must be int, got '64'"),
        ({"attention_levels": [True]}, "attention_levels must be tuple"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        VQVAEConfig.create(**settings)


# --- model folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_model_folder_holds_the_whole_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"quantizer": name, "codebook_size": 64, "channel_multipliers": (1, 2)}
    model = VQVAE(VQVAEConfig.create(**SMALL, **settings))
    model(torch.rand(2, 3, 16, 32))  # the codes are initialised
    model.save_pretrained(tmp_path)
    loaded = VQVAE.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    images = torch.rand(2, 3, 16, 32) * 2 - 1
    indices = model.eval().encode(images)
    assert torch.equal(loaded.encode(images), indices)
    assert torch.equal(loaded.decode(indices), model.decode(indices))


def test_a_folder_of_version_1_keeps_its_groups_and_its_inner_products(tmp_path: Path) -> None:
    settings = {"quantizer": "ibq", "channels_per_group": 0, "similarity": "inner_product"}
    model = VQVAE(VQVAEConfig.create(**SMALL, **settings))
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text()) | {"format_version": 1}
    del values["channels_per_group"], values["similarity"]
    file.write_text(json.dumps(values))
    assert VQVAE.from_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": "GPT"}, "holds a GPT, but a VQVAE is needed"),
        ({"format_version": 99}, r"format_version is 99, but .* reads up to 2; update"),
        ({"format_version": None}, "format_version is None"),
        ({"channels": 64}, "config.json or model.safetensors"),
        ({"channels": 1 << 16}, "size mismatch"),  # of which no memory is taken
        ({"quantizer": "ema"}, "quantizer.counts"),
        ({"colour": "red"}, "config.json .*: 'colour' is unknown"),
        ({"levels": [8, 8, 8]}, "levels has no effect with the quantizer vq"),
    ],
)
def test_a_damaged_or_newer_model_folder_is_refused(
    change: dict, complaint: str, tmp_path: Path
) -> None:
    VQVAE(VQVAEConfig.create(**SMALL)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=complaint):
        VQVAE.from_pretrained(tmp_path)
    for text in ("[]", "{", '{"a":' * 100_000):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            VQVAE.from_pretrained(tmp_path)
