"""Stage 1: fit the image tokenizer (encoder, codebook, decoder) to the images of a CSV."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import addresses, cli, distributed, figures, tracking
from utils.data.images import Augmentation, DataConfig, ImageDataset, read_images
from utils.distributed import Distributed
from utils.evaluation import metrics
from utils.files import sha256
from utils.provenance import LoadedModel, Provenance
from utils.training import checkpoint, resume
from utils.training.averages import Averages
from utils.training.averaging import WeightAverage
from utils.training.checkpoints import find_checkpoint
from utils.training.guard import Guard
from utils.training.optimizers import make_optimizer
from utils.training.resume import Progress
from utils.training.saving import Checkpoints
from utils.training.schedule import Schedule, TrainingConfig, find_output_dir, saved_if_it_fails
from utils.training.stopping import StopRequest
from vqvae import PRESETS, QUANTIZERS, VQVAE, VQVAEConfig
from vqvae.adversarial import AdversarialConfig, AdversarialLoss
from vqvae.config import all_options, training_only
from vqvae.inspect import Reconstructions, inspect_codebook, reconstruct
from vqvae.losses import LossConfig, ReconstructionLoss
from vqvae.quantizers.codebook import CollapseMonitor
from vqvae.train_step import compile_model, forward_backward

BEST_METRICS = (*metrics.IMAGE_METRICS, "psnr", *metrics.CODE_METRICS)  # for --best_metric
PICTURES = 32  # validation images that are shown


@dataclass(frozen=True)
class StartConfig:
    """What the training starts from, and whether its codebook may start over."""

    init_from: str = field(
        default="",
        metadata={
            "help": "tokenizer to start from: its weights and settings, with a new optimiser; "
            "--image_size may differ, and settings that do not change the network"
        },
    )
    reset_codebook_on_collapse: bool = field(
        default=False,
        metadata={"help": "start the codebook over from the data when few codes are in use"},
    )


def measure(images: Tensor, made: Tensor) -> dict[str, Tensor]:
    return {name: one.mean() for name, one in metrics.image_metrics(images, made).items()}


def evaluate(
    model: VQVAE, dataset: ImageDataset, rows: Tensor, batch_size: int, group: Distributed
) -> tuple[dict[str, float], Reconstructions]:
    """Figures of all validation images, and what was made of the first."""
    share = group.shard(rows)
    counted = len(share) > 0  # a process without rows takes part in the sums, at no weight
    batches = dataset.batches((share if counted else rows[:1]).split(batch_size), group.device)
    seen = reconstruct(model, batches, measure, keep=PICTURES, weight=float(counted))
    seen = seen._replace(counts=group.all_reduce_sum(seen.counts))
    values = {
        name: float(group.all_reduce_sum(value)) / len(rows) for name, value in seen.sums.items()
    }
    values["psnr"] = metrics.psnr(values["mse"])
    return values | metrics.codebook_metrics(seen.counts), seen


def in_words(values: dict[str, float]) -> str:
    return (
        f"val mse {values['mse']:.5f}, psnr {values['psnr']:.1f} dB, "
        f"usage {values['codebook_usage']:.0f} %, perplexity {values['perplexity']:.0f}"
    )


def log_pictures(run: tracking.Run, model: VQVAE, seen: Reconstructions, step: int) -> None:
    """Images and errors; how often the codes are used, where they lie, what each looks like."""
    codes = inspect_codebook(model, seen.counts)
    for name, picture in {
        "reconstructions": figures.comparison(seen.originals, seen.images),
        "code_usage": figures.bars(codes.usage),
        "code_embedding": figures.points(codes.projection, codes.usage),
        "decoded_codes": figures.grid(codes.decoded_codes),
    }.items():
        run.picture(f"pictures/{name}", picture, step)


def given_settings(flags: cli.Flags) -> dict[str, Any]:
    """The tokenizer's settings on the command line, as `VQVAEConfig.create` takes them."""
    names = {field.name for field in (*fields(VQVAEConfig), *fields(all_options()))}
    return {name: getattr(flags, name) for name in names & flags.given}


