"""Stage 1: fit the image tokenizer (encoder, codebook, decoder) to the images of a CSV."""

from utils.cli import start_script

if __name__ == "__main__":
    start_script()

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from utils import cli, distributed, figures, tracking
from utils.data import sources
from utils.data.images import Augmentation, DataConfig, ImageConfig, ImageDataset
from utils.distributed import ALONE, Distributed
from utils.evaluation import metrics
from utils.evaluation.features import ImageSet, Settings
from utils.provenance import LoadedModel, load_model
from utils.training import loop
from utils.training.checkpoint import continue_training
from utils.training.config import TrainingConfig, sign_of
from utils.training.loop import Schedule, TrainState
from utils.training.optim import make_optimizer
from utils.training.start import dry_run, evaluation_rows, open_run, pictures_are_due
from utils.training.state import RowDigests, StopSignals
from vqvae import PRESETS, QUANTIZERS, VQVAE, VQVAEConfig
from vqvae.adversarial import AdversarialConfig, AdversarialLoss
from vqvae.config import all_options, training_only
from vqvae.losses import LossConfig, ReconstructionLoss
from vqvae.quantizers.codebook import CollapseMonitor
from vqvae.train_step import compile_model, forward_backward

PICTURES = 32  # validation images that are shown
SMALL = "vqvae-small"  # the default preset


@dataclass(frozen=True)
class StartConfig:
    """What the training starts from, and whether its codebook may start over."""

    init_from: str = cli.flag(
        "",
        "tokenizer to start from: its weights and settings, with a new optimiser; --image_size "
        "may differ, and settings that do not change the network",
    )
    reset_codebook_on_collapse: bool = cli.flag(
        False, "start the codebook over from the data when few codes are in use"
    )


class Evaluated(NamedTuple):
    """How often each code was used, and the first images (n, C, H, W) with reconstructions."""

    counts: Tensor
    originals: Tensor
    reconstructions: Tensor


@torch.no_grad()
def evaluate(
    model: VQVAE, dataset: ImageDataset, rows: Tensor, batch_size: int, group: Distributed
) -> tuple[dict[str, float], Evaluated]:
    """Metrics of the images of these rows, and what was made of the first."""

    def measure(images: Tensor) -> dict[str, Tensor]:
        made, quantized = model(images)
        losses = {f"{name}_loss": x.expand(len(images)) for name, x in quantized.losses.items()}
        errors = metrics.image_metrics(images, made.float().clamp(-1, 1))
        return {"indices": quantized.indices, **errors, **losses}

    part, training = ImageSet(dataset, rows), model.training
    model.eval()
    shared = group if len(rows) >= group.world_size else ALONE  # else each evaluates them all
    found = part.map(Settings(group.device, batch_size, 0, shared), "evaluation", measure)
    shown = part.load(torch.arange(min(PICTURES, len(rows))), group.device)
    reconstructions = model.decode(model.encode(shown))
    model.train(training)
    counts = model.quantizer.count(found.pop("indices").to(group.device))
    values = {name: float(x.double().mean()) for name, x in found.items()}
    values["psnr"] = metrics.psnr(values["mse"])
    return values | metrics.codebook_metrics(counts), Evaluated(counts, shown, reconstructions)


def in_words(values: dict[str, float]) -> str:
    return (
        f"val mse {values['mse']:.5f}, psnr {values['psnr']:.1f} dB, "
        f"usage {values['codebook_usage']:.0f} %, perplexity {values['perplexity']:.0f}"
    )


def log_pictures(run: tracking.Run, model: VQVAE, seen: Evaluated, step: int) -> None:
    """Images and errors; how often the codes are used, where they lie, what each looks like."""
    usage, codes, decoded_codes = model.inspect_codebook(seen.counts)
    for name, picture in {
        "reconstructions": figures.comparison(seen.originals, seen.reconstructions),
        "code_usage": figures.bars(usage),
        "code_embedding": figures.points(figures.principal_components(codes), usage),
        "decoded_codes": figures.grid(decoded_codes),
    }.items():
        run.picture(f"pictures/{name}", picture, step)


def read_configs(flags: cli.Flags) -> list[Any]:
    """The configs of a training; the larger presets change the default of the learning rate."""
    if flags.preset != SMALL and "learning_rate" not in flags.given | flags.stored:
        flags.learning_rate = 1e-4  # about as they were published
    kinds = TrainingConfig, DataConfig, StartConfig, LossConfig, AdversarialConfig
    configs = [cli.read_flags(kind, flags) for kind in kinds]
    for config in configs:
        cli.reject_unused_flags(config, flags)
    return configs


