"""Stage 4: sample new grids of codebook indices from a GPT, or complete grids."""

from utils.cli import start_script

if __name__ == "__main__":
    start_script()

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from transformer import GPT, GPTConfig, PositionExtension, SamplingParams, make_prefix, sampling
from utils import addresses, cli, distributed, figures, tracking
from utils.data import conditioning, indices
from utils.data.captions import encode
from utils.data.index_dataset import CONDITION
from utils.data.masks import REGIONS, KnownPixels, known_positions, read_masks
from utils.data.sources import Row
from utils.data.vocabulary import Vocabulary, find_vocabulary, read_vocabulary
from utils.data.workers import available_memory
from utils.files import choose_output_dir, sha256
from utils.progress import ProgressBar, warn
from utils.provenance import LoadedModel, joined, load_model
from vqvae import VQVAE

SHOWN = 48  # completions in the picture, at most
PICTURE = "completions.png"
MASK = "top:0.5"
BATCH_SIZE = 256


class Known(NamedTuple):
    """Grids to complete."""

    grids: Tensor  # (N, h, w), or (N, h, w, depth) for a depth above 1, int64
    masks: Tensor  # (N, h, w), bool, where their indices are kept
    rows: list[Row]
    pixels: KnownPixels


def read_known(arguments: argparse.Namespace, vocabulary: Vocabulary) -> Known:
    """The first grids of --complete, each --variations times, with the known mask of --mask."""
    path, text = addresses.fetch(arguments.complete), arguments.mask or MASK
    found = indices.read_indices(
        path,
        latent_dim=None if path.is_dir() else vocabulary.latent_dim,  # a folder holds its own
        codebook_size=vocabulary.codebook_size,
        depth=vocabulary.depth,
    )
    vocabulary.check_tokenizer(found.meta.tokenizer_sha256, path)
    count, times = arguments.num_images, arguments.variations
    rows = [row for row in found.rows[:count] for _ in range(times)]
    paths = [row.image_path or f"{number:05}.png" for number, row in enumerate(rows)]
    pixels = read_masks(text, paths, found.meta.latent_dim)
    masks = known_positions(pixels, found.meta.latent_dim).expand(len(rows), -1, -1)
    if arguments.candidates > 1 and not sampling.later_known_mask(masks).any():
        raise cli.UserError(
            f"--candidates are ranked by known indices behind sampled ones, but --mask {text} "
            "leaves none there; omit --candidates"
        )
    grids = found.grids[:count].long().repeat_interleave(times, dim=0)
    return Known(grids, masks, rows, KnownPixels(pixels, paths))


def check_flags(flags: argparse.Namespace, config: GPTConfig, on_gpu: bool) -> None:
    """Refuse flags that would have no effect; warn of embeddings that were never trained."""
    guided, gpt, error = flags.guidance_scale != 1, f"the GPT in {flags.model_path}", ""
    told = [f"--{name}" for name in ("labels", "prompt", "embeddings") if getattr(flags, name)]
    if flags.compile and not on_gpu:
        error = "--compile needs a CUDA device; omit it"
    elif flags.complete and flags.latent_dim:
        error = "--complete has grids of its own size; omit --latent_dim"
    elif flags.variations > 1 and not flags.complete:
        error = "--variations needs --complete; add it"
    elif flags.mask and not flags.complete:
        error = "--mask needs --complete; add it"
    elif flags.class_frequencies and (
        flags.labels or flags.unconditional or flags.complete or flags.conditions
    ):
        error = "--class_frequencies cannot be combined with --labels, --unconditional, "
        error += "--complete or --conditions; omit it"
    elif told and flags.unconditional:
        error = f"{told[0]} cannot be combined with --unconditional; omit one of them"
    elif flags.prompt and not config.caption_length:
        error = f"{gpt} was trained without captions; omit --prompt"
    elif flags.guidance_parts and (flags.guide_path or not guided):
        error = "--guidance_parts needs --guidance_scale without --guide_path; omit it"
    elif flags.guide_path and not guided:
        error = "--guide_path has no effect without --guidance_scale; add it, as 2"
    elif guided and not flags.guide_path and config.prefix_length == 1 > config.num_classes:
        error = f"{gpt} has neither classes nor conditions, so --guidance_scale needs a weaker GPT "
        error += "by --guide_path; add it, or omit the scale"
    if error:
        raise cli.UserError(error)
    untrained, guided = [], guided and not flags.guide_path
    for part in config.prefix_parts:
        drops = guided or (flags.unconditional and part.name != "condition")
        if part.null and part.dropout == 0 and drops:
            untrained.append(f"{part.name} (--{part.name}_dropout 0)")
    if untrained:
        warn(
            f"this GPT was hardly trained without a {' or '.join(untrained)}, which "
            "--guidance_scale and --unconditional need; expect poor samples"
        )


