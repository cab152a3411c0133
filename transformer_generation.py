"""Stage 4: draw new grids of codebook indices from a GPT."""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from transformer import GPT, Beyond, GPTConfig, Guidance, generate
from transformer.sampling import SCHEDULES
from utils import checkpoint, cli, processes, tracking
from utils.indices import IndicesMeta, check_writable, write_indices
from utils.table import Row
from utils.vocabulary import read_vocabulary


def main(arguments: argparse.Namespace) -> None:
    device = processes.pick_device(arguments.device)
    gpt = checkpoint.load_model(tracking.fetch(arguments.model_path), GPT, GPTConfig, device)
    vocabulary = read_vocabulary(tracking.fetch(arguments.vocabulary_path or str(gpt.folder)))
    vocabulary.check_model(gpt.model.config, gpt.folder)
    if arguments.unconditional:
        names = [""]
    else:
        names = arguments.labels or list(vocabulary.class_names) or [""]
    labels = [names[number % len(names)] for number in range(arguments.num_images)]
    prefix = torch.tensor(vocabulary.tokens(labels))
    origin = gpt.provenance
    size = arguments.size_in_cells or vocabulary.latent_dim
    guidance = cli.build(Guidance, arguments.guidance_scale, arguments.guidance_schedule)
    output_dir = Path(arguments.output_dir or cli.unused(gpt.home / "samples"))
    check_writable(output_dir)
    run = tracking.continue_run(output_dir.parent, arguments.run_id, origin.run_id)

    with run, tqdm(total=len(prefix), unit=" images", disable=None) as bar:
        try:
            indices = generate(
                gpt.model,
                prefix,
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                min_p=arguments.min_p,
                guidance=guidance,
                size=size,
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
            made_by=cli.command_line(),
        )
        rows = [Row(f"{number:05}.png", label, "") for number, label in enumerate(labels)]
        write_indices(output_dir, indices, rows, meta, text=arguments.text)
        run.folder(output_dir, output_dir.name)
        run.tag("gpt_run_id", origin.run_id)

    print(f"{len(indices):,} grids in {output_dir}")
    print(
        cli.next_command(
            *("vqvae/images_from_indexes.py", "--indexes_path", output_dir),
            *("--model_dir", f"runs:/{vocabulary.tokenizer_run_id}/checkpoints"),
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
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images (default: 0)")
    parser.add_argument("--text", action="store_true", help="also write indices.txt")
    cli.add_inference_flags(parser, batch_size=256)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
