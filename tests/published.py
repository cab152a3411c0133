"""Tiny models of other projects: names, shapes and outputs, recorded from the projects' own code.

`python tests/published.py CHECKOUT` records the models of one project anew into published.json,
given a git checkout of it. Weights and images follow from names and shapes, and are not stored.
"""

import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("published.json")
SIZE = (32, 48)
GUIDANCE = 3.0


def make_uniform(name: str, shape: list[int]) -> Tensor:
    """Uniform in [-1, 1], from the name; on every machine the same, unlike normal numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(shape, generator=generator) * 2 - 1


def make_weight(name: str, shape: list[int]) -> Tensor:
    """A weight of a scale that keeps activations near 1; zeros for counters."""
    if len(shape) > 1:
        return make_uniform(name, shape) * (3 / torch.Size(shape[1:]).numel()) ** 0.5
    if name.endswith(("weight", "bias")):
        return 0.2 * make_uniform(name, shape) + name.endswith("weight")
    return torch.zeros(shape)


def make_weights(model: str) -> dict[str, Tensor]:
    """The state dict of a recorded model, with its names and in its order."""
    state = read_records()[model]["state"]
    if isinstance(state, str):  # that of another model
        return make_weights(state)
    return {name: make_weight(name, shape) for name, shape in state.items()}


def make_images(count: int = 1) -> Tensor:
    """Images (count, 3, H, W) in [-1, 1]."""
    return make_uniform("images", [count, 3, *SIZE])


def read_records() -> dict[str, Any]:
    """What was recorded, by the name of the model."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def digest(x: Tensor) -> dict[str, Any]:
    """Mean and shape of a tensor, and 12 of its values."""
    flat = x.detach().double().flatten()
    values = [float(f"{value:.7g}") for value in flat[:: -(-len(flat) // 12)].tolist()]
    return {"shape": list(x.shape), "mean": float(f"{flat.mean():.7g}"), "values": values}


def assert_recorded(x: Tensor, expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """An AssertionError where a tensor differs from its digest, relative to the largest value."""
    found = digest(x)
    assert found["shape"] == expected["shape"]
    pair = (torch.tensor([one["mean"], *one["values"]]) for one in (found, expected))
    largest = max(map(abs, expected["values"]))
    torch.testing.assert_close(*pair, rtol=0, atol=tolerance * largest)


# --- recording ------------------------------------------------------------------------------------

NETWORK = {
    "double_z": False,
    "z_channels": 16,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.1,
}
LOSS = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
TAMING = {"embed_dim": 8, "n_embed": 40, "ddconfig": NETWORK, "lossconfig": LOSS}
IBQ = {
    "lossconfig": {
        "target": "src.IBQ.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"quant_loss_weight": 1.0, "entropy_loss_weight": 0.05},
    },
    "use_entropy_loss": True,
}
SCHEDULER = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {
        "warm_up_steps": 0,
        "max_decay_steps": 1000001,
        "lr_start": 0.9,
        "lr_max": 0.9,
        "lr_min": 1e-6,
    },
}
# In a GumbelVQ, z_channels and embed_dim have to be the same.
GUMBEL = {
    "embed_dim": 8,
    "n_embed": 40,
    "ddconfig": NETWORK | {"z_channels": 8, "attn_resolutions": [32], "num_res_blocks": 1},
    "lossconfig": LOSS,
    "kl_weight": 5e-4,
    "temperature_scheduler_config": SCHEDULER,
}
LLAMAGEN_VQ = {
    "codebook_size": 40,
    "codebook_embed_dim": 8,
    "encoder_ch_mult": [1, 1, 2],
    "decoder_ch_mult": [1, 1, 2],
    "z_channels": 16,
}
LLAMAGEN_GPT = {
    "dim": 32,
    "n_layer": 3,
    "n_head": 4,
    "multiple_of": 8,
    "num_classes": 5,
    "vocab_size": 31,
    "block_size": 16,
}


def taming(cls: str, **params: Any) -> dict[str, Any]:
    return {"model": {"target": f"taming.models.vqgan.{cls}", "params": params}}


def seed_voken(cls: str, **params: Any) -> dict[str, Any]:
    return {"model": {"class_path": f"src.IBQ.models.ibqgan.{cls}", "init_args": params}}


# By the name of the repository: the name of each model, and its config.
MODELS = {
    "github.com/CompVis/taming-transformers": {
        "taming VQModel": taming("VQModel", **TAMING),
        "taming EMAVQ": taming("EMAVQ", **TAMING),
        "taming GumbelVQ": taming("GumbelVQ", **GUMBEL),
    },
    "github.com/TencentARC/SEED-Voken": {
        "SEED-Voken IBQ": seed_voken("IBQ", **TAMING | IBQ),
    },
    "github.com/FoundationVision/LlamaGen": {
        "LlamaGen VQModel": LLAMAGEN_VQ,
        "LlamaGen GPT": LLAMAGEN_GPT,
        "LlamaGen GPT with grouped queries": LLAMAGEN_GPT | {"n_kv_head": 2},
    },
}


def build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The project's own model, from its config."""
    if name.startswith("LlamaGen"):
        gpt = "GPT" in name
        module = import_module(
            "autoregressive.models.gpt" if gpt else "tokenizer.tokenizer_image.vq_model"
        )
        return (module.Transformer if gpt else module.VQModel)(module.ModelArgs(**config))
    path, params = config["model"].values()
    module, cls = path.rsplit(".", 1)
    if cls == "EMAVQ":  # its quantizer reads two undefined names
        quantize = import_module("taming.modules.vqvae.quantize")
        quantize.codebook_dim, quantize.num_tokens = params["embed_dim"], params["n_embed"]
    return getattr(import_module(module), cls)(**params)


def weight_losses(config: Mapping[str, Any], loss: Any) -> Tensor:
    """The loss of the quantizer in the project's training."""
    if isinstance(loss, Tensor):
        return loss
    if "model" not in config:  # LlamaGen: codebook, commitment, entropy, usage
        return sum(loss[:3])
    params = config["model"]["init_args"]["lossconfig"]["params"]  # IBQ
    return params["quant_loss_weight"] * loss[0] + params["entropy_loss_weight"] * loss[3]


def record_tokenizer(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Indices and reconstruction of the image, and what the loss of the quantizer does to z_e."""
    quantized, _, (_, _, indices) = model.encode(make_images())
    z_e = model.quant_conv(model.encoder(make_images())).detach().requires_grad_()
    model.quantize.show_usage = False  # LlamaGen's
    loss = model.quantize.train()(z_e)[1]
    weight_losses(config, loss).backward()
    found = {
        "indices": indices.flatten().tolist(),
        "reconstruction": digest(model.decode(quantized)),
    }
    return found | {"gradient": digest(z_e.grad)}


def record_gpt(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Logits of three rows, the last without a class; each class's most likely tokens, guided."""
    classes, grids = gpt_inputs(config)
    length = config["block_size"]
    positions = torch.arange(length)
    logits, _ = model(grids.flatten(1)[:, :-1], classes, input_pos=positions)
    found = {"logits": digest(logits)}
    if "n_kv_head" not in config:  # its cache has no grouped queries
        generate = import_module("autoregressive.models.generate").generate
        every = torch.arange(config["num_classes"])
        tokens = generate(model, every, length, cfg_scale=GUIDANCE, sample_logits=False)
        found["generated"] = tokens.tolist()
    return found


def gpt_inputs(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Classes (3,), the last of which is none, and grids of indices (3, h, w)."""
    side, codes = int(config["block_size"] ** 0.5), config["vocab_size"]
    grids = make_uniform("grids", [3, side, side]).add(1).mul(codes / 2).long().clamp(max=codes - 1)
    return torch.tensor([0, 3, config["num_classes"]]), grids


def main(checkout: str) -> None:
    sys.path[0] = checkout
    # Only their trainings need these.
    lightning = SimpleNamespace(LightningModule=nn.Module)
    unused: Callable[[Any], nn.Module] = lambda config: nn.Identity()  # noqa: E731
    sys.modules |= {
        "lightning": lightning,
        "pytorch_lightning": lightning,
        "main": SimpleNamespace(instantiate_from_config=unused),
    }
    # A GumbelVQ samples in eval mode as well. Without noise it takes the most likely code.
    torch.Tensor.exponential_ = lambda x: x.fill_(1)
    git = ("git", "-C", checkout)
    commit = subprocess.check_output((*git, "rev-parse", "HEAD"), text=True).strip()
    folder = Path(checkout).resolve().name
    repository = next(name for name in MODELS if name.endswith(f"/{folder}"))
    records = read_records() if FILE.exists() else {}
    for name, config in MODELS[repository].items():
        model = build(name, config).eval()
        state = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({key: make_weight(key, shape) for key, shape in state.items()})
        found = record_gpt(model, config) if "GPT" in name else record_tokenizer(model, config)
        same = (other for other in records if records[other]["state"] == state and other != name)
        found = {"config": config, "state": next(same, state)} | found
        records[name] = {"repository": repository, "commit": commit} | found
    lines = (f"{json.dumps(key)}:{json.dumps(x, separators=',:')}" for key, x in records.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
