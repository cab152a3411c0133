"""Stage 4: draw new grids of codebook indices from a GPT."""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from transformer import GPT, Beyond, GPTConfig, Guidance, complete, generate
from transformer.completion import SIDES, keep_side
from transformer.sampling import SCHEDULES
from utils import checkpoint, cli, figures, processes, tracking
from utils.indices import (
    IndicesMeta,
    check_writable,
    digest,
    lineage_of,
    read_indices,
    write_indices,
)
from utils.provenance import joined
from utils.table import Row
from utils.vocabulary import Vocabulary, read_vocabulary
from vqvae import VQVAE, VQVAEConfig

SHOWN = 48  # completions in the picture, at most
PICTURE = "completions.png"


class Given(NamedTuple):
    """What is to be completed: grids (N, h, w), the cells that stay (h, w), labels of the grids."""

    grids: torch.Tensor
    keep: torch.Tensor
    labels: list[str]
    path: Path  # of the indices


def read_mask(path: str, size: tuple[int, int]) -> torch.Tensor:
    """The cells that stay, (h, w), bool: where a picture, shrunk to the grid, is rather white.

    Raises:
        UserError: no picture, or nothing is left to draw.
    """
    try:
        with Image.open(path) as picture:
            mask = picture.convert("L").resize(size[::-1], Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError) as error:
        raise cli.UserError(
            f"--keep {path} is neither a side as top:0.5 nor a picture that can be read: {error}"
        ) from error
    keep = torch.from_numpy(np.asarray(mask) >= 128)
    if keep.all():
        raise cli.UserError(f"--keep {path} leaves nothing to draw; black cells are drawn")
    return keep


def read_given(arguments: argparse.Namespace, vocabulary: Vocabulary) -> Given:
    """The grids to complete, and which of their cells stay.

    Raises:
        UserError: indices of another tokenizer, or a --keep that says nothing.
    """
    path = tracking.fetch(arguments.complete)
    indices = read_indices(path, codebook_size=vocabulary.codebook_size)
    sha256 = indices.meta.tokenizer_sha256 if indices.meta is not None else ""
    if "" not in (sha256, vocabulary.tokenizer_sha256) and sha256 != vocabulary.tokenizer_sha256:
        raise cli.UserError(
            f"{path} belongs to the tokenizer {sha256[:12]}, but the GPT to "
            f"{vocabulary.tokenizer_sha256[:12]}; use indices and models of one tokenizer"
        )
    if arguments.keep.partition(":")[0] in SIDES:
        keep = cli.build(keep_side, arguments.keep, indices.latent_dim)
    else:
        keep = read_mask(arguments.keep, indices.latent_dim)
    grids = indices.tensor()[: arguments.num_images].long()
    labels = [row.label for row in indices.rows[: arguments.num_images]]
    times = arguments.variations
    return Given(
        grids.repeat_interleave(times, dim=0),
        keep,
        [label for label in labels for _ in range(times)],
        path,
    )


def picture_of(given: Given, drawn: torch.Tensor, tokenizer: VQVAE) -> Image.Image:
    """Given (the rest grey), drawn and original, side by side, of the first images."""
    device = tokenizer.quantizer.share.device
    with torch.inference_mode():
        original, completed = (
            tokenizer.decode(grids[:SHOWN].long().to(device)) for grids in (given.grids, drawn)
        )
    keep = given.keep.to(device, original.dtype)[None, None]
    keep = torch.nn.functional.interpolate(keep, size=original.shape[2:])
    return figures.grid(torch.cat([original * keep, completed, original], dim=3))