def read_start(config: StartConfig, flags: cli.Flags) -> tuple[LoadedModel | None, VQVAEConfig]:
    """The tokenizer of --init_from, if there is one, and the settings of the one to train.

    A UserError if there is no such tokenizer, or flags contradict it or each other.
    """
    names = {field.name for field in (*fields(VQVAEConfig), *fields(all_options()))}
    given = {name: getattr(flags, name) for name in names & (flags.given | flags.stored)}
    if not config.init_from:
        start = None
        model_config = cli.build_or_error(VQVAEConfig.from_preset, flags.preset, **given)
    else:
        if "preset" in flags.given:
            raise cli.UserError("--preset cannot be combined with --init_from; leave it out")
        start = load_model(config.init_from, VQVAE)
        settings = start.model.config.to_dict()
        settings |= {"value_range": None, "resampling": ""}  # of these data, not of the former
        free = {"image_size", "value_range", "resampling", *training_only()}
        for name in sorted(given.keys() & settings.keys() - free):
            if given[name] != settings[name]:
                raise cli.UserError(
                    f"--{name} {given[name]} contradicts {config.init_from}, where it is "
                    f"{settings[name]}; leave it out"
                )
        model_config = cli.build_or_error(VQVAEConfig.create, **settings | given)
    name = model_config.quantizer
    if config.reset_codebook_on_collapse and not QUANTIZERS[name].supports_reset:
        raise cli.UserError(
            f"--reset_codebook_on_collapse has no effect with the quantizer {name}; leave it out"
        )
    return start, model_config


def read_images(
    data: DataConfig, config: VQVAEConfig, seed: int
) -> tuple[ImageDataset, Tensor, Tensor]:
    """The images, and the rows of them to train on and to validate."""
    options = config.image_options | {"random_crop": data.random_crop}
    dataset = ImageDataset(data.path_to_data, data, **options)
    rows = dataset.rows
    train_rows, val_rows = sources.split_rows(rows, val_fraction=data.val_fraction, seed=seed)
    return dataset, train_rows, sources.preview_first(rows, val_rows, PICTURES)


def build_model(
    config: VQVAEConfig, start: LoadedModel | None, dataset: ImageDataset, device: torch.device
) -> VQVAE:
    """The tokenizer for these images, with the weights of `start` if there is one."""
    found = {"in_channels": dataset.channels, "image_size": dataset.size}
    found |= {"value_range": dataset.value_range, "resampling": dataset.resampling}
    model = VQVAE(cli.build_or_error(replace, config, **found))
    if start is not None:
        model.load_state_dict(start.model.state_dict())
    return model.to(device).to(memory_format=torch.channels_last)


def build_adversary(
    config: AdversarialConfig, dataset: ImageDataset, schedule: Schedule, group: Distributed
) -> AdversarialLoss | None:
    """The discriminator and its losses, if --disc_weight is above 0."""
    if config.disc_weight == 0:
        return None
    sizes = dataset.channels, dataset.size, schedule.total_steps
    adversary = cli.build_or_error(AdversarialLoss, config, *sizes)
    if config.disc_adaptive_schedule and schedule.evaluate_every > adversary.schedule.ramp:
        group.print(
            f"warning: evaluations are {schedule.evaluate_every:,} steps apart, but the "
            f"adversarial loss ramps up within {adversary.schedule.ramp:,} steps: its schedule "
            "cannot adapt to the validation error in time; use a smaller --evaluate_every"
        )
    return adversary.to(group.device, memory_format=torch.channels_last)


def about_run(
    flags: cli.Flags, state: TrainState, config: VQVAEConfig, start: LoadedModel | None
) -> dict[str, Any]:
    """What MLflow shows of this training, and what it was made from; see `open_run`."""
    settings, data = state.settings, state.settings["path_to_data"]
    params = {name: settings[name] for name in ("quantizer", "codebook_size", "learning_rate")}
    params["latent_dim"] = config.latent_dim
    name = f"tokenizer-{config.quantizer}-K{config.codebook_size}-f{config.downsampling}"
    about: dict[str, Any] = {"name": tracking.name_of(flags, name), "flags": flags}
    about |= {"stage": "tokenizer", "params": params, "inputs": {data: sources.digest(data)}}
    if start is not None:
        about["inputs"][settings["init_from"]] = start.sha256
        about["upstream"] = start.lineage
    return about


