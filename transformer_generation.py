"""Stage 4: draw new grids of codebook indices from a GPT."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from transformer import (
    GPT,
    GPTConfig,
    Guidance,
    PositionExtension,
    SamplingParams,
    complete,
    generate,
    later_known_mask,
    make_prefix,
)
from transformer.sampling import SCHEDULES
from utils import addresses, cli, distributed, figures, tracking
from utils.data.given import Given, read_given
from utils.data.index_dataset import Conditions, load_conditions, write_conditions
from utils.data.indices import IndicesMeta, allocate, check_writable, digest, lineage_of, new_folder
from utils.data.sources import Row
from utils.data.vocabulary import Vocabulary, find_vocabulary, read_vocabulary
from utils.files import sha256
from utils.model_folder import load_model
from utils.provenance import LoadedModel, joined
from vqvae import VQVAE

SHOWN = 48  # completions in the picture, at most
PICTURE = "completions.png"
KEEP = "top:0.5"


def check_flags(arguments: argparse.Namespace, device: torch.device) -> None:
    """Refuse flags that do not go together.

    Raises:
        UserError: one of them would do nothing.
    """
    if arguments.compile and device.type != "cuda":
        raise cli.UserError(f"--compile is for a CUDA device, here is {device.type}; omit it")
    if arguments.complete and arguments.latent_dim:
        raise cli.UserError("--latent_dim is that of the given grids; omit it with --complete")
    if not arguments.complete and max(arguments.candidates, arguments.variations) > 1:
        raise cli.UserError("--candidates and --variations are for --complete; add it")
    if not arguments.complete and arguments.mask:
        raise cli.UserError("--mask is for --complete; add it")
    if arguments.labels and (arguments.complete or arguments.unconditional):
        other = (
            "--complete, whose images have their own" if arguments.complete else "--unconditional"
        )
        raise cli.UserError(f"--labels does not go with {other}; omit one of them")


def check_guidance(arguments: argparse.Namespace, config: GPTConfig) -> None:
    """Refuse guidance where there is nothing to compare, and warn of words never learned.

    Raises:
        UserError: the GPT knows neither classes nor conditions.
    """
    guided = arguments.guidance_scale != 1
    if guided and not config.num_classes and config.condition_latent_dim is None:
        raise cli.UserError(
            f"the GPT in {arguments.model_path} knows neither classes nor conditions, so that "
            "--guidance_scale has nothing to compare; omit it"
        )
    untrained = []
    if config.num_classes and config.class_dropout == 0 and (guided or arguments.unconditional):
        untrained.append("class (--class_dropout 0)")
    if config.condition_latent_dim is not None and config.condition_dropout == 0 and guided:
        untrained.append("condition (--condition_dropout 0)")
    if untrained:
        print(
            f"warning: this GPT was hardly trained without a {' or '.join(untrained)}, which "
            "--guidance_scale and --unconditional ask of it; expect poor samples",
            file=sys.stderr,
        )


def read_conditions(
    arguments: argparse.Namespace, vocabulary: Vocabulary, config: GPTConfig, count: int
) -> Conditions:
    """What `count` images are drawn to: --conditions in turn, or those of the completed images.

    Raises:
        UserError: conditions for a GPT that takes none, or of another kind; none for a GPT that
            never had to do without.
    """
    if vocabulary.condition is None:
        if arguments.conditions:
            raise cli.UserError(
                f"the GPT in {arguments.model_path} takes no conditions; omit --conditions"
            )
        return Conditions(None, [])
    if arguments.conditions or arguments.complete:
        path = addresses.fetch(arguments.conditions or arguments.complete)
        conditions = load_conditions(
            path, vocabulary.condition, allow_images=bool(arguments.conditions)
        )
        return conditions.cycle(count, repeats=arguments.variations)
    if config.condition_dropout == 0:
        raise cli.UserError(
            "this GPT draws nothing without a condition (--condition_dropout 0); give an indices "
            "folder that has some by --conditions"
        )
    grid = vocabulary.condition.latent_dim
    return Conditions(torch.full((count, *grid), config.no_condition), [])


def choose_labels(
    arguments: argparse.Namespace, vocabulary: Vocabulary, condition: Conditions, count: int
) -> list[str]:
    """Labels of `count` images: --labels in turn, or those of the conditions, or all classes."""
    names = arguments.labels or list(vocabulary.class_names) or [""]
    if condition.rows and not arguments.labels:
        names = [row.label for row in condition.rows]
    if arguments.unconditional:
        names = [""]
    return [names[number % len(names)] for number in range(count)]


def read_inputs(
    arguments: argparse.Namespace, gpt: LoadedModel, tokenizer_sha256: str
) -> dict[str, str]:
    """What is read, by address: the SHA-256 of each."""
    inputs = {arguments.model_path: gpt.sha256}
    if arguments.vocabulary_path:
        file = find_vocabulary(addresses.fetch(arguments.vocabulary_path))
        if file.resolve().parent == gpt.folder.resolve():  # a part of the model, and goes with it
            inputs[arguments.vocabulary_path] = gpt.sha256
        else:
            inputs[str(file)] = sha256(file)
    for address in filter(None, (arguments.complete, arguments.conditions)):
        inputs[address] = digest(addresses.fetch(address))
    if arguments.model_dir:
        inputs[arguments.model_dir] = tokenizer_sha256
    return inputs


def picture_of(given: Given, drawn: torch.Tensor, tokenizer: VQVAE) -> Image.Image:
    """Given (the rest grey), drawn and original, side by side, of the first images."""
    device = next(tokenizer.parameters()).device
    with torch.inference_mode():
        original, completed = (
            tokenizer.decode(grids[:SHOWN].long().to(device)) for grids in (given.grids, drawn)
        )
    keep = given.keep.to(device, original.dtype)[None, None]
    keep = F.interpolate(keep, size=original.shape[2:])
    return figures.grid(torch.cat([original * keep, completed, original], dim=3))


def main(arguments: argparse.Namespace) -> None:
    device = distributed.pick_device(arguments.device)
    check_flags(arguments, device)
    guidance = cli.build(Guidance, arguments.guidance_scale, arguments.guidance_schedule)
    params = cli.read_flags(SamplingParams, arguments)
    gpt = load_model(arguments.model_path, GPT, device)
    if distributed.pick_precision(arguments.precision, device, on_cpu="fp32") == "bf16":
        gpt.model.to(torch.bfloat16)
    vocabulary = read_vocabulary(addresses.fetch(arguments.vocabulary_path or str(gpt.folder)))
    vocabulary.check_model(gpt.model.config, gpt.folder)
    check_guidance(arguments, gpt.model.config)
    tokenizer = None
    if arguments.model_dir:
        address = addresses.fetch(arguments.model_dir)
        tokenizer = load_model(address, VQVAE, device)
        vocabulary.check_tokenizer(tokenizer.sha256, tokenizer.folder, tokenizer.model.config)

    given = None
    if arguments.complete:
        path, keep = addresses.fetch(arguments.complete), arguments.mask or KEEP
        given = read_given(path, vocabulary, keep, arguments.num_images, arguments.variations)
        if arguments.candidates > 1 and not later_known_mask(given.keep).any():
            raise cli.UserError(
                f"--candidates are ranked by given cells behind drawn ones, but --mask {keep} "
                "leaves none there; omit --candidates"
            )
    count = arguments.num_images if given is None else len(given.grids)
    condition = read_conditions(arguments, vocabulary, gpt.model.config, count)
    if given is None:
        labels = choose_labels(arguments, vocabulary, condition, count)
        size = arguments.latent_dim or vocabulary.latent_dim
    else:
        labels, size = given.labels, tuple(given.keep.shape)
    cli.build(
        gpt.model.grid_positions, size, PositionExtension(arguments.position_extension)
    )  # or it cannot be drawn
    classes = vocabulary.tokens([""] * count if arguments.unconditional else labels)
    prefix = make_prefix(torch.tensor(classes), condition.grids)

    output_dir = Path(arguments.output_dir or cli.unused(gpt.home / "samples"))
    check_writable(output_dir)
    sources = [addresses.fetch(x) for x in (arguments.complete, arguments.conditions) if x]
    run = tracking.continue_run(
        output_dir.parent,
        arguments.run_id,
        gpt.provenance.run_id,
        stage="samples",
        part=output_dir.name,
        inputs=read_inputs(arguments, gpt, tokenizer.sha256 if tokenizer else ""),
        upstream=joined(gpt.lineage, *map(lineage_of, sources)),
    )
    meta = IndicesMeta(
        codebook_size=vocabulary.codebook_size,
        latent_dim=size,
        tokenizer_sha256=vocabulary.tokenizer_sha256,
        tokenizer_run_id=vocabulary.tokenizer_run_id,
        gpt_run_id=gpt.provenance.run_id,
        lineage=run.lineage,
        depth=vocabulary.depth,
        condition=vocabulary.condition if condition.rows else None,
    )
    rows = [Row(f"{number:05}.png", label, "") for number, label in enumerate(labels)]
    for number, row in enumerate(condition.rows):
        rows[number] = rows[number]._replace(condition_path=row.condition_path or row.image_path)

    total = count * (1 if given is None else arguments.candidates)
    with run, tqdm(total=total, unit=" images", disable=None) as bar:
        with new_folder(output_dir, rows, meta, text=arguments.text) as folder:
            indices = torch.from_numpy(
                allocate(folder / "indices.npy", (count, *meta.shape), vocabulary.codebook_size)
            )
            function: Callable[..., torch.Tensor] = generate if given is None else complete
            draw = partial(
                function,
                gpt.model,
                prefix,
                params=params,
                guidance=guidance,
                position_extension=PositionExtension(arguments.position_extension),
                compiled=arguments.compile,
                seed=arguments.seed,
                batch_size=arguments.batch_size,
                progress=bar.update,
            )
            if given is None:  # rows go to the disk as they are drawn, however tall a grid is
                draw(size=size, out=indices)
            else:
                completed = draw(
                    known=given.grids, known_mask=given.keep, candidates=arguments.candidates
                )
                indices.copy_(completed)
                if tokenizer is not None:
                    picture_of(given, completed, tokenizer.model).save(folder / PICTURE)
            if condition.rows:
                write_conditions(folder, condition.grids, vocabulary.condition.codebook_size)
        run.folder(output_dir, output_dir.name)

    if given is not None:
        there = (
            f"in {output_dir / PICTURE}" if tokenizer else "are shown with --model_dir TOKENIZER"
        )
        print(f"given, drawn and original {there}")
    print(f"{count:,} grids in {output_dir}")
    known = vocabulary.tokenizer_run_id
    print(
        cli.next_command(
            *("vqvae/images_from_indexes.py", "--indexes_path", output_dir, "--model_dir"),
            arguments.model_dir or (f"runs:/{known}/checkpoints" if known else "TOKENIZER"),
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
    cli.add_flags(parser, SamplingParams, "distribution")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="classifier-free guidance: above 1 samples follow class and condition more closely "
        "(default: 1, none)",
    )
    parser.add_argument(
        "--guidance_schedule",
        choices=SCHEDULES,
        default="constant",
        help="how the scale rises from 1 over the cells (default: constant, it does not)",
    )
    parser.add_argument(
        "--latent_dim",
        type=cli.height_and_width,
        metavar="H,W",
        help="size of the grids, larger than trained if need be (default: as trained)",
    )
    parser.add_argument(
        "--position_extension",
        choices=[str(way) for way in PositionExtension],
        default=str(PositionExtension.SLIDE),
        help="positions in larger grids: slide a crop of the trained size along (default); go on; "
        "or compress them into the trained range",
    )
    parser.add_argument(
        "--complete", metavar="INDICES", help="indices whose first --num_images are completed"
    )
    parser.add_argument(
        "--mask",
        metavar="SIDE:SHARE",
        help="what stays of them: top, bottom, left or right and a share, or a picture that is "
        f"white there (default: {KEEP})",
    )
    parser.add_argument(
        "--candidates",
        type=cli.positive,
        default=1,
        help="draws per image; the one under which the later given cells are most likely is kept "
        "(default: 1)",
    )
    parser.add_argument(
        "--variations", type=cli.positive, default=1, help="completions of each image (default: 1)"
    )
    parser.add_argument("--model_dir", help="tokenizer, to show completions beside what was given")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="bf16: weights and cache in bfloat16; auto: on a GPU that has it (default: auto)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="steps as compiled CUDA graphs, on a GPU; pays for many images",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images (default: 0)")
    parser.add_argument("--text", action="store_true", help="also write indices.txt")
    cli.add_inference_flags(parser, batch_size=256)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
