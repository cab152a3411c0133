"""Other projects' tokenizers, against implementations that are not ours."""

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import checkpoint
from vqvae import VQVAE, VQVAEConfig, pretrained
from vqvae.layouts import LAYOUTS, from_other, to_other

CH, MULTIPLIERS, BLOCKS, Z, IMAGE = 32, (1, 2, 2), 2, 16, (32, 24)


def reference_weights(project: str, *, codes: int = 40, dim: int = 8) -> dict[str, Tensor]:
    """Random weights of a published VQGAN, by the names in its state dict."""
    random = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, before: int, after: int, side: int) -> None:
        fan_in = before * side * side
        weight = torch.randn(after, before, side, side, generator=random) * fan_in**-0.5
        state[f"{name}.weight"] = weight
        state[f"{name}.bias"] = torch.randn(after, generator=random) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=random)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=random)

    def block(name: str, before: int, after: int) -> None:
        norm(f"{name}.norm1", before)
        conv(f"{name}.conv1", before, after, 3)
        norm(f"{name}.norm2", after)
        conv(f"{name}.conv2", after, after, 3)
        if before != after:
            conv(f"{name}.nin_shortcut", before, after, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    widths = [CH * m for m in MULTIPLIERS]
    last = len(widths) - 1
    taming = project != "llamagen"
    mid = ("block_1", "attn_1", "block_2") if taming else ("0", "1", "2")
    inner = "block" if taming else "res"
    for side in ("encoder", "decoder"):
        conv(
            f"{side}.conv_in", 3 if side == "encoder" else Z, (CH, widths[-1])[side == "decoder"], 3
        )
        block(f"{side}.mid.{mid[0]}", widths[-1], widths[-1])
        attention(f"{side}.mid.{mid[1]}", widths[-1])
        block(f"{side}.mid.{mid[2]}", widths[-1], widths[-1])
    width = CH
    for level in range(last + 1):
        name = f"encoder.down.{level}" if taming else f"encoder.conv_blocks.{level}"
        for number in range(BLOCKS):
            block(f"{name}.{inner}.{number}", width, widths[level])
            width = widths[level]
            if level == last:
                attention(f"{name}.attn.{number}", width)
        if level < last:
            conv(f"{name}.downsample.conv", width, width, 3)
    for level in reversed(range(last + 1)):
        name = f"decoder.up.{level}" if taming else f"decoder.conv_blocks.{last - level}"
        for number in range(BLOCKS + 1):
            block(f"{name}.{inner}.{number}", width, widths[level])
            width = widths[level]
            if level == last:
                attention(f"{name}.attn.{number}", width)
        if level > 0:
            conv(f"{name}.upsample.conv", width, width, 3)
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], Z, 3)
    norm("decoder.norm_out", CH)
    conv("decoder.conv_out", CH, 3, 3)
    conv("quant_conv", Z, dim, 1)
    conv("post_quant_conv", dim, Z, 1)
    if project == "gumbel":
        conv("quantize.proj", dim, codes, 1)
        state["quantize.embed.weight"] = torch.randn(codes, dim, generator=random)
    else:
        state["quantize.embedding.weight"] = torch.randn(codes, dim, generator=random)
    return state


class Reference:
    """The published forward pass, straight from such a state dict."""

    def __init__(self, project: str, state: dict[str, Tensor]) -> None:
        self.project, self.state = project, state
        self.taming = project != "llamagen"
        self.mid = ("block_1", "attn_1", "block_2") if self.taming else ("0", "1", "2")
        self.inner = "block" if self.taming else "res"
        self.last = len(MULTIPLIERS) - 1

    def conv(self, x: Tensor, name: str, **options: int) -> Tensor:
        weight = self.state[f"{name}.weight"]
        options.setdefault("padding", weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **options)

    def norm(self, x: Tensor, name: str) -> Tensor:
        groups = (32, self.state[f"{name}.weight"], self.state[f"{name}.bias"])
        return F.group_norm(x, *groups, eps=1e-6)

    def block(self, x: Tensor, name: str) -> Tensor:
        h = x
        for number in (1, 2):
            h = self.norm(h, f"{name}.norm{number}")
            h = self.conv(h * torch.sigmoid(h), f"{name}.conv{number}")
        return h + (self.conv(x, f"{name}.nin_shortcut") if x.shape != h.shape else x)

    def attention(self, x: Tensor, name: str) -> Tensor:
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=2)
        return x + self.conv((v @ weights.transpose(1, 2)).view_as(x), f"{name}.proj_out")

    def middle(self, x: Tensor, side: str) -> Tensor:
        x = self.block(x, f"{side}.mid.{self.mid[0]}")
        x = self.attention(x, f"{side}.mid.{self.mid[1]}")
        return self.block(x, f"{side}.mid.{self.mid[2]}")

    def out(self, x: Tensor, side: str) -> Tensor:
        x = self.norm(x, f"{side}.norm_out")
        return self.conv(x * torch.sigmoid(x), f"{side}.conv_out")

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(x, "encoder.conv_in")
        for level in range(self.last + 1):
            name = f"encoder.{'down' if self.taming else 'conv_blocks'}.{level}"
            for number in range(BLOCKS):
                x = self.block(x, f"{name}.{self.inner}.{number}")
                if level == self.last:
                    x = self.attention(x, f"{name}.attn.{number}")
            if level < self.last:
                padded = F.pad(x, (0, 1, 0, 1))
                x = self.conv(padded, f"{name}.downsample.conv", stride=2, padding=0)
        x = self.conv(self.out(self.middle(x, "encoder"), "encoder"), "quant_conv")
        if self.project == "gumbel":
            return self.conv(x, "quantize.proj").argmax(dim=1)
        x, codes = x.permute(0, 2, 3, 1), self.state["quantize.embedding.weight"]
        if self.project == "llamagen":
            x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
        return (x[..., None, :] - codes).square().sum(dim=-1).argmin(dim=-1)

    def decode(self, indices: Tensor) -> Tensor:
        table = "quantize.embed.weight" if self.project == "gumbel" else "quantize.embedding.weight"
        codes = self.state[table]
        if self.project == "llamagen":
            codes = F.normalize(codes, dim=-1)
        x = self.conv(codes[indices].permute(0, 3, 1, 2), "post_quant_conv")
        x = self.middle(self.conv(x, "decoder.conv_in"), "decoder")
        for level in reversed(range(self.last + 1)):
            place = f"up.{level}" if self.taming else f"conv_blocks.{self.last - level}"
            for number in range(BLOCKS + 1):
                x = self.block(x, f"decoder.{place}.{self.inner}.{number}")
                if level == self.last:
                    x = self.attention(x, f"decoder.{place}.attn.{number}")
            if level > 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(x, f"decoder.{place}.upsample.conv")
        return self.out(x, "decoder")


