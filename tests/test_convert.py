"""Other projects' tokenizers, against outputs of their own code (tests/published.json)."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.published import SIZE, assert_recorded, make_images, make_weights, read_records
from utils import cli
from utils.provenance import load_model
from vqvae import VQVAE, VQVAEConfig, convert
from vqvae.convert import write_diffusers
from vqvae.formats import (
    FORMATS,
    export_weights,
    import_weights,
    reconstruction_error,
    smooth_image,
)

RECORDS = {name: record for name, record in read_records().items() if "GPT" not in name}
TAMING_YAML = yaml.safe_dump(
    RECORDS["taming VQModel"]["config"], sort_keys=False, default_flow_style=None
)


def run(way: str, name: str, source: Path, target: Path, **more: object) -> None:
    names = ("source", "target", "image_size", "config", "quantizer")
    arguments: dict[str, object] = dict.fromkeys(names) | more
    arguments[way] = name
    convert.main(argparse.Namespace(checkpoint=str(source), output_dir=str(target), **arguments))


@pytest.mark.parametrize("name", RECORDS)
def test_models_of_other_projects_give_what_their_own_code_gives(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Indices, images, the gradient of the quantizer's loss, and the same files on the way back."""
    record, state = RECORDS[name], make_weights(name)
    project = "llamagen" if "LlamaGen" in name else "taming"
    extra = {"loss.discriminator.main.0.bias": torch.zeros(4), "quantize.used": torch.ones(3)}
    nest, extra = ("model", {}) if project == "llamagen" else ("state_dict", extra)
    torch.save({"epoch": 3, "global_step": 7, nest: state | extra}, tmp_path / "last.ckpt")
    more = {"image_size": SIZE}
    if project == "taming":
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(record["config"]))
        more = {"config": str(tmp_path / "config.yaml")}
    run("source", project, tmp_path / "last.ckpt", tmp_path / "own", **more)
    printed = capsys.readouterr().out
    assert all(key in printed for key in extra)
    assert ("warning: the checkpoint's remap of used codes is ignored" in printed) == bool(extra)
    assert ("equal indices: " in printed) == ("Gumbel" not in name)
    if "IBQ" in name:
        assert "100 % by inner product" in printed

    model = load_model(tmp_path / "own", VQVAE).model
    with torch.inference_mode():
        indices = model.encode(make_images())
        assert indices.flatten().tolist() == record["indices"]
        assert len(indices.unique()) > 8
        # Compared before the clamp: random weights leave [-1, 1].
        assert_recorded(model.decoder(model.quantizer.embed(indices)), record["reconstruction"])
    z_e = model.encoder(make_images()).detach().requires_grad_()
    sum(model.quantizer(z_e).losses.values()).backward()
    # IBQ takes the logarithm of mean probabilities + 1e-5.
    assert_recorded(z_e.grad, record["gradient"], 3e-3 if "IBQ" in name else 1e-5)

    if "IBQ" in name:
        with pytest.raises(cli.UserError, match="taming has no tokenizer with quantizer"):
            run("target", project, tmp_path / "own", tmp_path / "back")
        return
    run("target", project, tmp_path / "own", tmp_path / "back")
    back = torch.load(tmp_path / "back" / f"{project}.ckpt", weights_only=True)[nest]
    config = record["config"]
    if "EMA" in name:  # cannot be built there, but a VQModel with these codes computes the same
        state = {key: state[key] for key in make_weights("taming VQModel")}
        config = RECORDS["taming VQModel"]["config"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], weight) for key, weight in state.items())
    if project == "taming":
        assert yaml.safe_load((tmp_path / "back" / "config.yaml").read_text()) == config