def choose_batch_size(
    model: GPT, guide: GPT | None, size: tuple[int, int], params: SamplingParams
) -> int:
    """`BATCH_SIZE`, or so many images that caches and logits take half of the free memory."""
    device, copies = model.head.weight.device, 1 + (params.guidance_scale != 1)
    free = available_memory()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    caches = [x.make_cache(1, size).nbytes for x in (model, guide or model)[:copies]]
    logits = copies * 32 * model.config.codebook_size  # float32, and what filters and sorts take
    return max(1, min(BATCH_SIZE, free // 2 // (sum(caches) + logits)))


def read_inputs(
    flags: argparse.Namespace,
    gpt: LoadedModel,
    guide: LoadedModel | None,
    tokenizer: LoadedModel | None,
) -> dict[str, str]:
    """What is read, by address: the SHA-256 of each."""
    models = {flags.model_path: gpt, flags.guide_path: guide, flags.model_dir: tokenizer}
    inputs = {address: model.sha256 for address, model in models.items() if model is not None}
    if flags.vocabulary_path:
        file = find_vocabulary(addresses.fetch(flags.vocabulary_path))
        is_part = file.resolve().parent == gpt.folder.resolve()
        inputs[flags.vocabulary_path] = gpt.sha256 if is_part else sha256(file)
    for address in filter(None, (flags.complete, flags.conditions, flags.embeddings)):
        inputs[address] = indices.digest(addresses.fetch(address))
    return inputs


def sample(
    arguments: argparse.Namespace,
    group: distributed.Distributed,
    model: GPT,
    prefix: Tensor,
    known: Known | None,
    size: tuple[int, int],
    out: Tensor,
    **options: Any,
) -> None:
    """Fill `out` with the grids that the flags ask for."""
    settings = model, options["guide"], size, options["params"]
    samples = len(prefix) * arguments.candidates
    chosen = arguments.batch_size or choose_batch_size(*settings)
    # All processes take the smallest that one of them has memory for, as they share the batches.
    options["batch_size"] = group.batch_size(samples, -group.all_reduce_max(-chosen))
    if known is None and arguments.candidates == 1:  # row by row, for grids of any height
        sampling.generate(model, prefix, size=size, out=out, **options)
        return
    options["candidates"] = arguments.candidates
    if known is None:
        out.copy_(sampling.generate_likeliest(model, prefix, size=size, **options))
    else:
        out.copy_(sampling.complete(model, prefix, known.grids, known.masks, **options))


@torch.inference_mode()
def picture_of(known: Known, completed: Tensor, tokenizer: VQVAE) -> Image.Image:
    """Known (the rest grey), completed and original, side by side, of the first images."""
    device = next(tokenizer.parameters()).device
    original, decoded = (
        tokenizer.decode(grids[:SHOWN].long().to(device)) for grids in (known.grids, completed)
    )
    masks = known.masks[:SHOWN, None].to(device, original.dtype)
    masks = F.interpolate(masks, size=original.shape[2:])
    return figures.grid(torch.cat([original * masks, decoded, original], dim=3))


def load_models(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[LoadedModel, LoadedModel | None, LoadedModel | None, Vocabulary]:
    """GPT, guide, tokenizer and vocabulary; a UserError if they do not belong together."""
    gpt = load_model(arguments.model_path, GPT, device)
    config = gpt.model.config
    check_flags(arguments, config, on_gpu=device.type == "cuda")
    guide = load_model(arguments.guide_path, GPT, device) if arguments.guide_path else None
    if guide is not None:
        cli.build_or_error(config.check_guide, guide.model.config)
    if distributed.pick_precision(arguments.precision, device, on_cpu="fp32") == "bf16":
        for model in (gpt, guide) if guide else (gpt,):
            model.model.to(torch.bfloat16)
    vocabulary = read_vocabulary(addresses.fetch(arguments.vocabulary_path or str(gpt.folder)))
    vocabulary.check_model(config, gpt.folder)
    if guide is not None:
        vocabulary.check_guide(read_vocabulary(guide.folder), guide.folder)
    tokenizer = None
    if arguments.model_dir:
        tokenizer = load_model(addresses.fetch(arguments.model_dir), VQVAE, device)
        vocabulary.check_tokenizer(tokenizer.sha256, tokenizer.folder, tokenizer.model.config)
    return gpt, guide, tokenizer, vocabulary


def main(arguments: argparse.Namespace) -> None:
    group = distributed.init_distributed(arguments.device, arguments.seed)
    device = group.device
    options: dict[str, Any] = {
        "params": cli.read_flags(SamplingParams, arguments),
        "position_extension": PositionExtension(arguments.position_extension),
        "compiled": arguments.compile,
        "seed": arguments.seed,
        "part": (group.rank, group.world_size),
        "merge": group.merge,
    }
    gpt, guide, tokenizer, vocabulary = load_models(arguments, device)
    config = gpt.model.config
    options["guide"] = guide.model if guide else None
    known = read_known(arguments, vocabulary) if arguments.complete else None
    count = arguments.num_images if known is None else len(known.grids)
    required = config.condition_dropout == 0
    condition = conditioning.choose_conditions(arguments, vocabulary, count, required=required)
    rows = (known or condition).rows
    labels, captions = conditioning.choose_texts(arguments, vocabulary, rows, count)
    size = arguments.latent_dim or config.latent_dim
    if known is not None:
        size = known.masks.shape[1], known.masks.shape[2]
    cli.build_or_error(gpt.model.grid_positions, size, options["position_extension"])
    cli.build_or_error(sampling.samples_in_order, config, size, options["params"])
    given = [[""] * count] * 2 if arguments.unconditional else (labels, captions)
    texts = encode(given[1], vocabulary.captions)
    vectors = conditioning.choose_embeddings(arguments, vocabulary, count, arguments.variations)
    classes = torch.tensor(vocabulary.tokens(given[0]))
    prefix = make_prefix(classes, condition.grids, vectors, texts)
    cli.build_or_error(config.null_prefix, prefix[:1], arguments.guidance_parts)
    samples = count * arguments.candidates
    choose = partial(choose_output_dir, arguments.output_dir, gpt.home / "samples", indices.META)
    output_dir = group.on_main(choose)
    folders = [addresses.fetch(x) for x in (arguments.complete, arguments.conditions) if x]
    run = tracking.continue_run(
        *(output_dir, arguments.run_id, gpt.provenance.run_id),
        stage="samples",
        inputs=read_inputs(arguments, gpt, guide, tokenizer),
        upstream=joined(gpt.lineage, *map(indices.lineage_of, folders)),
        enabled=group.is_main,
    )
    names = "codebook_size", "depth", "tokenizer_sha256", "tokenizer_run_id"
    values: Any = {name: getattr(vocabulary, name) for name in names} | {"latent_dim": size}
    values["condition"] = vocabulary.condition if condition.rows else None
    meta = indices.IndicesMeta(**values, gpt_run_id=gpt.provenance.run_id, lineage=run.lineage)
    paths = [row.condition_path or row.image_path for row in condition.rows] or [""] * count
    files = (f"{number:05}.png" for number in range(count))
    rows = [*map(Row, files, labels, [""] * count, paths, captions)]

    with run, ProgressBar(total=samples // group.world_size, unit=" images") as bar:
        target: Any = indices.new_folder(output_dir, rows, meta, text=arguments.text)
        with target if group.is_main else TemporaryDirectory() as name:  # others' is discarded
            folder = Path(name)
            shape = (count, *meta.shape)
            array = indices.allocate(folder / "indices.npy", shape, meta.codebook_size)
            grids = torch.from_numpy(array)
            options["progress"] = bar.update
            sample(arguments, group, gpt.model, prefix, known, size, grids, **options)
            if known is not None:
                known.pixels.save(folder)
            if known is not None and tokenizer is not None:
                picture_of(known, grids, tokenizer.model).save(folder / PICTURE)
            if condition.rows:
                codes = meta.condition.codebook_size
                indices.save_grids(folder / f"{CONDITION}.npy", condition.grids, codes)
        run.folder(output_dir, f"generated/{output_dir.name}")

    if known is not None:
        there = f"in {output_dir / PICTURE}" if tokenizer else "with --model_dir TOKENIZER"
        print(f"known, completed and original images: {there}")
    print(f"{count:,} grids in {output_dir}")
    can_guide = (config.num_classes and config.class_dropout) or config.caption_length
    guides = can_guide and not arguments.unconditional and arguments.guidance_scale == 1
    if guides and known is None:
        print("hint: samples follow class and prompt better with guidance: --guidance_scale 1.5")
    run_id = vocabulary.tokenizer_run_id
    logged = f"runs:/{run_id}/checkpoints" if addresses.has_run(run_id) else "TOKENIZER"
    words = "--indexes_path", output_dir, "--model_dir", arguments.model_dir or logged
    print(cli.next_command("vqvae/images_from_indexes.py", *words))
    group.shutdown()


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="GPT: a folder, or runs:/<run id>/checkpoints")
    add("--vocabulary_path", help="vocabulary.json of the GPT (default: beside the model)")
    add("--run_id", help="MLflow run to log to (default: the GPT's)")
    add("--output_dir", help="indices folder to write (default: samples beside the GPT)")
    add("--num_images", type=cli.positive, default=64, help="how many (default: 64)")
    add("--labels", nargs="+", metavar="NAME", help="classes, in turn (default: all of them)")
    text = "what the images show, in words; repeated, in turn, with each of the --labels; "
    text += "@FILE: the lines of a file"
    add("--prompt", action="append", default=[], metavar="TEXT", help=text)
    add("--embeddings", default="", metavar="FILE", help="vectors (.npy, Parquet) to follow")
    text = "sample each class as often as it occurs in the training data"
    add("--class_frequencies", action="store_true", help=text)
    text = "indices folder whose conditions, or grids if it has none, condition the samples, in "
    text += "turn (default: those of --complete, or none)"
    add("--conditions", metavar="INDICES", help=text)
    add("--unconditional", action="store_true", help="give no class, caption or embeddings")
    cli.add_flags(parser, SamplingParams, "distribution and guidance")
    add("--guide_path", help="weaker GPT to guide by, such as early/ beside it (autoguidance)")
    text = "size of the grids, larger than trained if need be (default: as trained)"
    add("--latent_dim", type=cli.height_and_width, metavar="H,W", help=text)
    ways, default = [*map(str, PositionExtension)], str(PositionExtension.SLIDE)
    text = "positions in larger grids: slide a crop of the trained size along (default), go on "
    text += "beyond the trained range, or compress into it"
    add("--position_extension", choices=ways, default=default, help=text)
    add("--complete", metavar="INDICES", help="indices whose first --num_images are completed")
    text = f"known part of them: {', '.join(REGIONS)} and a fraction, a picture that is white or "
    text += f"opaque there, or a folder with one for each image, by its name (default: {MASK})"
    add("--mask", metavar="MASK", help=text)
    text = "samples per image, of which the likeliest are kept: of each class, or with --complete "
    text += "of each image by its known indices (default: 1)"
    add("--candidates", type=cli.positive, default=1, help=text)
    add("--variations", type=cli.positive, default=1, help="completions of each image (default: 1)")
    add("--model_dir", help="tokenizer, for a picture of the completions")
    text = "bf16: weights and cache in bfloat16; auto: on a GPU that has it (default: auto)"
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=text)
    text = "compiled CUDA graphs, on a GPU; pays for many images"
    add("--compile", action="store_true", help=text)
    add("--seed", type=int, default=0, help="same seed, same images (default: 0)")
    add("--text", action="store_true", help="also write indices.txt")
    cli.add_inference_flags(parser, batch_size=0)  # see choose_batch_size
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser(), distributed.is_first_to_fail)