def convert(way: str, name: str, source: Path, target: Path, **more: object) -> None:
    arguments = {"source": None, "target": None, "image_size": None, way: name, **more}
    pretrained.main(argparse.Namespace(checkpoint=str(source), output_dir=str(target), **arguments))


@pytest.mark.parametrize("kind", ["taming", "gumbel", "llamagen"])
def test_published_files_give_the_same_indices_and_images(kind: str, tmp_path: Path) -> None:
    project = "llamagen" if kind == "llamagen" else "taming"
    state = reference_weights(kind)
    extra = {
        "taming": {
            "loss.discriminator.main.0.bias": torch.zeros(4),
            "quantize.used": torch.ones(3),
        },
        "gumbel": {"loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 4, 1, 1)},
        "llamagen": {"quantize.codebook_used": torch.zeros(65536)},
    }[kind]
    nest = "model" if project == "llamagen" else "state_dict"
    file = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, "global_step": 7, nest: state | extra}, file)
    convert("source", project, file, tmp_path / "own", image_size=IMAGE)
    model = checkpoint.load_model(tmp_path / "own", VQVAE, VQVAEConfig).model
    assert model.config.attention_levels == (2,)

    reference = Reference(kind, state)
    images = torch.rand(3, 3, *IMAGE) * 2 - 1
    with torch.inference_mode():
        indices = model.encode(images)
        assert torch.equal(indices, reference.encode(images))
        assert len(indices.unique()) > 5
        expected = reference.decode(indices)
        # Compared before the clamp: random weights leave [-1, 1].
        decoded = model.decoder(model.quantizer.embed(indices))
        assert (decoded - expected).abs().max() < 1e-4

    convert("target", project, tmp_path / "own", tmp_path / "back")
    back = torch.load(tmp_path / "back" / f"{project}.ckpt", weights_only=True)[nest]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], weight) for name, weight in state.items())


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
    convert("source", "diffusers", tmp_path / "theirs", tmp_path / "own")
    model = checkpoint.load_model(tmp_path / "own", VQVAE, VQVAEConfig).model
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        latents = theirs.encode(images).latents
        _, _, (_, _, expected) = theirs.quantize(latents)
        indices = model.encode(images)
        assert torch.equal(indices.flatten(), expected.flatten())
        assert len(indices.unique()) > 5
        decoded = model.decoder(model.quantizer.embed(indices))
        assert (decoded - theirs.decode(latents).sample).abs().max() < 1e-4

    convert("target", "diffusers", tmp_path / "own", tmp_path / "back")
    back = diffusers.VQModel.from_pretrained(tmp_path / "back").eval()
    weights = theirs.state_dict()
    assert back.state_dict().keys() == weights.keys()
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in weights.items())
    with torch.inference_mode():
        assert torch.equal(back(images).sample, theirs(images).sample)


def test_missing_and_unknown_names_are_listed() -> None:
    state = reference_weights("taming")
    del state["encoder.mid.block_1.conv1.bias"]
    state["encoder.surprise.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"mid\.block_1\.conv1\.bias.*surprise"):
        from_other("taming", state, IMAGE)
    with pytest.raises(ValueError, match="no tokenizer of llamagen"):
        from_other("llamagen", state, IMAGE)


@pytest.mark.parametrize("project", LAYOUTS)
def test_a_network_that_a_project_does_not_have_is_refused(project: str) -> None:
    with pytest.raises(ValueError, match=project):
        to_other(project, VQVAE(VQVAEConfig(image_size=(8, 8), in_channels=3)))