def load_images(
    dataset: ImageDataset, data: DataConfig, state: TrainState, batches: list[Tensor], epoch: int
) -> Iterator[Tensor]:
    """Augmented training images (B, C, H, W) of each batch of rows."""
    seed = state.config.seed
    augmentation = Augmentation(data.horizontal_flip, data.random_crop, seed, epoch)
    return dataset.batches(batches, state.group.device, augmentation)


def log_training(state: TrainState, run: tracking.Run, counts: Tensor) -> None:
    """Log the means of the steps since the last log, and the use of the codes, which restarts."""
    values = state.averages.take()
    values |= metrics.codebook_metrics(state.group.all_reduce_sum(counts))
    values["psnr"] = metrics.psnr(values.get("mse", float("nan")))
    values["images_per_second"] = values.pop("steps_per_second") * state.config.batch_size
    run.metrics("train", values, state.progress.step)
    counts.zero_()


def evaluate_and_log(
    state: TrainState,
    run: tracking.Run,
    dataset: ImageDataset,
    rows: Tensor,
    adversary: AdversarialLoss | None,
) -> tuple[float, Tensor]:
    """Log metrics and pictures of the first validation images; see `evaluation_rows`.

    Returns the score, of which lower is better, and how often each code was used.
    """
    group, config, step = state.group, state.config, state.progress.step
    rows = evaluation_rows(rows, state)
    values, shown = evaluate(state.ema.model, dataset, rows, config.batch_size, group)
    if adversary is not None:
        if adversary.schedule.observe(values["mse"]):
            strength = adversary.schedule.strength
            group.print(f"the validation error rose: adversarial strength {strength:.3f}")
        values |= adversary.schedule.metrics()
    run.metrics("val", values, step)
    if group.is_main and pictures_are_due(state):
        log_pictures(run, state.ema.model, shown, step)
    group.print(f"step {step:>6,}  {in_words(values)}")
    return state.sign * values[config.best_metric], shown.counts


def report_best(state: TrainState, run: tracking.Run, dataset: ImageDataset, rows: Tensor) -> None:
    """Log the best tokenizer, and its metrics on all validation images; by one process."""
    folder, config = run.output_dir / "best", state.config
    best = load_model(folder, VQVAE, state.group.device).model
    alone = replace(state.group, world_size=1)
    values, seen = evaluate(best, dataset, rows, config.batch_size, alone)
    pair = seen.originals, seen.reconstructions
    run.picture("pictures/best_reconstructions", figures.comparison(*pair), 0)
    names = [dataset.rows[row].image_path for row in rows[:PICTURES]]
    run.table("reconstructions", figures.comparison_table(names, *pair))
    shown = dict.fromkeys((config.best_metric, "mse", "psnr", "ssim"))  # the first decides
    scores = {f"val/best_{name}": values[name] for name in shown}
    step, register = state.progress.step, config.register
    run.model(folder, scores, step, register=register, lower_is_better=state.sign > 0)
    print(f"best: {in_words(values)}\n{run.ui_hint}")


def make_optimizers(
    config: TrainingConfig, model: VQVAE, adversary: AdversarialLoss | None
) -> dict[str, Optimizer]:
    """AdamW for the tokenizer, and for the discriminator at a constant rate, if there is one."""
    optimizers = {"optimizer": make_optimizer(model, config, betas=(0.9, 0.99))}
    if adversary is not None:
        own = replace(config, learning_rate=adversary.config.disc_learning_rate)
        optimizers["disc_optimizer"] = make_optimizer(adversary, own, betas=(0.5, 0.9))
        for param_group in optimizers["disc_optimizer"].param_groups:
            param_group["scheduled"] = False
    return optimizers


