"""Stage 4: draw new grids of codebook indices from a GPT."""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from transformer import GPT, Beyond, GPTConfig, Guidance, complete, generate, make_prefix
from transformer.completion import SIDES, keep_side
from transformer.sampling import SCHEDULES
from utils import checkpoint, cli, figures, processes, tracking
from utils.data.conditions import Condition, take_conditions, write_conditions
from utils.data.decoding import read_mask
from utils.data.index_folder import allocate, new_folder
from utils.data.indices import IndicesMeta, check_writable, digest, lineage_of, read_indices
from utils.data.table import Row
from utils.data.vocabulary import Vocabulary, read_vocabulary
from utils.provenance import joined
from vqvae import VQVAE, VQVAEConfig

SHOWN = 48  # completions in the picture, at most
PICTURE = "completions.png"


class Given(NamedTuple):
    """What is to be completed: grids (N, h, w[, depth]), the cells that stay (h, w), labels."""

    grids: torch.Tensor
    keep: torch.Tensor
    labels: list[str]


def read_given(arguments: argparse.Namespace, vocabulary: Vocabulary) -> Given:
    """The grids to complete, and which of their cells stay.

    Raises:
        UserError: indices of another tokenizer, or a --keep that says nothing.
    """
    path = tracking.fetch(arguments.complete)
    indices = read_indices(path, codebook_size=vocabulary.codebook_size, depth=vocabulary.depth)
    sha256 = indices.meta.tokenizer_sha256 if indices.meta is not None else ""
    if "" not in (sha256, vocabulary.tokenizer_sha256) and sha256 != vocabulary.tokenizer_sha256:
        raise cli.UserError(
            f"{path} belongs to the tokenizer {sha256[:12]}, but the GPT to "
            f"{vocabulary.tokenizer_sha256[:12]}; use indices and models of one tokenizer"
        )
    if arguments.keep.partition(":")[0] in SIDES:
        keep = cli.build(keep_side, arguments.keep, indices.latent_dim)
    else:
        keep = torch.from_numpy(read_mask(arguments.keep, indices.latent_dim))
    grids = indices.tensor()[: arguments.num_images].long()
    labels = [row.label for row in indices.rows[: arguments.num_images]]
    times = arguments.variations
    return Given(
        grids.repeat_interleave(times, dim=0),
        keep,
        [label for label in labels for _ in range(times)],
    )


def read_conditions(
    arguments: argparse.Namespace, vocabulary: Vocabulary, config: GPTConfig, count: int
) -> Condition:
    """What `count` images are drawn to: --conditions in turn, or those of the completed images.

    Raises:
        UserError: conditions for a GPT that takes none, or of another kind; none for a GPT that
            never had to do without.
    """
    if vocabulary.condition is None:
        if arguments.conditions:
            raise cli.UserError(
                f"the GPT in {arguments.model_path} takes no conditions; leave --conditions away"
            )
        return Condition(None, [])
    if arguments.conditions or arguments.complete:
        path = tracking.fetch(arguments.conditions or arguments.complete)
        conditions = take_conditions(path, vocabulary.condition, alone=bool(arguments.conditions))
        return conditions.in_turn(count, times=arguments.variations)
    if config.condition_dropout == 0:
        raise cli.UserError(
            "this GPT draws nothing without a condition (--condition_dropout 0); give an indices "
            "folder that has some by --conditions"
        )
    grid = vocabulary.condition.latent_dim
    return Condition(torch.full((count, *grid), config.no_condition), [])


def picture_of(given: Given, drawn: torch.Tensor, tokenizer: VQVAE) -> Image.Image:
    """Given (the rest grey), drawn and original, side by side, of the first images."""
    device = next(tokenizer.parameters()).device
    with torch.inference_mode():
        original, completed = (
            tokenizer.decode(grids[:SHOWN].long().to(device)) for grids in (given.grids, drawn)
        )
    keep = given.keep.to(device, original.dtype)[None, None]
    keep = torch.nn.functional.interpolate(keep, size=original.shape[2:])
    return figures.grid(torch.cat([original * keep, completed, original], dim=3))


