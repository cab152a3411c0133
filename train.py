"""Stage 3: fit a GPT to the codebook indices of a data set."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from transformer import (
    GPT,
    FlexAttention,
    GPTConfig,
    drop_conditioning,
    generate,
    make_prefix,
    random_order_probability,
    sample_permutations,
)
from utils import addresses, cli, distributed, figures, tracking
from utils.data.index_dataset import IndexDataset, IndicesConfig
from utils.data.indices import digest, lineage_of
from utils.data.vocabulary import FILE
from utils.evaluation import metrics
from utils.evaluation.samples import SampleEvaluator
from utils.provenance import LoadedModel, Provenance, joined
from utils.training import checkpoint, resume
from utils.training.averages import Averages
from utils.training.averaging import WeightAverage
from utils.training.checkpoints import find_checkpoint
from utils.training.guard import Guard
from utils.training.optimizers import OptimizerConfig, make_optimizer
from utils.training.saving import Checkpoints
from utils.training.schedule import Schedule, TrainingConfig, find_output_dir
from utils.training.stopping import StopRequest
from vqvae import VQVAE

BEST_METRICS = ("bits_per_token", "fd_classifier", "label_agreement")  # for --best_metric
SAMPLES = 64  # images that are drawn at each evaluation
NO_BETTER_WARNING = (
    "warning: {:.3f} bits per token are no better than the unigram baseline of {:.3f}, which "
    "ignores the order of the indices, so that samples will be noise; train longer, on more "
    "images, or with a tokenizer of a smaller --codebook_size"
)


def train_step(
    model: GPT, forward: nn.Module, batch: Sequence[Tensor], precision: str, accumulate: int
) -> Tensor:
    """Add the gradients of one batch, (prefix, indices and perhaps orders): its bits per token."""
    bits = torch.zeros((), device=batch[0].device)
    for prefix, indices, *order in zip(*(x.chunk(accumulate) for x in batch), strict=True):
        tokens, positions = model.flatten(indices, *order)
        with distributed.autocast(bits.device, precision):
            loss = model.head(forward(tokens, positions, prefix=prefix)[:, :-1], tokens).mean()
        (loss / accumulate).backward()
        bits += loss.detach() / accumulate / math.log(2)
    return bits


@torch.inference_mode()
def evaluate(
    model: GPT,
    batches: Iterator[tuple[Tensor, Tensor]],
    precision: str,
    group: distributed.Distributed,
) -> Tensor:
    """Bits per token of all batches of all processes, for each cell: (h, w), on the CPU."""
    model.eval()
    height, width = model.config.latent_dim
    # nats of each token, images
    total = torch.zeros(height * width * model.config.depth + 1, dtype=torch.float64)
    for prefix, indices in batches:
        with distributed.autocast(indices.device, precision):
            nats = model.loss(prefix, indices)
        total[:-1] += nats.sum(dim=0).cpu()
        total[-1] += len(indices)
    model.train()
    total = group.all_reduce_sum(total.to(group.device, torch.float32)).cpu()
    return (total[:-1] / total[-1] / math.log(2)).view(height, width, -1).mean(dim=2)


def draw_samples(model: GPT, data: IndexDataset, tokenizer: LoadedModel | None) -> Image.Image:
    """A picture of samples, always from the same random numbers.

    They are of all classes in turn, or of the classes and conditions of the first validation
    images. Without a tokenizer the (first) indices themselves are shown as shades of grey.
    """
    training_mode = model.training
    model.eval()
    prefix = torch.arange(SAMPLES) % max(1, len(data.words.class_names))
    if data.conditions is not None:
        prefix = make_prefix(*data.prefix_inputs(data.val_rows[:SAMPLES]))
    indices = generate(model, prefix, seed=0)
    model.train(training_mode)
    if tokenizer is None:
        first = indices if model.config.depth == 1 else indices[..., 0]
        return figures.grid(first[:, None] / (model.config.codebook_size - 1) * 2 - 1)
    with torch.inference_mode():
        return figures.grid(tokenizer.model.decode(indices.to(model.head.weight.device)))


def load_batches(
    data: IndexDataset, device: torch.device, rows: Sequence[Tensor], epoch: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Prefix and grids of each batch of rows, on the device; of crops in an `epoch`."""
    for classes, conditions, grids in data.batches(rows, epoch):
        yield make_prefix(classes, conditions).to(device), grids.to(device)