def main(arguments: argparse.Namespace) -> None:
    device = processes.pick_device(arguments.device)
    gpt = checkpoint.load_model(tracking.fetch(arguments.model_path), GPT, GPTConfig, device)
    vocabulary = read_vocabulary(tracking.fetch(arguments.vocabulary_path or str(gpt.folder)))
    vocabulary.check_model(gpt.model.config, gpt.folder)
    if arguments.complete and arguments.size_in_cells:
        raise cli.UserError("--size_in_cells is that of the given grids; leave it away here")
    if not arguments.complete and max(arguments.candidates, arguments.variations) > 1:
        raise cli.UserError("--candidates and --variations are for --complete; add it")
    given = read_given(arguments, vocabulary) if arguments.complete else None
    tokenizer = None
    if arguments.model_dir:
        address = tracking.fetch(arguments.model_dir)
        tokenizer = checkpoint.load_model(address, VQVAE, VQVAEConfig, device)
    if given is not None:
        labels = [""] * len(given.grids) if arguments.unconditional else given.labels
        size = tuple(given.keep.shape)
    else:
        names = arguments.labels or list(vocabulary.class_names) or [""]
        names = [""] if arguments.unconditional else names
        labels = [names[number % len(names)] for number in range(arguments.num_images)]
        size = arguments.size_in_cells or vocabulary.latent_dim
    prefix = torch.tensor(vocabulary.tokens(labels))
    origin = gpt.provenance
    output_dir = Path(arguments.output_dir or cli.unused(gpt.home / "samples"))
    check_writable(output_dir)
    inputs = {arguments.model_path: gpt.sha256, arguments.vocabulary_path: gpt.sha256}
    if given is not None:
        inputs[arguments.complete] = digest(given.path)
    if tokenizer is not None:
        inputs[arguments.model_dir] = tokenizer.sha256
    run = tracking.continue_run(
        output_dir.parent,
        arguments.run_id,
        origin.run_id,
        stage="samples",
        inputs={path: sha256 for path, sha256 in inputs.items() if path},
        upstream=joined(gpt.lineage, () if given is None else lineage_of(given.path)),
    )
    draw = partial(
        generate if given is None else partial(complete, candidates=arguments.candidates),
        gpt.model,
        prefix,
        **({"size": size} if given is None else {"given": given.grids, "keep": given.keep}),
    )
    tries = 1 if given is None else arguments.candidates

    with run, tqdm(total=len(prefix) * tries, unit=" images", disable=None) as bar:
        try:
            indices = draw(
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                min_p=arguments.min_p,
                guidance=Guidance(arguments.guidance_scale, arguments.guidance_schedule),
                beyond=Beyond(arguments.beyond),
                seed=arguments.seed,
                batch_size=arguments.batch_size,
                progress=bar.update,
            )
        except ValueError as error:
            raise cli.UserError(str(error)) from error
        meta = IndicesMeta(
            codebook_size=vocabulary.codebook_size,
            latent_dim=size,
            tokenizer_sha256=vocabulary.tokenizer_sha256,
            tokenizer_run_id=vocabulary.tokenizer_run_id,
            gpt_run_id=origin.run_id,
            lineage=run.lineage,
        )
        rows = [Row(f"{number:05}.png", label, "") for number, label in enumerate(labels)]
        write_indices(output_dir, indices, rows, meta, text=arguments.text)
        if given is not None and tokenizer is not None:
            picture = picture_of(given, indices, tokenizer.model)
            picture.save(output_dir / PICTURE)
            print(f"given, drawn and original in {output_dir / PICTURE}")
        run.folder(output_dir, output_dir.name)

    print(f"{len(indices):,} grids in {output_dir}")
    print(
        cli.next_command(
            *("vqvae/images_from_indexes.py", "--indexes_path", output_dir),
            "--model_dir",
            arguments.model_dir or f"runs:/{vocabulary.tokenizer_run_id}/checkpoints",
        )
    )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--model_path", required=True, help="GPT: a folder, or runs:/<run id>/checkpoints"
    )
    parser.add_argument(
        "--vocabulary_path", help="vocabulary.json of the GPT (default: beside the model)"
    )
    parser.add_argument("--run_id", help="MLflow run to log to (default: the GPT's)")
    parser.add_argument(
        "--output_dir", help="indices folder to write (default: samples beside the GPT)"
    )
    parser.add_argument(
        "--num_images", type=cli.positive, default=64, help="how many (default: 64)"
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="classes, in turn (default: all of them)"
    )
    parser.add_argument(
        "--unconditional", action="store_true", help='draw images of "no class" in particular'
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="below 1 the likely gets likelier"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="draw from the k likeliest indices (default: all)"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the likeliest that reach p together"
    )
    parser.add_argument(
        "--min_p",
        type=float,
        default=0.0,
        help="draw from those with this share of the likeliest one's probability (default: all)",
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="above 1 the class is pronounced (classifier-free guidance; default: 1, none)",
    )
    parser.add_argument(
        "--guidance_schedule",
        choices=SCHEDULES,
        default="constant",
        help="how the scale rises from 1 over the cells (default: constant, it does not)",
    )
    parser.add_argument(
        "--size_in_cells",
        type=cli.height_and_width,
        metavar="H,W",
        help="size of the grids, larger than trained if need be (default: as trained)",
    )
    parser.add_argument(
        "--beyond",
        choices=[str(way) for way in Beyond],
        default=str(Beyond.SLIDE),
        help="positions in larger grids: slide a crop of the trained size along (default); go on; "
        "or compress them into the trained range",
    )
    parser.add_argument(
        "--complete", metavar="INDICES", help="indices whose first --num_images are completed"
    )
    parser.add_argument(
        "--keep",
        default="top:0.5",
        metavar="X",
        help="what stays of them: top, bottom, left or right and a share (default: top:0.5), or a "
        "picture that is white there",
    )
    parser.add_argument(
        "--candidates",
        type=cli.positive,
        default=1,
        help="draws for each completion, to take the one that fits the given cells behind best",
    )
    parser.add_argument(
        "--variations", type=cli.positive, default=1, help="completions of each image (default: 1)"
    )
    parser.add_argument("--model_dir", help="tokenizer, to show completions beside what was given")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images (default: 0)")
    parser.add_argument("--text", action="store_true", help="also write indices.txt")
    cli.add_inference_flags(parser, batch_size=256)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
