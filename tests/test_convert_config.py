"""Config files beside the checkpoints of other projects."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.published import make_weights, read_records
from tests.test_convert import RECORDS, TAMING_YAML, run, small_model
from utils import cli
from utils.provenance import load_model
from vqvae import VQVAE, convert
from vqvae.convert import write_diffusers
from vqvae.formats import export_weights


def test_a_config_adds_what_weights_do_not_tell(tmp_path: Path) -> None:
    torch.save({"state_dict": make_weights("taming VQModel")}, tmp_path / "last.ckpt")
    (tmp_path / "project.yaml").write_text(TAMING_YAML)
    config_file = str(tmp_path / "project.yaml")
    run("source", "taming", tmp_path / "last.ckpt", tmp_path / "own", config=config_file)
    config = load_model(tmp_path / "own", VQVAE).model.config
    assert (config.image_size, config.dropout) == ((64, 64), 0.1)
    gumbel = read_records()["taming GumbelVQ"]["config"]
    gumbel["model"]["params"]["kl_weight"] = 1e-8
    torch.save({"state_dict": make_weights("taming GumbelVQ")}, tmp_path / "gumbel.ckpt")
    (tmp_path / "project.yaml").write_text(json.dumps(gumbel))
    run("source", "taming", tmp_path / "gumbel.ckpt", tmp_path / "g", config=config_file)
    assert load_model(tmp_path / "g", VQVAE).model.config.quantizer_options.entropy_weight == 1e-8


@pytest.mark.parametrize("name", [name for name in RECORDS if not name.startswith("LlamaGen")])
def test_the_tokenizer_in_the_config_of_a_gpt_is_read(name: str, tmp_path: Path) -> None:
    """The class was taken to be that of the GPT: an IBQ was read as plain VQ."""
    target, params = RECORDS[name]["config"]["model"].values()
    first_stage = {"target": target, "params": params}
    gpt = {"target": "Net2NetTransformer", "params": {"first_stage_config": first_stage}}
    for kind, content in (("own", RECORDS[name]["config"]), ("gpt", {"model": gpt})):
        (tmp_path / kind).write_text(json.dumps(content))
    found = convert.read_config("taming", tmp_path / "gpt")
    assert found == convert.read_config("taming", tmp_path / "own")
    assert (found[1].get("quantizer") == "ibq") == ("IBQ" in name)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("n_embed: 41", "n_embed is 40 in the weights, but 41 in the config"),
        ("attn_resolutions: [32]", r"attn_resolutions is \[16\] in the weights, but \[32\]"),
        ("double_z: true", "double_z is False in the weights, but True"),
        ("kl_weight: 1.0e-08\n    embed_dim: 8", "quantizer is vq in its weights, but gumbel"),
        ("n_embed: [", "cannot read"),
        ("resolutions: 64", "not the config of a taming tokenizer: KeyError.'resolution'"),
    ],
)
def test_a_config_of_another_checkpoint_is_refused(
    wrong: str, complaint: str, tmp_path: Path
) -> None:
    torch.save({"state_dict": make_weights("taming VQModel")}, tmp_path / "last.ckpt")
    name = wrong.split(":")[0]
    name = {"resolutions": "resolution", "kl_weight": "embed_dim"}.get(name, name)
    text = re.sub(rf"\b{name}: (\[\d+\]|\w+)", wrong, TAMING_YAML)
    (tmp_path / "project.yaml").write_text(text)
    config_file = str(tmp_path / "project.yaml")
    with pytest.raises(cli.UserError, match=complaint):
        run("source", "taming", tmp_path / "last.ckpt", tmp_path / "own", config=config_file)
    assert not (tmp_path / "own").exists()


def test_llamagen_has_no_config_and_diffusers_only_the_model_that_is_read(tmp_path: Path) -> None:
    with pytest.raises(cli.UserError, match="no config files"):
        convert.read_config("llamagen", tmp_path / "config.yaml")
    path = tmp_path / "theirs"
    torch.save(export_weights("diffusers", small_model()), tmp_path / "a.bin")
    path.mkdir()
    (tmp_path / "a.bin").rename(path / "diffusion_pytorch_model.bin")
    for odd in ({"norm_type": "spatial"}, {"block_out_channels": ["a"]}, {"act_fn": 3}):
        content = write_diffusers(small_model().config) | odd
        (path / "config.json").write_text(json.dumps(content))
        with pytest.raises(cli.UserError, match=f"{next(iter(odd))} is .* but .* in the config"):
            run("source", "diffusers", path, tmp_path / "own", image_size=(16, 24))


@pytest.mark.parametrize(
    "odd",
    [
        {"sample_size": "large"},
        {"sample_size": [1, 2, 3]},
    ],
)
def test_an_odd_config_of_diffusers_is_a_line(odd: dict, tmp_path: Path) -> None:
    """It was a traceback."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel", **odd}))
    with pytest.raises(cli.UserError, match=r"config\.json is not the config of a diffusers"):
        convert.read_config("diffusers", tmp_path / "config.json")


@pytest.mark.parametrize(
    "text", ["[" * 1000, "a: !!python/object/apply:os.system ['touch canary']", "x" * (2 << 20)]
)
def test_a_config_of_a_stranger(tmp_path: Path, text: str) -> None:
    """Nesting ended in a RecursionError."""
    (tmp_path / "project.yaml").write_text(text)
    with pytest.raises(cli.UserError, match=r"project\.yaml"):
        convert.read_config("taming", tmp_path / "project.yaml")
    assert not Path("canary").exists()
