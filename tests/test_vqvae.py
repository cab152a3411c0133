"""Architecture and presets of the tokenizer."""

import pytest
import torch

import train_vqvae
from vqvae import PRESETS, VQVAE, VQVAEConfig
from vqvae.blocks import Attention

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
    model = VQVAE(VQVAEConfig(**SMALL, **settings)).eval()
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
    attention, x = Attention(32), torch.randn(2, 32, 3, 5)
    q, k, v = (
        project(attention.norm(x)).flatten(2) for project in (attention.q, attention.k, attention.v)
    )
    weights = (torch.einsum("bci,bcj->bij", q, k) * 32**-0.5).softmax(dim=2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    assert torch.allclose(attention(x), x + attention.proj_out(mixed), atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "factor"),
    [(name, int(name.split("-")[1][1:])) for name in PRESETS if "-f" in name],
)
def test_presets_are_buildable_and_downsample_by_their_name(preset: str, factor: int) -> None:
    config = VQVAEConfig(**PRESETS[preset], image_size=(256, 256), in_channels=3)
    assert config.downsampling == factor
    with torch.device("meta"):
        VQVAE(config)


def test_flags_override_a_preset_wherever_they_stand() -> None:
    words = "--path_to_data x --codebook_size 99 --preset vqgan-f16 --no-mid_attention"
    flags = train_vqvae.make_parser().parse_args(words.split())
    assert flags.codebook_size == 99
    assert not flags.mid_attention
    assert flags.channel_multipliers == (1, 1, 2, 2, 4)
    plain = train_vqvae.make_parser().parse_args(["--path_to_data", "x"])
    assert plain.channels == VQVAEConfig().channels


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"attention_levels": (1,)}, "attention_levels"),
        ({"image_size": (30, 32)}, "multiple"),
        ({"mid_blocks": 0}, "mid_blocks"),
        ({"z_channels": -1}, "z_channels"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        VQVAEConfig(**settings)