def read_start(init_from: str, flags: cli.Flags) -> tuple[LoadedModel | None, VQVAEConfig]:
    """The tokenizer of --init_from, if there is one, and the settings of the one to train.

    Raises:
        UserError: no such tokenizer, or flags that contradict it.
    """
    given = given_settings(flags)
    if not init_from:
        preset = flags.preset or "vqvae-small"
        return None, cli.build(VQVAEConfig.from_preset, preset, **given)
    if flags.preset:
        raise cli.UserError("--preset cannot be combined with --init_from; leave it out")
    start = checkpoint.load_model(addresses.fetch(init_from), VQVAE)
    settings = start.model.config.to_dict()
    for name in sorted(given.keys() & settings.keys() - {"image_size", *training_only()}):
        if given[name] != settings[name]:
            raise cli.UserError(
                f"--{name} {given[name]} contradicts {init_from}, where it is {settings[name]}; "
                "leave it out"
            )
    return start, cli.build(VQVAEConfig.create, **settings | given)


def open_run(
    output_dir: Path,
    progress: Progress,
    model: VQVAE,
    start: LoadedModel | None,
    group: Distributed,
    config: dict[str, Any],
) -> tracking.Run:
    """The run in MLflow, or that of the training which goes on."""
    shown = ("image_size", "quantizer", "codebook_size", "codebook_dim", "batch_size")
    params = {name: config[name] for name in (*shown, "learning_rate")}
    params["data"] = Path(config["path_to_data"]).name
    params["latent_dim"] = model.config.latent_dim
    params["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    run = tracking.Run(
        output_dir,
        stage="tokenizer",
        run_id=progress.run_id or None,
        continued=bool(progress.run_id),
        logged=progress.logged,
        experiment=config["experiment"],
        run_name=config["run_name"],
        enabled=group.is_main,
        config=config,
        params=params,
        inputs={config["path_to_data"]: sha256(Path(config["path_to_data"]))}
        | ({} if start is None else {config["init_from"]: start.sha256}),
        upstream=() if start is None else start.lineage,
    )
    progress.run_id = run.run_id
    return run


def report_best(
    run: tracking.Run,
    dataset: ImageDataset,
    rows: Tensor,
    config: TrainingConfig,
    group: Distributed,
    step: int,
) -> None:
    """Figures and pictures of the best tokenizer, which is logged as a whole."""
    folder = run.output_dir / "best"
    best = checkpoint.load_model(folder, VQVAE, group.device).model
    values, seen = evaluate(best, dataset, rows, config.batch_size, group)
    pair = seen.originals, seen.images
    run.picture("pictures/best_reconstructions", figures.comparison(*pair), 0)
    names = [dataset.rows[row].image_path for row in rows[:PICTURES]]
    run.table("reconstructions", figures.comparison_table(names, *pair))
    shown = dict.fromkeys((config.best_metric, "mse", "psnr", "ssim"))  # the first decides
    scores = {f"val/best_{name}": values[name] for name in shown}
    lower_is_better = metrics.sign_of(config.best_metric, BEST_METRICS) > 0
    run.model(folder, scores, step, register=config.register, lower_is_better=lower_is_better)
    print(f"best: {in_words(values)}")