@pytest.mark.parametrize(
    "settings",
    [
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            "latent_channels": 3,
            "num_vq_embeddings": 32,
        },
        {
            "block_out_channels": (32, 64, 128),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 2,
            "latent_channels": 16,
            "vq_embed_dim": 4,
            "num_vq_embeddings": 128,
            "mid_block_add_attention": False,
        },
    ],
)
def test_diffusers_folders_give_the_same_there_and_back(settings: dict, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.VQModel(sample_size=32, **settings).eval()
    with torch.inference_mode():  # codes among the encodings, so that many are chosen
        vectors = theirs.encode(torch.rand(3, 3, 32, 32) * 2 - 1).latents.permute(0, 2, 3, 1)
        codes = theirs.quantize.embedding.weight
        codes.copy_(vectors.flatten(0, 2)[torch.randperm(vectors[..., 0].numel())[: len(codes)]])
    theirs.save_pretrained(tmp_path / "theirs")
    run("source", "diffusers", tmp_path / "theirs", tmp_path / "own", image_size=(32, 32))
    model = load_model(tmp_path / "own", VQVAE).model
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        latents = theirs.encode(images).latents
        _, _, (_, _, expected) = theirs.quantize(latents)
        indices = model.encode(images)
        assert torch.equal(indices.flatten(), expected.flatten())
        assert len(indices.unique()) > 5
        decoded = model.decoder(model.quantizer.embed(indices))
        assert (decoded - theirs.decode(latents).sample).abs().max() < 1e-4

    run("target", "diffusers", tmp_path / "own", tmp_path / "back")
    back = diffusers.VQModel.from_pretrained(tmp_path / "back").eval()
    weights = theirs.state_dict()
    assert back.state_dict().keys() == weights.keys()
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in weights.items())
    with torch.inference_mode():
        assert torch.equal(back(images).sample, theirs(images).sample)


def test_averages_of_the_codes_come_along() -> None:
    """taming's EMA codebooks were refused for names that are unknown."""
    state = make_weights("taming EMAVQ") | {"quantize.embedding.cluster_size": torch.rand(40)}
    model, ignored = import_weights("taming", state, SIZE)
    assert (model.config.quantizer, ignored) == ("ema", [])
    assert torch.equal(model.quantizer.counts, state["quantize.embedding.cluster_size"])
    assert torch.equal(model.quantizer.sums, state["quantize.embedding.embed_avg"])


