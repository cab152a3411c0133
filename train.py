"""Stage 3: fit a GPT to the codebook indices of a data set."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from transformer import GPT, GPTConfig, generate, make_prefix
from transformer.order import draw_orders, random_share
from transformer.prefix import hide
from utils import checkpoint, cli, figures, metrics, processes, resume, tracking, training
from utils.averaging import WeightAverage
from utils.conditions import read_conditions
from utils.crops import read_crops
from utils.indices import Indices, read_indices
from utils.optimizers import OptimizerConfig, make_optimizer, optimizer_step
from utils.table import split_rows
from utils.vocabulary import FILE, Vocabulary
from vqvae import VQVAE, VQVAEConfig

SAMPLES = 64  # images that are drawn at each evaluation


@dataclass(frozen=True)
class IndicesConfig:
    """What to train on."""

    path_to_data: str = field(
        metadata={"help": "indices folder of quantize_dataset.py, runs:/..., or a text file"}
    )
    model_dir: str = field(
        default="", metadata={"help": "tokenizer that decodes the samples drawn in training"}
    )
    val_fraction: float = field(
        default=0.1, metadata={"help": "share of a text file's lines for validation"}
    )


def train_step(
    forward: nn.Module,
    prefix: Tensor,
    indices: Tensor,
    order: Tensor | None,
    precision: str,
    accumulate: int,
) -> Tensor:
    """Add the gradients of one batch, as `GPT.forward` takes it: its bits per token."""
    bits = torch.zeros((), device=indices.device)
    orders = [None] * accumulate if order is None else order.chunk(accumulate)
    parts = zip(prefix.chunk(accumulate), indices.chunk(accumulate), orders, strict=True)
    for *part, part_order in parts:
        with processes.autocast(indices.device, precision):
            loss = forward(*part, order=part_order, loss=True).mean()
        (loss / accumulate).backward()
        bits += loss.detach() / accumulate / math.log(2)
    return bits


@torch.inference_mode()
def evaluate(
    model: GPT, batches: Iterator[tuple[Tensor, Tensor]], precision: str, group: processes.Processes
) -> Tensor:
    """Bits per token of all batches of all processes, for each cell: (h, w), on the CPU."""
    model.eval()
    height, width = model.config.latent_dim
    tokens = height * width * model.config.depth
    total = torch.zeros(tokens + 1, dtype=torch.float64)  # nats of each token, images
    for prefix, indices in batches:
        with processes.autocast(indices.device, precision):
            nats = model(prefix, indices, loss=True)
        total[:-1] += nats.sum(dim=0).cpu()
        total[-1] += len(indices)
    model.train()
    total = group.sum(total.to(group.device, torch.float32)).cpu()
    return (total[:-1] / total[-1] / math.log(2)).view(height, width, -1).mean(dim=2)


def load_tokenizer(
    address: str, indices: Indices, path: str, device: torch.device
) -> checkpoint.LoadedModel | None:
    """The tokenizer that decodes the samples, refused if it is not that of the indices."""
    if not address:
        return None
    tokenizer = checkpoint.load_model(tracking.fetch(address), VQVAE, VQVAEConfig, device)
    if indices.meta is not None:
        indices.meta.check_tokenizer(tokenizer, path)
    makes = (*tokenizer.model.config.latent_dim, tokenizer.model.config.depth)
    if makes != (*indices.latent_dim, indices.depth):
        raise cli.UserError(
            f"{path} has grids of {(*indices.latent_dim, indices.depth)}, but the tokenizer "
            f"{tokenizer.folder} makes {makes}; use indices and models of one tokenizer"
        )
    return tokenizer


def describe(indices: Indices, tokenizer: checkpoint.LoadedModel | None) -> Vocabulary:
    """The vocabulary of a data set of indices: its codes, and its labels in order."""
    names = tuple(sorted({row.label for row in indices.rows} - {""}))
    if indices.meta is not None:
        meta = indices.meta
        size, sha256, run_id = meta.codebook_size, meta.tokenizer_sha256, meta.tokenizer_run_id
    elif tokenizer is not None:
        size, sha256 = tokenizer.model.config.codebook_size, tokenizer.sha256
        run_id = tokenizer.provenance.run_id
    else:  # a plain text file: as many codes as it needs
        size, sha256, run_id = max(2, indices.largest() + 1), "", ""
    condition = indices.meta.condition if indices.meta is not None else None
    return Vocabulary(size, indices.latent_dim, names, sha256, run_id, indices.depth, condition)


def baselines(train: Tensor, val: Tensor, words: Vocabulary) -> tuple[float, float]:
    """Unigram and bigram bits per token of the validation grids, (N, h, w[, depth]).

    The codes of each depth are words of their own. As it is known which depth comes next, the
    unigram need not tell.
    """
    size = words.codebook_size * words.depth
    if words.depth > 1:
        train, val = (x + words.codebook_size * torch.arange(words.depth) for x in (train, val))
    counts = [torch.bincount(grids.flatten().long(), minlength=size) for grids in (train, val)]
    unigram = metrics.unigram_bits(*counts) - math.log2(words.depth)
    return unigram, metrics.bigram_bits(train, val, size)


def draw_samples(
    model: GPT, prefix: Tensor, tokenizer: checkpoint.LoadedModel | None
) -> figures.Image.Image:
    """A picture of samples of these prefixes, always from the same random numbers.

    Without a tokenizer it shows the (first) indices themselves as shades of grey.
    """
    training_mode = model.training
    model.eval()
    indices = generate(model, prefix, seed=0)
    model.train(training_mode)
    if tokenizer is None:
        first = indices if model.config.depth == 1 else indices[..., 0]
        return figures.grid(first[:, None] / (model.config.codebook_size - 1) * 2 - 1)
    with torch.inference_mode():
        device = next(tokenizer.model.parameters()).device
        return figures.grid(tokenizer.model.decode(indices.to(device)))


def main(arguments: argparse.Namespace) -> None:
    config = cli.read_flags(training.TrainingConfig, arguments)
    kind = cli.read_flags(OptimizerConfig, arguments)
    data = cli.read_flags(IndicesConfig, arguments)
    resumed = resume.find_checkpoint(config.resume, config.output_dir)
    group = processes.join_processes(config.device, config.seed)
    precision = processes.pick_precision(config.precision, group.device, on_cpu="bf16")

    # The indices
    path = tracking.fetch(data.path_to_data)
    indices = read_indices(path, latent_dim=arguments.latent_dim, depth=None)
    crops, conditions = read_crops(path, indices), read_conditions(path, indices)
    tokenizer = load_tokenizer(data.model_dir, indices, str(path), group.device)
    words = describe(indices, tokenizer)
    grids = indices.tensor()
    classes = torch.tensor(words.tokens([row.label for row in indices.rows]))
    train_rows, val_rows = split_rows(
        indices.rows, val_fraction=data.val_fraction, seed=config.seed
    )
    schedule = training.Schedule(config, len(train_rows), len(val_rows), group.count)

    def prefix_of(rows: Tensor) -> Tensor:
        return make_prefix(classes[rows], None if conditions is None else conditions[rows])

    def load(batches: list[Tensor], epoch: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in batches:
            plain = epoch is None or crops is None
            grid = grids[rows] if plain else crops.pick(rows, config.seed, epoch)
            yield prefix_of(rows).to(group.device), grid.long().to(group.device)

    # Samples show all classes in turn, or the conditions of the first validation images.
    shown = torch.arange(SAMPLES) % max(1, len(words.class_names))
    shown = shown if conditions is None else prefix_of(val_rows[:SAMPLES])

    # The model
    model_config = cli.read_flags(
        GPTConfig,
        arguments,
        codebook_size=words.codebook_size,
        num_classes=len(words.class_names),
        latent_dim=words.latent_dim,
        depth=words.depth,
        condition_codebook_size=words.condition_shape[0],
        condition_latent_dim=words.condition_shape[1],
    )
    model = GPT(model_config).to(group.device)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    optimizer = make_optimizer(
        model, config, (0.9, 0.95), for_muon=matrices if kind.optimizer == "muon" else ()
    )
    progress = resume.restore_training(resumed, model, optimizer)
    average = WeightAverage(model, config.ema_decay)
    average.restore(resumed)
    if config.compile:
        model.compile()
    forward = group.wrap(model)

    # The run
    name = f"gpt-{model_config.num_layers}x{model_config.dim}-w{model_config.window_size}"
    output_dir = training.find_output_dir(config, resumed, default_name=name)
    run = tracking.Run(
        output_dir,
        stage="gpt",
        run_id=progress.run_id or None,
        continued=resumed is not None,
        experiment=config.experiment or tracking.experiment_of(words.tokenizer_run_id),
        run_name=config.run_name,
        enabled=group.first,
        config=asdict(config) | asdict(kind) | asdict(data) | asdict(model_config),
        tags={"tokenizer_run_id": words.tokenizer_run_id},
        params={
            "data": path.name,
            "latent_dim": words.latent_dim,
            "codebook_size": words.codebook_size,
            "classes": len(words.class_names),
            "window_size": model_config.window_size,
            "shape": f"{model_config.num_layers} x {model_config.dim}",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "batch_size": config.batch_size,
            "learning_rate": config.learning_rate,
        },
    )
    progress.run_id = run.run_id

    # What it has to beat: the distribution of the codes, and what the last code tells of the next
    unigram, bigram = baselines(grids[train_rows], grids[val_rows], words)
    group.print(
        f"{path}: {len(indices):,} grids of {'x'.join(map(str, grids[0].shape))}, "
        f"{words.codebook_size} codes, {len(words.class_names)} classes, "
        f"{model_config.prefix_length - 1} cells of condition; "
        f"{len(train_rows):,} to train on, {len(val_rows):,} to validate"
    )
    group.print(f"{schedule} on {group.device} in {precision}; writing to {output_dir}")
    to_beat = f"baselines: unigram {unigram:.3f}, bigram {bigram:.3f} bits per token"
    group.print(to_beat)

    def evaluation() -> float:
        """Evaluate, log the figures and a picture of samples; validation bits per token."""
        batches = group.share(val_rows).split(config.batch_size)
        by_cell = evaluate(average.model, load(batches), precision, group)
        bits = float(by_cell.mean())
        values = {"bits_per_token": bits, "unigram_bits_per_token": unigram}
        values["bigram_bits_per_token"] = bigram
        run.metrics("val", values, progress.step)
        run.picture("pictures/bits_by_cell", figures.heat(by_cell), progress.step)
        if group.first:
            picture = draw_samples(average.model, shown, tokenizer)
            run.picture("pictures/samples", picture, progress.step)
        group.print(f"step {progress.step:>6,}  val {bits:.3f} bits per token")
        return bits

    def save(*, best: bool) -> None:
        if group.first:
            provenance = checkpoint.Provenance(
                run.run_id, cli.command_line(), config.seed, data.val_fraction
            )
            words_file = {FILE: words.content()}
            if best:
                files = checkpoint.model_files(average.model, provenance) | words_file
                checkpoint.write_folder(output_dir / "best", files)
            files = checkpoint.model_files(model, provenance) | words_file | average.files()
            files |= resume.training_files(optimizer, progress)
            checkpoint.write_folder(output_dir / "last", files)

    with run, training.StopRequest() as stop:
        if resumed is None:
            evaluation()
        averages = metrics.Averages()
        for prefix, grid in schedule.batches(train_rows, progress, group, load):
            # Now and then an image is shown without its class, so that the GPT learns "no class".
            prefix = hide(prefix, model_config)
            order = None
            if model_config.order_anneal is not None:
                share = random_share(
                    model_config.order_anneal, progress.step / schedule.total_steps
                )
                order = draw_orders(len(grid), math.prod(words.latent_dim), share).to(grid.device)
            learning_rate = schedule.learning_rate(progress.step)
            bits = train_step(forward, prefix, grid, order, precision, config.accumulate)
            norm = optimizer_step(optimizer, learning_rate, config.max_grad_norm)
            progress.step += 1
            average.update(model, progress.step)
            averages.add(
                {"bits_per_token": bits, "gradient_norm": norm, "learning_rate": learning_rate}
            )

            if schedule.logs(progress.step):
                values = averages.take()
                images_per_second = values.pop("steps_per_second") * config.batch_size
                values["tokens_per_second"] = images_per_second * grids[0].numel()
                run.metrics("train", values, progress.step)
            if schedule.evaluates(progress.step):
                save(best=progress.improved(evaluation()))
                averages.restart()
            stop.obeyed(group, partial(save, best=False))
            if progress.exhausted(config.patience):
                group.print(f"no better validation in {config.patience} evaluations: stopping")
                break

        if group.first:
            best = checkpoint.load_model(output_dir / "best", GPT, GPTConfig, group.device)
            bits = progress.best
            run.metrics("val", {"best_bits_per_token": bits}, progress.step)
            run.picture("pictures/best_samples", draw_samples(best.model, shown, tokenizer), 0)
            run.folder(output_dir / "best", "checkpoints/best")
            print(f"best: val {bits:.3f} bits per token; {to_beat}")
            print(run.how_to_look)
            print(
                cli.next_command(
                    *("transformer_generation.py", "--model_path", output_dir / "best"),
                    *("--vocabulary_path", output_dir / "best" / FILE, "--run_id", run.run_id),
                    *(() if conditions is None else ("--conditions", data.path_to_data)),
                )
            )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    for config_class in (IndicesConfig, GPTConfig, OptimizerConfig, training.TrainingConfig):
        cli.add_flags(parser, config_class)
    parser.set_defaults(weight_decay=0.05, patience=5)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
