"""Stage 1: fit the image tokenizer (encoder, codebook, decoder) to the images of a CSV."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from utils import checkpoint, cli, figures, metrics, processes, resume, tracking, training
from utils.averaging import WeightAverage
from utils.checkpoints import find_checkpoint
from utils.guard import Guard
from utils.images import Augmentation, DataConfig, ImageDataset
from utils.saving import Checkpoints
from utils.stopping import StopRequest
from utils.table import split_rows
from vqvae import PRESETS, VQVAE, VQVAEConfig
from vqvae.adversary import Adversary, Autopilot
from vqvae.gradients import add_discriminator_gradients, add_gradients
from vqvae.losses import ObjectiveConfig, ReconstructionLoss

PICTURES = 32  # validation images that are shown
LOW_USAGE = 20  # percent
LOW_USAGE_WARNING = (
    "warning: only {:.0f} % of the codebook is in use, so that the images will lack detail; use "
    "--codebook_rescue, a smaller --codebook_size or --learning_rate, or a higher --revive_below"
)


@torch.inference_mode()
def evaluate(
    model: VQVAE, dataset: ImageDataset, rows: Tensor, batch_size: int, group: processes.Processes
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Validation metrics, and the first images with their reconstructions."""
    model.eval()
    counts = torch.zeros(model.config.num_codes, device=group.device)
    sums: dict[str, Tensor] = {}
    shown: list[tuple[Tensor, Tensor]] = []
    share = group.share(rows)
    weight = 1.0 if len(share) else 0.0
    if len(share) == 0:  # a process without rows takes part in the sums, at no weight
        share = rows[:1]
    for images in dataset.batches(share.split(batch_size), group.device):
        reconstruction, quantized = model(images)
        reconstruction = reconstruction.clamp(-1, 1)
        values = {"mse": metrics.squared_error(images, reconstruction).mean()}
        values |= {f"{name}_loss": value for name, value in quantized.losses.items()}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * (weight * len(images))
        counts += weight * model.quantizer.count(quantized.indices)
        if len(shown) * batch_size < PICTURES:
            shown.append((images.cpu(), reconstruction.cpu()))
    model.train()
    values = {name: float(group.sum(value)) / len(rows) for name, value in sums.items()}
    values["psnr"] = metrics.psnr(values["mse"])
    values |= metrics.codebook_metrics(group.sum(counts))
    originals, reconstructions = (torch.cat(part)[:PICTURES] for part in zip(*shown, strict=True))
    return values, originals, reconstructions


def picture_table(
    dataset: ImageDataset, rows: Tensor, originals: Tensor, reconstructions: Tensor
) -> dict[str, list]:
    """A table of validation images, the same in every run on the same split."""
    errors = metrics.squared_error(originals, reconstructions).tolist()
    return {
        "image_path": [dataset.rows[row].image_path for row in rows[: len(originals)]],
        "original": [figures.enlarge(figures.to_pil(image), 128) for image in originals],
        "reconstruction": [
            figures.enlarge(figures.to_pil(image), 128) for image in reconstructions
        ],
        "mse": errors,
    }