@pytest.mark.parametrize("prefix", ["model.", "vqgan.", "module._orig_mod.", "first_stage_model."])
def test_a_tokenizer_within_another_model(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = make_weights("taming VQModel")
    nested = {prefix + name: weight for name, weight in state.items()}
    nested["transformer.head.weight"] = torch.zeros(1)
    torch.save({"state_dict": nested}, tmp_path / "a.ckpt")
    run("source", "taming", tmp_path / "a.ckpt", tmp_path / "own", image_size=SIZE)
    assert f"read: state_dict.{prefix}; not read: nothing" in capsys.readouterr().out
    back = export_weights("taming", load_model(tmp_path / "own", VQVAE).model)
    assert all(torch.equal(back[name], weight) for name, weight in state.items())


def test_llamagen_s_average_is_what_counts_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = make_weights("LlamaGen VQModel"), make_weights("LlamaGen VQModel")
    second["quant_conv.bias"] = torch.full_like(second["quant_conv.bias"], 7.0)
    torch.save({"model": first, "ema": second | {"epoch": 3}, "steps": 1}, tmp_path / "a.pt")
    run("source", "llamagen", tmp_path / "a.pt", tmp_path / "own", image_size=SIZE)
    model = load_model(tmp_path / "own", VQVAE).model
    assert (model.encoder.quant_conv.bias == 7).all()
    printed = capsys.readouterr().out
    assert "read: ema.; not read: model." in printed
    assert "not part of the model: quantize.codebook_used, ema.epoch, steps" in printed


def saved(folder: Path, state: dict, project: str = "taming") -> Path:
    torch.save({"state_dict": state}, folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("quantize.quant_resi.qresi_ls.0.weight", "VAR"),
        ("decoder.up.1.upsample_conv.weight", "MaskGIT-VQGAN"),
        ("latent_tokens", "TiTok"),
        ("decoder.adaptive.0.gamma.weight", "Open-MAGVIT2"),
        ("quantize.group_basis", "BSQ-ViT"),
        ("tok_embeddings.weight", "transformer.convert"),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_networks_of_other_projects_are_named(
    key: str, name: str, wrapper: str, tmp_path: Path
) -> None:
    """Missing and unknown keys were listed, of which nobody learns what to do."""
    others = {"TiTok", "BSQ-ViT", "transformer.convert"}  # without taming's encoder
    state = {} if name in others else {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}
    state = {wrapper + k: x for k, x in (state | {key: torch.zeros(2, 2)}).items()}
    with pytest.raises(cli.UserError, match=rf"a\.ckpt: this is .*{name}"):
        run("source", "taming", saved(tmp_path, state), tmp_path / "own", image_size=SIZE)


def test_without_a_config_the_lookup_is_a_flag(tmp_path: Path) -> None:
    """IBQ was read as plain VQ: a tenth of the indices was right."""
    path = saved(tmp_path, make_weights("SEED-Voken IBQ"))
    run("source", "taming", path, tmp_path / "own", image_size=SIZE, quantizer="ibq")
    with torch.inference_mode():
        indices = load_model(tmp_path / "own", VQVAE).model.encode(make_images())
    assert indices.flatten().tolist() == RECORDS["SEED-Voken IBQ"]["indices"]


def test_l2_normalised_codes_of_seed_voken_are_refused(tmp_path: Path) -> None:
    """It decodes codes of any length, which were normalised here."""
    path = tmp_path / "a.yaml"
    path.write_text(TAMING_YAML.replace("n_embed: 40", "n_embed: 40\n    l2_normalize: true"))
    with pytest.raises(cli.UserError, match="l2_normalize is not supported"):
        convert.read_config("taming", path)


def test_codes_that_do_not_fit_the_encodings_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = make_weights("taming VQModel")
    state["quantize.embedding.weight"] *= 50
    run("source", "taming", saved(tmp_path, state), tmp_path / "own", image_size=SIZE)
    assert "warning: its codes do not fit its encodings" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["vq", "gumbel"])
def test_weights_that_are_read_wrongly_do_not_reconstruct(kind: str) -> None:
    """Of every quantizer, also of those whose codes are not compared with the encodings."""
    shape = {"channels": 32, "channel_multipliers": (1, 1), "num_res_blocks": 1}
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig.create(quantizer=kind, image_size=(16, 16), in_channels=3, **shape))
    images = smooth_image(model.config)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        output = model(images)
        error = (output.reconstruction - images).square().mean()
        sum(output.quantized.losses.values(), error).backward()
        optimizer.step()
        model.quantizer.end_step()
    model.eval()
    assert reconstruction_error(model) < 0.5
    with torch.no_grad():
        for block in model.decoder.up:
            for weight in block.parameters():
                weight.copy_(weight.flatten().flip(0).view_as(weight))
    assert reconstruction_error(model) > 0.8


def test_averages_of_lightning_are_read(tmp_path: Path) -> None:
    state = make_weights("taming VQModel")
    averages = {f"model_ema.{key.replace('.', '')}": x + 1 for key, x in state.items()}
    model, _ = import_weights("taming", state | averages, SIZE)
    assert torch.equal(model.encoder.conv_in.bias, state["encoder.conv_in.bias"] + 1)


def test_the_size_of_the_images_is_never_guessed(tmp_path: Path) -> None:
    """LlamaGen's was 256 and diffusers' the default of its class, and images were resized to it."""
    for project, name in (("taming", "taming VQModel"), ("llamagen", "LlamaGen VQModel")):
        path = saved(tmp_path, make_weights(name))
        with pytest.raises(cli.UserError, match="add --image_size"):
            run("source", project, path, tmp_path / "own")
    assert convert.read_diffusers({"sample_size": 32})[1] == {}
    assert convert.read_diffusers({})[1] == {}
    assert convert.read_diffusers({"sample_size": 64})[1] == {"image_size": (64, 64)}