def open_run(
    output_dir: Path,
    progress: resume.Progress,
    model: GPT,
    data: IndexDataset,
    tokenizer: LoadedModel | None,
    group: distributed.Distributed,
    config: dict[str, Any],
) -> tracking.Run:
    """The run in MLflow, or that of the training which goes on."""
    params = {name: config[name] for name in ("window_size", "batch_size", "learning_rate")}
    params["shape"] = f"{model.config.num_layers} x {model.config.dim}"
    params["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    words = data.words
    run = tracking.Run(
        output_dir,
        stage="gpt",
        run_id=progress.run_id or None,
        continued=bool(progress.run_id),
        logged=progress.logged,
        experiment=config["experiment"] or tracking.experiment_of(words.tokenizer_run_id),
        run_name=config["run_name"],
        enabled=group.is_main,
        config=config,
        params=data.params | params,
        tags={"tokenizer_run_id": words.tokenizer_run_id},
        inputs={config["path_to_data"]: digest(data.path)}
        | ({} if tokenizer is None else {config["model_dir"]: tokenizer.sha256}),
        upstream=joined(lineage_of(data.path), () if tokenizer is None else tokenizer.lineage),
    )
    progress.run_id = run.run_id
    return run


def report_best(
    run: tracking.Run,
    data: IndexDataset,
    tokenizer: LoadedModel | None,
    config: TrainingConfig,
    precision: str,
    group: distributed.Distributed,
    progress: resume.Progress,
) -> float:
    """Log the best GPT as a whole, with samples and its figure; its bits per token."""
    folder = run.output_dir / "best"
    best = checkpoint.load_model(folder, GPT, group.device).model
    run.picture("pictures/best_samples", draw_samples(best, data, tokenizer), 0)
    name, sign = config.best_metric, metrics.sign_of(config.best_metric, BEST_METRICS)
    figure = sign * progress.best
    scores = {f"val/best_{name}": figure}
    run.model(folder, scores, progress.step, register=config.register, lower_is_better=sign > 0)
    print(f"best: val {name} {figure:.3f}")
    if name == "bits_per_token":
        return figure
    batches = load_batches(data, group.device, data.val_rows.split(config.batch_size))
    return float(evaluate(best, batches, precision, replace(group, world_size=1)).mean())


def main(arguments: argparse.Namespace) -> None:
    config = cli.read_flags(TrainingConfig, arguments)
    kind = cli.read_flags(OptimizerConfig, arguments)
    source = cli.read_flags(IndicesConfig, arguments)
    sign = metrics.sign_of(config.best_metric, BEST_METRICS[: 3 if source.fd_samples else 1])
    resumed = find_checkpoint(config.resume, config.output_dir)
    group = distributed.init_distributed(config.device, config.seed)
    precision = distributed.pick_precision(config.precision, group.device, on_cpu="bf16")

    tokenizer = None
    if source.model_dir:
        address = addresses.fetch(source.model_dir)
        tokenizer = checkpoint.load_model(address, VQVAE, group.device)
    data = IndexDataset(
        addresses.fetch(source.path_to_data),
        tokenizer,
        latent_dim=arguments.latent_dim,
        val_fraction=source.val_fraction,
        seed=config.seed,
    )
    schedule = Schedule(config, len(data.train_rows), len(data.val_rows), group.world_size)
    evaluator = None
    if source.fd_samples:
        splits = data.train_rows, data.val_rows[: source.fd_samples]
        evaluator = SampleEvaluator(
            tokenizer, data.grids, data.rows, *splits, seed=config.seed, group=group
        )

    model_config = cli.read_flags(GPTConfig, arguments, **data.words.model_values)
    model_config, attention = model_config.resolve_defaults(), {}
    if arguments.flex_attention:
        if group.device.type != "cuda":
            raise cli.UserError(f"--flex_attention needs CUDA, not {group.device}; omit it")
        attention["attend"] = FlexAttention(
            group.device,
            grid=model_config.latent_dim,
            window=model_config.window_size,
            prefix=model_config.prefix_length,
            depth=model_config.depth,
        )
    model = GPT(model_config, **attention).to(group.device)
    for_muon = [p for p in model.blocks.parameters() if p.dim() == 2 and kind.optimizer == "muon"]
    optimizer = make_optimizer(model, config, (0.9, 0.95), for_muon)
    average = WeightAverage(model, config.ema_decay)
    progress, averages = resume.Progress(), Averages()
    settings = asdict(config) | asdict(kind) | asdict(source) | asdict(model_config)
    settings |= {"data_sha256": resume.fingerprint(data.rows, *data.arrays), "precision": precision}
    parts = {"optimizer": optimizer, "average": average, "averages": averages}
    state = resume.State(group, model, settings, progress=progress, **parts)
    state.restore(resumed)
    if config.compile:
        model.compile()
        model.head.compile()
    forward = group.wrap(model)

    name = f"gpt-{model_config.num_layers}x{model_config.dim}-w{model_config.window_size}"
    output_dir = find_output_dir(config, resumed, default_name=name)
    named = settings | {"run_name": config.run_name or name}
    run = open_run(output_dir, progress, model, data, tokenizer, group, named)
    checkpoints = Checkpoints(run, config.checkpoint_every, group, state, resumed)
    guard = Guard(group, progress, config, data.name)
    origin = Provenance(run.run_id, config.seed, source.val_fraction, run.lineage)
    splits = (data.grids[rows] for rows in (data.train_rows, data.val_rows))
    unigram, bigram = metrics.baselines(*splits, data.words.codebook_size, data.words.depth)
    floor = {"unigram_bits_per_token": unigram, "bigram_bits_per_token": bigram}
    load = partial(load_batches, data, group.device)
    group.print(data)
    group.print(f"{schedule} on {group.device} in {precision}; writing to {output_dir}")
    group.print(f"baselines: unigram {unigram:.3f}, bigram {bigram:.3f} bits per token")

    def evaluation() -> float:
        """Evaluate, log the figures and samples; the figure of --best_metric, to make small."""
        values = {}
        if evaluator is not None:
            inputs = make_prefix(*data.prefix_inputs(evaluator.rows))
            values = evaluator.metrics(partial(generate, average.model.eval(), inputs))
        batches = load(group.shard(data.val_rows).split(config.batch_size))
        by_cell = evaluate(average.model, batches, precision, group)
        bits = float(by_cell.mean())
        values |= {"bits_per_token": bits, **floor}
        run.metrics("val", values, progress.step)
        run.picture("pictures/bits_by_cell", figures.heat(by_cell), progress.step)
        if group.is_main:
            samples = draw_samples(average.model, data, tokenizer)
            run.picture("pictures/samples", samples, progress.step)
        group.print(f"step {progress.step:>6,}  val {bits:.3f} bits per token")
        return sign * values[config.best_metric]

    def shuffled_share() -> float:
        """The share of images that are shown in a random order now."""
        anneal, done = model_config.order_anneal, progress.step / schedule.total_steps
        return 0.0 if anneal is None else random_order_probability(anneal, done)

    def files_of(one: GPT) -> dict:
        return checkpoint.model_files(one, origin) | {FILE: data.words.content()}

    def save() -> None:
        checkpoints.save(files_of(model))

    with StopRequest(checkpoints.leave) as stop, run, checkpoints:
        if progress.step == 0:
            save()
            evaluation()
            averages.restart()
        for prefix, grid in schedule.batches(data.train_rows, progress, group, load):
            # Now and then an image is shown without what is known of it, for drawing without.
            batch = [drop_conditioning(prefix, model_config, torch.default_generator), grid]
            if model_config.order_anneal is not None:
                batch.append(sample_permutations(grid, shuffled_share(), torch.default_generator))
            learning_rate = schedule.learning_rate(progress.step)
            bits = train_step(model, forward, batch, precision, config.accumulate)
            values, optimizers = {"bits_per_token": bits}, {"gradient_norm": optimizer}
            progress.step += 1
            if guard.step(optimizers, values, learning_rate, schedule.rows):
                average.update(model, progress.step)
                averages.add(values | {"learning_rate": learning_rate})

            if schedule.logs(progress.step):
                values = averages.take()
                images_per_second = values.pop("steps_per_second") * config.batch_size
                values["tokens_per_second"] = images_per_second * data.grids[0].numel()
                run.metrics("train", values, progress.step)
            if schedule.evaluates(progress.step):
                score = evaluation()
                # In random orders it does not learn yet what it is to do: nothing counts so far.
                if shuffled_share() == 0 and progress.improved(score):
                    checkpoints.save_best(files_of(average.model))
                save()
                averages.restart()
            elif checkpoints.due():
                save()
            stop.obeyed(group, save)
            if progress.exhausted(config.patience):
                group.print(
                    f"no better {config.best_metric} in {config.patience} evaluations: stopping"
                )
                break

        if group.is_main:
            bits = report_best(run, data, tokenizer, config, precision, group, progress)
            print(f"bits per token: {bits:.3f}, unigram {unigram:.3f}, bigram {bigram:.3f}")
            if not bits < unigram:
                print(NO_BETTER_WARNING.format(bits, unigram))
            print(run.ui_hint)
    if group.is_main:
        words = ["transformer_generation.py", "--model_path", output_dir / "best"]
        words += ["--vocabulary_path", output_dir / "best" / FILE, "--run_id", run.run_id]
        words += [] if data.conditions is None else ["--conditions", data.path]
        print(cli.next_command(*words))
    group.shutdown()


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    cli.add_flags(parser, IndicesConfig, "indices")
    cli.add_flags(parser, TrainingConfig, "training")
    cli.add_flags(parser, GPTConfig, "transformer")
    cli.add_flags(parser, OptimizerConfig, "optimiser")
    parser.add_argument(
        "--flex_attention", action="store_true", help="the window by FlexAttention, on CUDA"
    )
    parser.set_defaults(weight_decay=0.05, patience=5, best_metric="bits_per_token")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