def main(arguments: argparse.Namespace) -> None:
    config = cli.read_flags(training.TrainingConfig, arguments)
    objective = cli.read_flags(ObjectiveConfig, arguments)
    data = cli.read_flags(DataConfig, arguments)
    model_config = cli.read_flags(VQVAEConfig, arguments)
    resumed = find_checkpoint(config.resume, config.output_dir)
    group = processes.join_processes(config.device, config.seed)
    precision = processes.pick_precision(config.precision, group.device, on_cpu="fp32")

    losses = cli.build(ReconstructionLoss, objective).to(group.device)
    start = None
    if objective.init_from:
        start = checkpoint.load_model(tracking.fetch(objective.init_from), VQVAE, VQVAEConfig).model
        size = model_config.image_size or start.config.image_size
        model_config = replace(start.config, image_size=size)

    # The images
    dataset = ImageDataset(
        data.path_to_data,
        size=model_config.image_size,
        channels=model_config.in_channels,
        random_crop=data.random_crop,
        allow_outside_paths=data.allow_outside_paths,
        max_pixels=data.max_pixels,
        skip_bad_images=data.skip_bad_images,
        num_workers=config.num_workers,
        processes=group.count,
    )
    train_rows, val_rows = split_rows(
        dataset.rows,
        val_fraction=data.val_fraction,
        seed=config.seed,
        folder=dataset.path.parent,
    )
    schedule = training.Schedule(config, len(train_rows), len(val_rows), group.count)

    # The model
    model_config = cli.build(
        replace, model_config, image_size=dataset.size, in_channels=dataset.channels
    )
    model = VQVAE(model_config).to(group.device, memory_format=torch.channels_last)
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = training.make_optimizer(model, config, betas=(0.9, 0.99))
    average = WeightAverage(model, config.ema_decay)
    progress, averages = resume.Progress(), metrics.Averages()
    counts = torch.zeros(model_config.num_codes, device=group.device)  # of codes since the last log
    adversary = disc_optimizer = autopilot = None
    if objective.disc_weight > 0:
        adversary = cli.build(Adversary, objective, dataset.channels, dataset.size)
        adversary = adversary.to(group.device, memory_format=torch.channels_last)
        disc_optimizer = training.make_optimizer(adversary, config, betas=(0.5, 0.9))
        autopilot = Autopilot.plan(objective, schedule.total_steps)
    settings = asdict(config) | asdict(data) | asdict(model_config) | asdict(objective)
    settings |= {"data_sha256": resume.fingerprint(dataset.rows), "precision": precision}
    parts = {"optimizer": optimizer, "average": average, "averages": averages, "counts": counts}
    parts |= {"adversary": adversary, "disc_optimizer": disc_optimizer, "autopilot": autopilot}
    state = resume.State(group, model, settings, progress=progress, **parts)
    state.restore(resumed)
    if config.compile:
        model.compile()
    forward = group.wrap(model)
    autocast = partial(processes.autocast, group.device, precision)

    # The run
    name = f"tokenizer-{model_config.quantizer}-K{model_config.codebook_size}"
    output_dir = training.find_output_dir(
        config, resumed, default_name=f"{name}-f{model_config.downsampling}"
    )
    run = tracking.Run(
        output_dir,
        stage="tokenizer",
        run_id=progress.run_id or None,
        continued=resumed is not None,
        logged=progress.logged,
        experiment=config.experiment,
        run_name=config.run_name,
        enabled=group.first,
        config=settings,
        params={
            "data": Path(data.path_to_data).name,
            "image_size": dataset.size,
            "latent_dim": model_config.latent_dim,
            "quantizer": model_config.quantizer,
            "codebook_size": model_config.codebook_size,
            "codebook_dim": model_config.codebook_dim,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "batch_size": config.batch_size,
            "learning_rate": config.learning_rate,
        },
    )
    progress.run_id = run.run_id
    checkpoints = Checkpoints(run, config.checkpoint_every, group, state, resumed)
    guard = Guard(group, progress, config, changing=(model.quantizer, adversary))
    if group.first:
        dataset.write_skipped(output_dir)
    group.print(dataset)
    group.print(f"{len(train_rows):,} images to train on, {len(val_rows):,} to validate")
    group.print(f"{schedule} on {group.device} in {precision}; writing to {output_dir}")

    def evaluation() -> float:
        """Evaluate, and log figures and pictures; the validation MSE."""
        values, *pictures = evaluate(average.model, dataset, val_rows, config.batch_size, group)
        if adversary is not None and autopilot.observe(values["mse"]):
            group.print(f"autopilot: images got worse, strength now {autopilot.strength:.3f}")
        run.metrics("val", values, progress.step)
        run.picture("pictures/reconstructions", figures.comparison(*pictures), progress.step)
        group.print(
            f"step {progress.step:>6,}  val mse {values['mse']:.5f}  psnr {values['psnr']:.1f} dB"
            f"  usage {values['codebook_usage']:.0f} %  perplexity {values['perplexity']:.0f}"
        )
        return values["mse"]

    origin = checkpoint.Provenance(run.run_id, cli.command_line(), config.seed, data.val_fraction)

    def save(*, best: bool) -> None:
        models = (checkpoint.model_files(one, origin) for one in (model, average.model))
        checkpoints.save(*models, best=best)

    with run, checkpoints, StopRequest() as stop:
        if progress.step == 0:
            save(best=False)
            evaluation()
            averages.restart()

        def load(batches: list[Tensor], epoch: int) -> Iterator[Tensor]:
            augmentation = Augmentation(data.horizontal_flip, data.random_crop, config.seed, epoch)
            images = dataset.batches(batches, group.device, augmentation)
            return training.saved_if_it_fails(images, group, partial(save, best=False))

        for images in schedule.batches(train_rows, progress, group, load):
            learning_rate = schedule.learning_rate(progress.step)
            phase = "before" if adversary is None else autopilot.phase(progress.step)
            guard.remember()
            optimizers = {}
            if phase == "alone":
                values, indices = add_discriminator_gradients(
                    model, images, autocast, accumulate=config.accumulate, adversary=adversary
                )
            else:
                acting = {}
                if phase == "both":
                    acting = {"adversary": adversary, "last": model.decoder.conv_out.weight}
                    acting["strength"] = autopilot.advance()
                values, indices = add_gradients(
                    forward, images, losses, autocast, accumulate=config.accumulate, **acting
                )
                optimizers["gradient_norm"] = optimizer
            if phase != "before":
                values["disc_strength"] = autopilot.strength
                adversary.average_gradients()
                optimizers["disc_gradient_norm"] = disc_optimizer
            progress.step += 1
            if guard.step(optimizers, values, learning_rate, schedule.rows):
                average.update(model, progress.step)
                averages.add({**values, "learning_rate": learning_rate})
                counts += model.quantizer.count(indices)

            if schedule.logs(progress.step):
                values = averages.take() | metrics.codebook_metrics(group.sum(counts))
                values["psnr"] = metrics.psnr(values.get("mse", float("nan")))
                values["images_per_second"] = values.pop("steps_per_second") * config.batch_size
                run.metrics("train", values, progress.step)
                counts.zero_()
            if schedule.evaluates(progress.step):
                if values["codebook_usage"] < LOW_USAGE:
                    group.print(LOW_USAGE_WARNING.format(values["codebook_usage"]))
                    if objective.codebook_rescue and model.quantizer.restart():
                        group.print("codebook rescue: all codes start anew from the next batch")
                best = progress.improved(evaluation())
                if adversary is not None and autopilot.strength > 0:
                    # With an adversary the error of pixels does not say which is best: the last.
                    best, progress.bad_evaluations = True, 0
                save(best=best)
                averages.restart()
            elif checkpoints.due():
                save(best=False)
            stop.obeyed(group, partial(save, best=False))
            if progress.exhausted(config.patience):
                group.print(f"no better validation mse in {config.patience} evaluations: stopping")
                break

        if group.first:
            best = checkpoint.load_model(output_dir / "best", VQVAE, VQVAEConfig, group.device)
            alone = replace(group, count=1)
            values, *pictures = evaluate(best.model, dataset, val_rows, config.batch_size, alone)
            run.metrics(
                "val", {f"best_{name}": values[name] for name in ("mse", "psnr")}, progress.step
            )
            run.picture("pictures/best_reconstructions", figures.comparison(*pictures), 0)
            run.table("reconstructions", picture_table(dataset, val_rows, *pictures))
            run.folder(output_dir / "best", "checkpoints/best")
            print(
                f"best: val mse {values['mse']:.5f}, psnr {values['psnr']:.1f} dB, "
                f"usage {values['codebook_usage']:.1f} %, perplexity {values['perplexity']:.0f}"
            )
            print(run.how_to_look)
    if group.first:
        print(
            cli.next_command(
                *("quantize_dataset.py", "--model_dir", output_dir / "best"),
                *("--path_to_data", data.path_to_data, "--run_id", run.run_id),
            )
        )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_presets(
        {
            # The large ones were published with about this learning rate.
            name: {**preset, "learning_rate": 1e-4} if preset else {}
            for name, preset in PRESETS.items()
        }
    )
    for config_class in (DataConfig, VQVAEConfig, ObjectiveConfig, training.TrainingConfig):
        cli.add_flags(parser, config_class)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