@pytest.mark.parametrize("target", ["taming", "llamagen", "diffusers", "source"])
def test_nothing_is_written_over(target: str, tmp_path: Path) -> None:
    """A folder of the user's was replaced by the converted model, and all in it was gone."""
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("years of work")
    way, name = ("source", "taming") if target == "source" else ("target", target)
    with pytest.raises(cli.UserError, match=r"thesis exists and is not empty.*--output_dir"):
        run(way, name, tmp_path / "nowhere", folder)  # before anything is read
    assert (folder / "chapter.txt").read_text() == "years of work"


def small_model() -> VQVAE:
    config = VQVAEConfig.create(
        image_size=(16, 24),
        in_channels=3,
        patch_size=1,
        channels=32,
        mid_blocks=2,
        z_channels=4,
        codebook_size=16,
        codebook_dim=4,
    )
    return VQVAE(config)


def test_diffusers_folders_from_before_safetensors(tmp_path: Path) -> None:
    model = small_model()
    torch.save(export_weights("diffusers", model), own_file := tmp_path / "old.bin")
    (tmp_path / "theirs").mkdir()
    own_file.rename(tmp_path / "theirs" / "diffusion_pytorch_model.bin")
    content = write_diffusers(model.config) | {"sample_size": [16, 24]}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(content))
    run("source", "diffusers", tmp_path / "theirs", tmp_path / "own")
    found = load_model(tmp_path / "own", VQVAE).model
    assert found.config.image_size == (16, 24)
    weights = model.state_dict()
    assert torch.equal(found.encoder.conv_in.weight, weights["encoder.conv_in.weight"])


@pytest.mark.parametrize(
    "flag", [{"image_size": (8, 8)}, {"config": "a.yaml"}, {"quantizer": "ibq"}]
)
def test_flags_that_do_nothing_on_the_way_out_are_refused(flag: dict, tmp_path: Path) -> None:
    with pytest.raises(cli.UserError, match="has no effect with --to"):
        run("target", "taming", tmp_path / "own", tmp_path / "back", **flag)


def test_missing_and_unknown_names_are_listed() -> None:
    state = make_weights("taming VQModel")
    del state["encoder.mid.block_1.conv1.bias"]
    state["encoder.surprise.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"mid\.block_1\.conv1\.bias.*surprise"):
        import_weights("taming", state, SIZE)
    with pytest.raises(ValueError, match="not a tokenizer of llamagen"):
        import_weights("llamagen", state, SIZE)


@pytest.mark.parametrize(
    ("project", "other"),
    [
        ("taming", {"channels": 48}),
        ("taming", {"codebook_dim": 8, "quantizer": "gumbel"}),
        ("llamagen", {"channels": 48, "quantizer": "cosine"}),
        ("llamagen", {"channels": 64, "quantizer": "cosine"}),
        ("llamagen", {"num_res_blocks": 1, "quantizer": "cosine"}),
        ("llamagen", {"in_channels": 1, "quantizer": "cosine"}),
    ],
)
def test_widths_that_a_project_cannot_build_are_refused(project: str, other: dict) -> None:
    """They were written, and failed where they were to be read."""
    settings = {
        "image_size": (8, 8),
        "in_channels": 3,
        "patch_size": 1,
        "channels": 128,
        "num_res_blocks": 2,
        "mid_blocks": 2,
        "mid_attention": True,
        "z_channels": 4,
        "codebook_dim": 4,
        "attention_levels": (0,),
    }
    with torch.device("meta"):
        export_weights(
            project, VQVAE(VQVAEConfig.create(**settings, quantizer=other.get("quantizer", "vq")))
        )
        model = VQVAE(VQVAEConfig.create(**settings | other))
        with pytest.raises(ValueError, match=f"{project} has no tokenizer"):
            export_weights(project, model)


@pytest.mark.parametrize("project", FORMATS)
def test_a_network_that_a_project_does_not_have_is_refused(project: str) -> None:
    with pytest.raises(ValueError, match=project):
        export_weights(project, VQVAE(VQVAEConfig.create(image_size=(8, 8), in_channels=3)))
