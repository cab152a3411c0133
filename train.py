"""Stage 3: fit a GPT to the codebook indices of a data set."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from transformer import GPT, GPTConfig, generate
from utils import checkpoint, cli, figures, metrics, processes, resume, tracking, training
from utils.averaging import WeightAverage
from utils.indices import Indices, digest, lineage_of, read_indices
from utils.provenance import joined
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
    forward: nn.Module, prefix: Tensor, indices: Tensor, precision: str, accumulate: int
) -> Tensor:
    """Add the gradients of one batch, prefix (B,) and indices (B, h, w): its bits per token."""
    bits = torch.zeros((), device=indices.device)
    for part in zip(prefix.chunk(accumulate), indices.chunk(accumulate), strict=True):
        with processes.autocast(indices.device, precision):
            loss = forward(*part, loss=True).mean()
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
    total = torch.zeros(height * width + 1, dtype=torch.float64)  # nats of each cell, images
    for prefix, indices in batches:
        with processes.autocast(indices.device, precision):
            nats = model(prefix, indices, loss=True)
        total[:-1] += nats.sum(dim=0).cpu()
        total[-1] += len(indices)
    model.train()
    total = group.sum(total.to(group.device, torch.float32)).cpu()
    return (total[:-1] / total[-1] / math.log(2)).view(height, width)


def load_tokenizer(
    address: str, indices: Indices, path: str, device: torch.device
) -> checkpoint.LoadedModel | None:
    """The tokenizer that decodes the samples, refused if it is not that of the indices."""
    if not address:
        return None
    tokenizer = checkpoint.load_model(tracking.fetch(address), VQVAE, VQVAEConfig, device)
    if indices.meta is not None:
        indices.meta.check_tokenizer(tokenizer, path)
    if tokenizer.model.config.latent_dim != indices.latent_dim:
        raise cli.UserError(
            f"{path} has grids of {indices.latent_dim}, but the tokenizer {tokenizer.folder} makes "
            f"{tokenizer.model.config.latent_dim}; use indices and models of one tokenizer"
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
    return Vocabulary(size, indices.latent_dim, names, sha256, run_id)


def draw_samples(
    model: GPT, words: Vocabulary, tokenizer: checkpoint.LoadedModel | None
) -> figures.Image.Image:
    """A picture of samples, all classes in turn, always from the same random numbers.

    Without a tokenizer it shows the indices themselves as shades of grey.
    """
    training_mode = model.training
    model.eval()
    prefix = torch.arange(SAMPLES) % max(1, len(words.class_names))
    indices = generate(model, prefix, seed=0)
    model.train(training_mode)
    if tokenizer is None:
        return figures.grid(indices[:, None] / (words.codebook_size - 1) * 2 - 1)
    with torch.inference_mode():
        device = tokenizer.model.quantizer.share.device
        return figures.grid(tokenizer.model.decode(indices.to(device)))


def main(arguments: argparse.Namespace) -> None:
    config = cli.read_flags(training.TrainingConfig, arguments)
    data = cli.read_flags(IndicesConfig, arguments)
    resumed = resume.find_checkpoint(config.resume, config.output_dir)
    group = processes.join_processes(config.device, config.seed)
    precision = processes.pick_precision(config.precision, group.device, on_cpu="bf16")

    # The indices
    path = tracking.fetch(data.path_to_data)
    indices = read_indices(path, latent_dim=arguments.latent_dim)
    tokenizer = load_tokenizer(data.model_dir, indices, str(path), group.device)
    words = describe(indices, tokenizer)
    grids = indices.tensor()
    prefixes = torch.tensor(words.tokens([row.label for row in indices.rows]))
    train_rows, val_rows = split_rows(
        indices.rows, val_fraction=data.val_fraction, seed=config.seed
    )
    schedule = training.Schedule(config, len(train_rows), len(val_rows), group.count)

    def load(batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in batches:
            yield prefixes[rows].to(group.device), grids[rows].long().to(group.device)

    # The model
    model_config = cli.read_flags(
        GPTConfig,
        arguments,
        codebook_size=words.codebook_size,
        num_classes=len(words.class_names),
        latent_dim=words.latent_dim,
    )
    model = GPT(model_config).to(group.device)
    optimizer = training.make_optimizer(model, config, betas=(0.9, 0.95))
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
        run_name=config.run_name or name,
        enabled=group.first,
        config=asdict(config) | asdict(data) | asdict(model_config),
        inputs={data.path_to_data: digest(path)}
        | ({} if tokenizer is None else {data.model_dir: tokenizer.sha256}),
        upstream=joined(lineage_of(path), () if tokenizer is None else tokenizer.lineage),
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
    counts = [
        torch.bincount(grids[rows].flatten().long(), minlength=words.codebook_size)
        for rows in (train_rows, val_rows)
    ]
    unigram = metrics.unigram_bits(*counts)
    bigram = metrics.bigram_bits(grids[train_rows], grids[val_rows], words.codebook_size)
    group.print(
        f"{path}: {len(indices):,} grids of {words.latent_dim[0]}x{words.latent_dim[1]}, "
        f"{words.codebook_size} codes, {len(words.class_names)} classes; "
        f"{len(train_rows):,} to train on, {len(val_rows):,} to validate"
    )
    group.print(f"{schedule} on {group.device} in {precision}; writing to {output_dir}")
    baselines = f"baselines: unigram {unigram:.3f}, bigram {bigram:.3f} bits per token"
    group.print(baselines)

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
            picture = draw_samples(average.model, words, tokenizer)
            run.picture("pictures/samples", picture, progress.step)
        group.print(f"step {progress.step:>6,}  val {bits:.3f} bits per token")
        return bits

    def save(*, best: bool) -> None:
        if group.first:
            provenance = checkpoint.Provenance(
                run.run_id, config.seed, data.val_fraction, run.lineage
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
        batches = schedule.batches(train_rows, progress, group, lambda rows, epoch: load(rows))
        for prefix, grid in batches:
            # Now and then an image is shown without its class, so that the GPT learns "no class".
            hidden = torch.rand(len(prefix)).to(group.device) < model_config.class_dropout
            prefix = prefix.masked_fill(hidden, model_config.no_class)
            learning_rate = schedule.learning_rate(progress.step)
            bits = train_step(forward, prefix, grid, precision, config.accumulate)
            norm = training.optimizer_step(optimizer, learning_rate, config.max_grad_norm)
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
            run.picture("pictures/best_samples", draw_samples(best.model, words, tokenizer), 0)
            run.model(
                output_dir / "best",
                {"val/best_bits_per_token": bits},
                progress.step,
                register=config.register,
            )
            print(f"best: val {bits:.3f} bits per token; {baselines}")
            print(run.how_to_look)
            print(
                cli.next_command(
                    *("transformer_generation.py", "--model_path", output_dir / "best"),
                    *("--vocabulary_path", output_dir / "best" / FILE, "--run_id", run.run_id),
                )
            )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    for config_class in (IndicesConfig, GPTConfig, training.TrainingConfig):
        cli.add_flags(parser, config_class)
    parser.set_defaults(weight_decay=0.05, patience=5)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