def main(arguments: cli.Flags) -> None:
    resumed = continue_training(arguments)
    configs = read_configs(arguments)
    config, data, start_config, loss_config, adversarial_config = configs
    sign = sign_of(config.best_metric, metrics.SIGNS)
    group = distributed.init_distributed(config.device, config.seed)
    precision = distributed.pick_precision(config.precision, group.device, on_cpu="fp32")
    autocast = partial(distributed.autocast, group.device, precision)
    start, model_config = read_start(start_config, arguments)
    losses = cli.build_or_error(ReconstructionLoss, loss_config).to(group.device)
    dataset, train_rows, val_rows = read_images(data, model_config, config.seed)
    schedule = Schedule(config, len(train_rows), len(val_rows), group.world_size)
    cli.build_or_error(losses.check, dataset.size)
    model = build_model(model_config, start, dataset, group.device)
    adversary = build_adversary(adversarial_config, dataset, schedule, group)
    monitor = CollapseMonitor(reset=start_config.reset_codebook_on_collapse)
    # How often each code occurred since the last log.
    counts = torch.zeros(model.quantizer.options.num_codes, device=group.device)
    parts = {"adversary": adversary, "counts": counts, "collapse_monitor": monitor}
    settings = {k: v for one in configs for k, v in asdict(one).items()} | model.config.to_dict()
    settings["precision"] = precision
    parts["rows"], starts = RowDigests(dataset.rows), dataset.shard_starts(config.shuffle)
    optimizers = make_optimizers(config, model, adversary)
    state = TrainState(config, schedule, group, model, optimizers, settings, sign, parts, starts)
    state.changed_by_forward = [x for x in (model.quantizer, adversary) if x is not None]
    state.checkpoint.restore(resumed)
    if config.compile:
        compile_model(model)
    forward = group.wrap(model)
    load = partial(load_images, dataset, data, state)
    options: dict[str, Any] = {"accumulate": config.accumulate, "adversary": adversary}

    def step_on(images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        now = {"step": state.progress.step, "scale": state.loss_scale}
        return forward_backward(forward, images, losses, autocast, **now, **options)

    group.print(f"{dataset}\n{len(train_rows):,} images to train on, {len(val_rows):,} to validate")
    if config.dry_run:
        first = next(dataset.batches([val_rows[:PICTURES]], torch.device("cpu")))
        dry_run(state, train_rows, load, lambda x: step_on(x)[0], figures.grid(first))
        return
    about = about_run(arguments, state, model.config, start)
    run, checkpoints = open_run(state, tracking.Run, resumed=resumed, **about)
    if group.is_main:
        dataset.write_skipped(run.output_dir)

    with StopSignals(checkpoints.end_at_once) as stop, run, checkpoints:
        if state.progress.step == 0:
            checkpoints.save()
            evaluate_and_log(state, run, dataset, val_rows, adversary)
            state.averages.restart()
        for rows, images in loop.batches(state, checkpoints, train_rows, load):
            values, indices = step_on(images)
            # A side that its phase does not train has no gradients: its optimiser does nothing.
            if loop.optimizer_step(state, rows, values, dataset.name):
                counts += model.quantizer.count(indices)
            step = state.progress.step
            needs_baseline = adversary is not None and adversary.schedule.needs_baseline(step)
            evaluates = loop.evaluation_is_due(state) or needs_baseline
            if schedule.logs(step) or evaluates:
                log_training(state, run, counts)
            if evaluates:
                score, used = evaluate_and_log(state, run, dataset, val_rows, adversary)
                # The pixel error does not tell which model with an adversary is best: the last.
                adversarial = adversary is not None and adversary.schedule.strength > 0
                loop.keep_best(state, checkpoints, score, always=adversarial)
                final = step == schedule.total_steps
                for line in monitor.check(model.quantizer, used, final=final):
                    group.print(line)
            if loop.end_step(state, checkpoints, stop, evaluated=evaluates):
                break
        if group.is_main:
            report_best(state, run, dataset, val_rows)
    words = ["--model_dir", run.output_dir / "best", "--path_to_data", data.path_to_data]
    words += ["--run_id", run.run_id, *cli.changed_flags(data, ImageConfig)]
    group.print(cli.next_command("quantize_dataset.py", *words))
    group.shutdown()


def make_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    text = "flags that go together; others override it"
    parser.add_argument("--preset", choices=tuple(PRESETS), default=SMALL, help=text)
    cli.add_flags(parser, DataConfig, "images")
    cli.add_flags(parser, TrainingConfig, "training")
    cli.add_flags(parser, VQVAEConfig, "tokenizer")
    cli.add_flags(parser, all_options(), "quantizer")
    cli.add_flags(parser, StartConfig, "start")
    cli.add_flags(parser, LossConfig, "reconstruction losses")
    cli.add_flags(parser, AdversarialConfig, "adversarial loss")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser(), distributed.is_first_to_fail)
