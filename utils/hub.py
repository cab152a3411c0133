"""Share model folders on the Hugging Face Hub: push one with a model card, pull one."""

import argparse
from pathlib import Path
from typing import Any

from utils import cli
from utils.addresses import store_errors
from utils.files import check_unused, is_intact, read_json
from utils.provenance import CONFIG, find_model_folder, read_provenance

KINDS = {"VQVAE": "Image tokenizer (VQ-VAE)", "GPT": "GPT over the codebook indices of images"}
SHOWN = (
    *("image_size", "in_channels", "quantizer", "codebook_size", "latent_dim", "num_layers"),
    *("dim", "num_classes", "window_size"),
)
USE = {
    "VQVAE": "from vqvae import VQVAE\n\ntokenizer = VQVAE.from_pretrained(folder)\n"
    "images = tokenizer.decode(indices)  # (B, h, w) -> (B, C, H, W) in [-1, 1]",
    "GPT": "import torch\nfrom transformer import GPT\nfrom transformer.sampling import generate\n"
    "\ngpt = GPT.from_pretrained(folder)\n"
    "indices = generate(gpt, torch.zeros(8, dtype=torch.long))",
}


def model_card(folder: Path, title: str, licence: str) -> str:
    """README.md of a model folder: shape, classes, lineage, how to use it; YAML first."""
    config, stages = read_json(folder / CONFIG), read_provenance(folder).lineage
    kind = config.get("model", "")
    if kind not in KINDS:
        raise cli.UserError(f"{folder / CONFIG} describes no {' or '.join(KINDS)}; push a model")
    lines = ["---", f"license: {licence}", "tags: [image-generation]", "---", f"# {title}", ""]
    lines += [KINDS[kind], "", "| | |", "|---|---|"]
    lines += [f"| {name} | {config[name]} |" for name in SHOWN if config.get(name)]
    vocabulary = folder / "vocabulary.json"
    if vocabulary.is_file() and (names := read_json(vocabulary).get("class_names")):
        lines.append(f"| classes | {cli.first_few(names, limit=20)} |")
    lines += ["", "## Use", "", "```python", USE[kind], "```"]
    if stages:
        lines += ["", "## Commands that made it", "", "```bash"]
        lines += [*(stage.command for stage in stages), "```"]
    return "\n".join(lines) + "\n"


def import_hub() -> Any:
    with cli.user_error("this needs the package: pip install huggingface_hub", ImportError):
        import huggingface_hub
    return huggingface_hub


def push(flags: argparse.Namespace) -> None:
    folder = find_model_folder(Path(flags.folder))
    if not is_intact(folder):
        raise cli.UserError(f"{folder} is damaged or has no sha256.json; push what a script wrote")
    card, hub = model_card(folder, flags.repo, flags.license), import_hub()
    with store_errors(f"cannot push to {flags.repo}", lambda _: "log in by: hf auth login"):
        api = hub.HfApi()
        api.create_repo(flags.repo, private=not flags.public, exist_ok=True)
        # The checksums come last: they state that all else is there.
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=flags.repo)
        api.upload_folder(repo_id=flags.repo, folder_path=str(folder))
    print(f"pushed {folder} to https://huggingface.co/{flags.repo}")


def pull(flags: argparse.Namespace) -> None:
    folder = Path(flags.folder)
    check_unused(folder)
    with store_errors(f"cannot pull {flags.repo}", lambda _: "check its name; hf auth login"):
        import_hub().snapshot_download(flags.repo, local_dir=str(folder))
    find_model_folder(folder)
    if (folder / "sha256.json").is_file() and not is_intact(folder):
        raise cli.UserError(f"{folder} is damaged; pull it again into another folder")
    kind = read_json(folder / CONFIG).get("model", "")
    print(f"{KINDS.get(kind, 'a model')}: {folder}")


def main(flags: argparse.Namespace) -> None:
    (push if flags.action == "push" else pull)(flags)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.hub")
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("push", help="upload a model folder")
    one.add_argument("folder", help="model folder, or output folder of a training")
    one.add_argument("repo", help="user/name")
    one.add_argument("--license", default="other", help="licence on its card (default: other)")
    one.add_argument("--public", action="store_true", help="visible to all; default: private")
    one = actions.add_parser("pull", help="download a model folder")
    one.add_argument("repo", help="user/name")
    one.add_argument("folder", help="new folder")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
