"""Config files of other projects: what they add to the weights, and what contradicts them."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.reference_vqgan import reference_weights
from tests.test_pretrained import convert
from utils import cli
from utils.training import checkpoint
from vqvae import VQVAE, pretrained

TAMING_YAML = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 8
    n_embed: 40
    ddconfig: {double_z: false, z_channels: 16, resolution: 64, in_channels: 3, out_ch: 3, ch: 32,
               ch_mult: [1, 2, 2], num_res_blocks: 2, attn_resolutions: [16], dropout: 0.1}
    lossconfig: {target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator}
"""


def test_a_config_adds_what_weights_do_not_tell(tmp_path: Path) -> None:
    torch.save({"state_dict": reference_weights("taming")}, tmp_path / "last.ckpt")
    (tmp_path / "project.yaml").write_text(TAMING_YAML)
    config_file = str(tmp_path / "project.yaml")
    convert("source", "taming", tmp_path / "last.ckpt", tmp_path / "own", config=config_file)
    config = checkpoint.load_model(tmp_path / "own", VQVAE).model.config
    assert (config.image_size, config.dropout) == ((64, 64), 0.1)
    torch.save({"state_dict": reference_weights("gumbel")}, tmp_path / "gumbel.ckpt")
    gumbel = TAMING_YAML.replace("n_embed: 40", "n_embed: 40\n    kl_weight: 1.0e-08")
    (tmp_path / "project.yaml").write_text(gumbel)
    convert("source", "taming", tmp_path / "gumbel.ckpt", tmp_path / "g", config=config_file)
    assert checkpoint.load_model(tmp_path / "g", VQVAE).model.config.entropy_weight == 1e-8


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("n_embed: 41", "codebook_size is 40 by its weights, but 41 by its config"),
        ("attn_resolutions: [32]", r"attention_levels is \(2,\) by its weights, but \(1,\)"),
        ("kl_weight: 1.0e-08\n    embed_dim: 8", "quantizer is vq by its weights, but gumbel"),
        ("n_embed: [", "cannot read"),
        ("n_embeds: 40", "no config of a taming VQGAN: KeyError.'n_embed'"),
    ],
)
def test_a_config_of_another_checkpoint_is_refused(
    wrong: str, complaint: str, tmp_path: Path
) -> None:
    torch.save({"state_dict": reference_weights("taming")}, tmp_path / "last.ckpt")
    right = wrong.split(":")[0].replace("n_embeds", "n_embed").replace("kl_weight", "embed_dim")
    text = re.sub(rf"{right}: (\[\d+\]|\d+)", wrong, TAMING_YAML)
    (tmp_path / "project.yaml").write_text(text)
    config_file = str(tmp_path / "project.yaml")
    with pytest.raises(cli.UserError, match=complaint):
        convert("source", "taming", tmp_path / "last.ckpt", tmp_path / "own", config=config_file)
    assert not (tmp_path / "own").exists()


def test_llamagen_has_no_config_and_diffusers_only_the_model_that_is_read(tmp_path: Path) -> None:
    with pytest.raises(cli.UserError, match="no config files"):
        pretrained.read_config("llamagen", tmp_path / "config.yaml")
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel", "norm_type": "spatial"}')
    with pytest.raises(cli.UserError, match="norm_type is 'spatial', but only 'group'"):
        pretrained.read_config("diffusers", tmp_path / "config.json")


@pytest.mark.parametrize(
    "odd",
    [
        {"block_out_channels": ["a"]},
        {"block_out_channels": 3},
        {"down_block_types": [1]},
        {"sample_size": "large"},
        {"sample_size": [1, 2, 3]},
    ],
)
def test_an_odd_config_of_diffusers_is_a_line(odd: dict, tmp_path: Path) -> None:
    """It was a traceback."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel", **odd}))
    with pytest.raises(cli.UserError, match=r"config\.json: it is no config of a diffusers"):
        pretrained.read_config("diffusers", tmp_path / "config.json")


@pytest.mark.parametrize(
    "text", ["[" * 1000, "a: !!python/object/apply:os.system ['touch canary']", "x" * (2 << 20)]
)
def test_a_config_of_a_stranger(tmp_path: Path, text: str) -> None:
    """Nesting ended in a RecursionError."""
    (tmp_path / "project.yaml").write_text(text)
    with pytest.raises(cli.UserError, match=r"project\.yaml"):
        pretrained.read_config("taming", tmp_path / "project.yaml")
    assert not Path("canary").exists()