def main(arguments: argparse.Namespace) -> None:
    config = cli.read_flags(TrainingConfig, arguments)
    beginning = cli.read_flags(StartConfig, arguments)
    loss_config = cli.read_flags(LossConfig, arguments)
    adversarial_config = cli.read_flags(AdversarialConfig, arguments)
    for terms in (loss_config, adversarial_config):
        cli.refuse_idle(terms, arguments)
    data = cli.read_flags(DataConfig, arguments)
    sign = metrics.sign_of(config.best_metric, BEST_METRICS)
    resumed = find_checkpoint(config.resume, config.output_dir)
    group = distributed.init_distributed(config.device, config.seed)
    precision = distributed.pick_precision(config.precision, group.device, on_cpu="fp32")
    autocast = partial(distributed.autocast, group.device, precision)

    start, model_config = read_start(beginning.init_from, arguments)
    resets = beginning.reset_codebook_on_collapse
    if resets and not QUANTIZERS[model_config.quantizer].supports_reset:
        raise cli.UserError(
            "--reset_codebook_on_collapse has no effect with the quantizer "
            f"{model_config.quantizer}; leave it out"
        )
    losses = cli.build(ReconstructionLoss, loss_config).to(group.device)
    dataset, train_rows, val_rows = read_images(
        data,
        size=model_config.image_size,
        channels=model_config.in_channels,
        seed=config.seed,
        num_workers=config.num_workers,
        processes=group.world_size,
    )
    schedule = Schedule(config, len(train_rows), len(val_rows), group.world_size)

    found = {"in_channels": dataset.channels, "image_size": dataset.size}
    cli.build(losses.check, *found.values())
    model = VQVAE(cli.build(replace, model_config, **found))
    if start is not None:
        model.load_state_dict(start.model.state_dict())
    model = model.to(group.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config, betas=(0.9, 0.99))
    average = WeightAverage(model, config.ema_decay)
    progress, averages = Progress(), Averages()
    counts = torch.zeros(model.config.num_codes, device=group.device)  # of codes since the last log
    monitor = CollapseMonitor(model.quantizer, group.device, reset=resets)
    disc_optimizer = None
    adversary = None
    if adversarial_config.disc_weight > 0:
        adversary = cli.build(
            AdversarialLoss, adversarial_config, *found.values(), schedule.total_steps
        ).to(group.device, memory_format=torch.channels_last)
        disc_optimizer = make_optimizer(adversary, config, betas=(0.5, 0.9))
    settings = asdict(config) | asdict(data) | model.config.to_dict()
    settings |= asdict(beginning) | asdict(loss_config) | asdict(adversarial_config)
    settings |= {"data_sha256": resume.fingerprint(dataset.rows), "precision": precision}
    parts = {"optimizer": optimizer, "average": average, "averages": averages, "counts": counts}
    parts |= {"adversary": adversary, "disc_optimizer": disc_optimizer}
    parts |= {"collapse_monitor": monitor}
    state = resume.State(group, model, settings, progress=progress, **parts)
    state.restore(resumed)
    if config.compile:
        compile_model(model, adversary)
    forward = group.wrap(model)

    name = f"tokenizer-{model.config.quantizer}-K{model.config.codebook_size}"
    default_name = f"{name}-f{model.config.downsampling}"
    output_dir = find_output_dir(config, resumed, default_name)
    named = settings | {"run_name": config.run_name or default_name}
    run = open_run(output_dir, progress, model, start, group, named)
    checkpoints = Checkpoints(run, config.checkpoint_every, group, state, resumed)
    changing = model.quantizer, adversary
    guard = Guard(group, progress, config, dataset.name, changing=changing)
    origin = Provenance(run.run_id, config.seed, data.val_fraction, run.lineage)
    if group.is_main:
        dataset.write_skipped(output_dir)
    group.print(dataset)
    group.print(f"{len(train_rows):,} images to train on, {len(val_rows):,} to validate")
    group.print(f"{schedule} on {group.device} in {precision}; writing to {output_dir}")
    disc_schedule = None if adversary is None else adversary.schedule
    if disc_schedule is not None and disc_schedule.needs_more_evaluations(schedule.evaluate_every):
        group.print(
            f"warning: evaluations are {schedule.evaluate_every:,} steps apart, but the "
            f"adversarial loss ramps up within {disc_schedule.ramp:,} steps: its schedule cannot "
            "adapt to the validation error in time; use a smaller --evaluate_every"
        )

    def load(batches: list[Tensor], epoch: int) -> Iterator[Tensor]:
        augmentation = Augmentation(data.horizontal_flip, data.random_crop, config.seed, epoch)
        images = dataset.batches(batches, group.device, augmentation)
        return saved_if_it_fails(images, group, save)

    def evaluation() -> float:
        """Evaluate, and log figures and pictures; the figure of --best_metric, to make small."""
        values, shown = evaluate(average.model, dataset, val_rows, config.batch_size, group)
        if disc_schedule is not None:
            if disc_schedule.observe(values["mse"]):
                group.print(
                    f"the validation error rose: adversarial strength {disc_schedule.strength:.3f}"
                )
            values |= disc_schedule.metrics()
        run.metrics("val", values, progress.step)
        if group.is_main:
            log_pictures(run, average.model, shown, progress.step)
        group.print(f"step {progress.step:>6,}  {in_words(values)}")
        return sign * values[config.best_metric]

    def save() -> None:
        checkpoints.save(checkpoint.model_files(model, origin))

    with StopRequest(checkpoints.leave) as stop, run, checkpoints:
        if progress.step == 0:
            save()
            evaluation()
            averages.restart()
        for images in schedule.batches(train_rows, progress, group, load):
            learning_rate = schedule.learning_rate(progress.step)
            guard.remember()
            values, indices = forward_backward(
                forward,
                images,
                losses,
                autocast,
                accumulate=config.accumulate,
                adversary=adversary,
                last_layer=model.decoder.conv_out.weight,
                step=progress.step,
            )
            # A side that its phase does not train has no gradients, so that its step does nothing.
            optimizers = {"gradient_norm": optimizer}
            if adversary is not None:
                adversary.average_gradients()
                optimizers["disc_gradient_norm"] = disc_optimizer
            progress.step += 1
            if guard.step(optimizers, values, learning_rate, schedule.rows):
                average.update(model, progress.step)
                averages.add({**values, "learning_rate": learning_rate})
                chosen = model.quantizer.count(indices)
                counts += chosen
                monitor.update(chosen)

            evaluates = schedule.evaluates(progress.step)
            if disc_schedule is not None:
                evaluates |= disc_schedule.needs_baseline(progress.step)
            if schedule.logs(progress.step) or evaluates:
                values = averages.take() | metrics.codebook_metrics(group.all_reduce_sum(counts))
                values["psnr"] = metrics.psnr(values.get("mse", float("nan")))
                values["images_per_second"] = values.pop("steps_per_second") * config.batch_size
                run.metrics("train", values, progress.step)
                counts.zero_()
            if evaluates:
                best = progress.improved(evaluation())
                if disc_schedule is not None and disc_schedule.strength > 0:
                    # With an adversary the error of pixels does not say which is best: the last.
                    best, progress.bad_evaluations = True, 0
                if best:
                    checkpoints.save_best(checkpoint.model_files(average.model, origin))
                for line in monitor.check(final=progress.step == schedule.total_steps):
                    group.print(line)
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
            report_best(run, dataset, val_rows, config, replace(group, world_size=1), progress.step)
            print(run.ui_hint)
    if group.is_main:
        words = ("quantize_dataset.py", "--model_dir", output_dir / "best", "--path_to_data")
        print(cli.next_command(*words, data.path_to_data, "--run_id", run.run_id))
    group.shutdown()


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_presets(
        {
            # The large ones were published with about this learning rate.
            name: {**preset, "learning_rate": 1e-4} if preset else {}
            for name, preset in PRESETS.items()
        }
    )
    cli.add_flags(parser, DataConfig, "images")
    cli.add_flags(parser, TrainingConfig, "training")
    cli.add_flags(parser, VQVAEConfig, "tokenizer")
    cli.add_flags(parser, all_options(), "quantizer")
    cli.add_flags(parser, StartConfig, "start")
    cli.add_flags(parser, LossConfig, "reconstruction losses")
    cli.add_flags(parser, AdversarialConfig, "adversarial loss")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