def main(arguments: argparse.Namespace) -> None:
    device = processes.pick_device(arguments.device)
    if arguments.compile and device.type != "cuda":
        raise cli.UserError(f"--compile is for a CUDA device, here is {device.type}; leave it away")
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
    count = arguments.num_images if given is None else len(given.grids)
    condition = read_conditions(arguments, vocabulary, gpt.model.config, count)
    if given is not None:
        labels, size = given.labels, tuple(given.keep.shape)
    else:
        names = arguments.labels or list(vocabulary.class_names) or [""]
        if condition.rows and not arguments.labels:
            names = [row.label for row in condition.rows]
        names = [""] if arguments.unconditional else names
        labels = [names[number % len(names)] for number in range(count)]
        size = arguments.size_in_cells or vocabulary.latent_dim
    told = [""] * len(labels) if arguments.unconditional else labels
    prefix = make_prefix(torch.tensor(vocabulary.tokens(told)), condition.grids)
    origin = gpt.provenance
    output_dir = Path(arguments.output_dir or cli.unused(gpt.home / "samples"))
    check_writable(output_dir)
    inputs = {arguments.model_path: gpt.sha256, arguments.vocabulary_path: gpt.sha256}
    given_as = filter(None, (arguments.complete, arguments.conditions))
    folders = {path: tracking.fetch(path) for path in given_as}
    inputs |= {path: digest(folder) for path, folder in folders.items()}
    if tokenizer is not None:
        inputs[arguments.model_dir] = tokenizer.sha256
    run = tracking.continue_run(
        output_dir.parent,
        arguments.run_id,
        origin.run_id,
        stage="samples",
        part=output_dir.name,
        inputs={path: sha256 for path, sha256 in inputs.items() if path},
        upstream=joined(gpt.lineage, *map(lineage_of, folders.values())),
    )
    meta = IndicesMeta(
        codebook_size=vocabulary.codebook_size,
        latent_dim=size,
        tokenizer_sha256=vocabulary.tokenizer_sha256,
        tokenizer_run_id=vocabulary.tokenizer_run_id,
        gpt_run_id=origin.run_id,
        lineage=run.lineage,
        depth=vocabulary.depth,
        condition=vocabulary.condition if condition.rows else None,
    )
    rows = [Row(f"{number:05}.png", label, "") for number, label in enumerate(labels)]
    for number, row in enumerate(condition.rows):
        rows[number] = rows[number]._replace(condition_path=row.condition_path or row.image_path)
    shape = size if vocabulary.depth == 1 else (*size, vocabulary.depth)
    tries = 1 if given is None else arguments.candidates

    with run, tqdm(total=len(prefix) * tries, unit=" images", disable=None) as bar:
        with new_folder(output_dir, rows, meta, text=arguments.text) as folder:
            indices = torch.from_numpy(
                allocate(folder / "indices.npy", (len(rows), *shape), vocabulary.codebook_size)
            )
            if given is None:  # rows go to the disk as they are drawn, however tall a grid is
                draw = partial(generate, size=size, out=indices)
            else:
                draw = partial(complete, given=given.grids, keep=given.keep, candidates=tries)
            try:
                drawn = draw(
                    gpt.model,
                    prefix,
                    temperature=arguments.temperature,
                    top_k=arguments.top_k,
                    top_p=arguments.top_p,
                    min_p=arguments.min_p,
                    guidance=Guidance(arguments.guidance_scale, arguments.guidance_schedule),
                    beyond=Beyond(arguments.beyond),
                    compiled=arguments.compile,
                    seed=arguments.seed,
                    batch_size=arguments.batch_size,
                    progress=bar.update,
                )
            except ValueError as error:
                raise cli.UserError(str(error)) from error
            if condition.rows:
                write_conditions(folder, condition.grids, vocabulary.condition.codebook_size)
            if given is not None:
                indices.copy_(drawn)
                if tokenizer is not None:
                    picture_of(given, drawn, tokenizer.model).save(folder / PICTURE)
        run.folder(output_dir, output_dir.name)

    if given is not None and tokenizer is not None:
        print(f"given, drawn and original in {output_dir / PICTURE}")
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
        "--conditions",
        metavar="INDICES",
        help="indices folder whose conditions, or grids if it has none, are what images are drawn "
        "to, in turn (default: those of --complete, or none)",
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
    parser.add_argument(
        "--compile",
        action="store_true",
        help="one compiled CUDA graph a step, on a GPU; pays for many images",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images (default: 0)")
    parser.add_argument("--text", action="store_true", help="also write indices.txt")
    cli.add_inference_flags(parser, batch_size=256)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
