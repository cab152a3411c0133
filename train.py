"""Stage 3: fit a GPT to the codebook indices of a data set."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

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
from utils.model_folder import load_model
from utils.provenance import LoadedModel, Provenance, joined
from utils.training import loop
from utils.training.checkpoint import Checkpointer, continue_training, find_output_dir
from utils.training.config import TrainingConfig
from utils.training.loop import Schedule, TrainState
from utils.training.optim import OptimizerConfig, make_optimizer
from utils.training.state import fingerprint

BEST_METRICS = ("bits_per_token", "fd_classifier", "label_agreement")  # for --best_metric
SAMPLES = 64  # images generated at each evaluation
NO_BETTER_WARNING = (
    "warning: {:.3f} bits per token are no better than the unigram baseline of {:.3f}, which "
    "ignores the order of the indices, so that samples will be noise; train longer, on more "
    "images, or with a tokenizer of a smaller --codebook_size"
)


class Validation(NamedTuple):
    """What evaluations need: data, tokenizer for pictures, baselines in bits per token."""

    data: IndexDataset
    tokenizer: LoadedModel | None
    evaluator: Any  # `SampleEvaluator` with --fd_samples, else None
    precision: str
    baselines: dict[str, float]


def make_validation(
    data: IndexDataset,
    tokenizer: LoadedModel | None,
    source: IndicesConfig,
    group: distributed.Distributed,
    precision: str,
    seed: int,
) -> Validation:
    """Compute the baselines and, for --fd_samples, prepare the comparison with real images."""
    evaluator = None
    if source.fd_samples:
        from utils.evaluation.samples import SampleEvaluator  # only where samples are compared

        splits = data.train_rows, data.val_rows[: source.fd_samples]
        evaluator = SampleEvaluator(
            tokenizer, data.grids, data.rows, *splits, seed=seed, group=group
        )
    splits = data.grids[data.train_rows], data.grids[data.val_rows]
    bits = metrics.baselines(*splits, data.vocabulary.codebook_size, data.vocabulary.depth)
    names = "unigram_bits_per_token", "bigram_bits_per_token"
    baselines = dict(zip(names, bits, strict=True))
    return Validation(data, tokenizer, evaluator, precision, baselines)


def load_tokenizer(address: str, device: torch.device) -> LoadedModel | None:
    """The tokenizer that decodes samples; None without one, when its package is not imported."""
    if not address:
        return None
    from vqvae import VQVAE

    return load_model(address, VQVAE, device)


def build_model(config: GPTConfig, device: torch.device, *, flex_attention: bool) -> GPT:
    if not flex_attention:
        return GPT(config).to(device)
    if device.type != "cuda":
        raise cli.UserError(f"--flex_attention needs CUDA, not {device}; omit it")
    attend = FlexAttention(
        device,
        grid=config.latent_dim,
        window=config.window_size,
        prefix=config.prefix_length,
        depth=config.depth,
    )
    return GPT(config, attend=attend).to(device)


def read_codes(tokenizer: LoadedModel | None, codebook_size: int, device: torch.device) -> Tensor:
    """The codes (K, D) of the tokenizer; a UserError without one."""
    if tokenizer is None:
        raise cli.UserError(
            "--start_from_codebook and --label_smoothing need the tokenizer; add --model_dir"
        )
    with torch.no_grad():
        indices = torch.arange(codebook_size, device=device)[:, None, None]
        return tokenizer.model.embed(indices).flatten(1)


def load_batches(
    data: IndexDataset, device: torch.device, rows: Sequence[Tensor], epoch: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Prefix and grids of each batch of rows, on the device; of crops in an `epoch`."""
    for classes, conditions, grids in data.batches(rows, epoch):
        yield make_prefix(classes, conditions).to(device), grids.to(device)


def random_orders(config: GPTConfig, done: float) -> float:
    """The probability of a random order after a fraction `done` of the training."""
    return random_order_probability(config.order_anneal, done) if config.order_anneal else 0.0


def model_inputs(prefix: Tensor, grids: Tensor, config: GPTConfig, done: float) -> list[Tensor]:
    """The inputs of a training step: conditioning is dropped for guidance, orders are sampled."""
    generator = torch.default_generator  # as of dropout: checkpoints hold its state
    inputs = [drop_conditioning(prefix, config, generator), grids]
    if config.order_anneal is not None:
        inputs.append(sample_permutations(grids, random_orders(config, done), generator))
    return inputs


def train_step(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor], precision: str, accumulate: int
) -> Tensor:
    """Accumulate the gradients of one batch, in micro-batches. Returns its bits per token.

    `loss` is `GPT.loss`, whose arguments the `inputs` are: prefix, indices and perhaps orders.
    """
    bits = torch.zeros((), device=inputs[0].device)
    for micro_batch in zip(*(x.chunk(accumulate) for x in inputs), strict=True):
        with distributed.autocast(bits.device, precision):
            nats = loss(*micro_batch).mean()
        (nats / accumulate).backward()
        bits += nats.detach() / accumulate / math.log(2)
    return bits


@torch.inference_mode()
def evaluate(
    model: GPT,
    batches: Iterator[tuple[Tensor, Tensor]],
    precision: str,
    group: distributed.Distributed,
) -> Tensor:
    """Bits per token at each latent position (h, w), over the batches of all processes."""
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


def sample_grid(model: GPT, data: IndexDataset, tokenizer: LoadedModel | None) -> Image.Image:
    """A picture of samples, always from the same random numbers.

    They are of all classes in turn, or of the classes and conditions of the first validation
    images. Without a tokenizer the (first) indices themselves are shown as shades of grey.
    """
    training_mode = model.training
    model.eval()
    prefix = torch.arange(SAMPLES) % max(1, len(data.vocabulary.class_names))
    if data.conditions is not None:
        prefix = make_prefix(*data.prefix_inputs(data.val_rows[:SAMPLES]))
    indices = generate(model, prefix, seed=0)
    model.train(training_mode)
    if tokenizer is None:
        first = indices if model.config.depth == 1 else indices[..., 0]
        return figures.grid(first[:, None] / (model.config.codebook_size - 1) * 2 - 1)
    with torch.inference_mode():
        return figures.grid(tokenizer.model.decode(indices.to(model.head.weight.device)))


def open_run(
    state: TrainState,
    output_dir: Path,
    run_name: str,
    flags: cli.Flags,
    data: IndexDataset,
    tokenizer: LoadedModel | None,
) -> tracking.Run:
    """The MLflow run of this training: a new one, or the one that a resumed training continues."""
    settings, model = state.settings | {"run_name": run_name}, cast(GPT, state.model)
    params = {name: settings[name] for name in ("window_size", "batch_size", "learning_rate")}
    params["shape"] = f"{model.config.num_layers} x {model.config.dim}"
    params["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    tokenizer_run_id = data.vocabulary.tokenizer_run_id
    run = tracking.Run(
        output_dir,
        stage="gpt",
        run_id=state.progress.run_id or None,
        continued=bool(state.progress.run_id),
        experiment=state.config.experiment,
        run_name=run_name,
        enabled=state.group.is_main,
        config=settings,
        params=data.params | params,
        flags=flags,
        tags={"tokenizer_run_id": tokenizer_run_id},
        inputs={settings["path_to_data"]: digest(data.path)}
        | ({} if tokenizer is None else {settings["model_dir"]: tokenizer.sha256}),
        upstream=joined(lineage_of(data.path), () if tokenizer is None else tokenizer.lineage),
    )
    state.progress.run_id = run.run_id
    return run


def evaluate_and_log(state: TrainState, run: tracking.Run, validation: Validation) -> float:
    """Log metrics and samples of the present model; the score, of which lower is better."""
    data, model, group = validation.data, state.ema.model, state.group
    config, step = state.config, state.progress.step
    values: dict[str, float] = {}
    if validation.evaluator is not None:
        inputs = make_prefix(*data.prefix_inputs(validation.evaluator.rows))
        values |= validation.evaluator.metrics(partial(generate, model.eval(), inputs))
    rows = group.shard(data.val_rows)  # none, where there are fewer rows than processes
    parts = rows.split(config.batch_size) if len(rows) else ()
    batches = load_batches(data, group.device, parts)
    by_position = evaluate(model, batches, validation.precision, group)
    values["bits_per_token"] = float(by_position.mean())
    run.metrics("val", values | validation.baselines, step)
    run.picture("pictures/bits_by_position", figures.heat(by_position), step)
    if group.is_main:
        run.picture("pictures/samples", sample_grid(model, data, validation.tokenizer), step)
    group.print(f"step {step:>6,}  val {values['bits_per_token']:.3f} bits per token")
    return metrics.sign_of(config.best_metric, BEST_METRICS) * values[config.best_metric]


def log_training(state: TrainState, run: tracking.Run, tokens_per_image: int) -> None:
    """Log the means of the steps since the last log."""
    values = state.averages.take()
    images_per_second = values.pop("steps_per_second") * state.config.batch_size
    values["tokens_per_second"] = images_per_second * tokens_per_image
    run.metrics("train", values, state.progress.step)


def report_best(state: TrainState, run: tracking.Run, validation: Validation) -> None:
    """Log the best GPT with samples and its score, and print both; by one process."""
    data, config, device = validation.data, state.config, state.group.device
    folder = run.output_dir / "best"
    best = load_model(folder, GPT, device).model
    run.picture("pictures/best_samples", sample_grid(best, data, validation.tokenizer), 0)
    name, sign = config.best_metric, metrics.sign_of(config.best_metric, BEST_METRICS)
    bits = value = sign * state.progress.best
    scores, step, register = {f"val/best_{name}": value}, state.progress.step, config.register
    run.model(folder, scores, step, register=register, lower_is_better=sign > 0)
    print(f"best: val {name} {value:.3f}")
    if name != "bits_per_token":
        batches = load_batches(data, device, data.val_rows.split(config.batch_size))
        alone = replace(state.group, world_size=1)
        bits = float(evaluate(best, batches, validation.precision, alone).mean())
    unigram, bigram = validation.baselines.values()
    print(f"bits per token: {bits:.3f}, unigram {unigram:.3f}, bigram {bigram:.3f}")
    if not bits < unigram:
        print(NO_BETTER_WARNING.format(bits, unigram))
    print(run.ui_hint)


def main(arguments: argparse.Namespace) -> None:
    resumed = continue_training(cast(cli.Flags, arguments))
    config = cli.read_flags(TrainingConfig, arguments)
    optimizer_config = cli.read_flags(OptimizerConfig, arguments)
    source = cli.read_flags(IndicesConfig, arguments)
    metrics.sign_of(config.best_metric, BEST_METRICS[: 3 if source.fd_samples else 1])
    group = distributed.init_distributed(config.device, config.seed)
    precision = distributed.pick_precision(config.precision, group.device, on_cpu="bf16")

    tokenizer = load_tokenizer(source.model_dir, group.device)
    data = IndexDataset(
        addresses.fetch(source.path_to_data),
        tokenizer,
        latent_dim=arguments.latent_dim,
        val_fraction=source.val_fraction,
        seed=config.seed,
    )
    schedule = Schedule(config, len(data.train_rows), len(data.val_rows), group.world_size)
    validation = make_validation(data, tokenizer, source, group, precision, config.seed)

    model_config = cli.read_flags(GPTConfig, arguments, **data.vocabulary.model_values)
    model_config = model_config.resolve_defaults()
    model = build_model(model_config, group.device, flex_attention=arguments.flex_attention)
    if model_config.needs_codebook:
        model.use_codebook(read_codes(tokenizer, model_config.codebook_size, group.device))
    for_muon = model.linear_maps() if optimizer_config.optimizer == "muon" else None
    optimizer = make_optimizer(model, config, (0.9, 0.95), for_muon)
    settings = asdict(optimizer_config) | asdict(source) | asdict(model_config)
    settings |= {"data_sha256": fingerprint(data.rows, *data.arrays), "precision": precision}
    state = TrainState(config, schedule, group, model, {"optimizer": optimizer}, settings)
    state.checkpoint.restore(resumed)
    loss = torch.compile(model.loss) if config.compile else model.loss
    loss = partial(loss, forward=group.wrap(model))

    name = f"gpt-{model_config.num_layers}x{model_config.dim}-w{model_config.window_size}"
    flags = cast(cli.Flags, arguments)
    name = tracking.name_of(flags, name)
    output_dir = find_output_dir(config.output_dir, resumed, name, is_main=group.is_main)
    name = name if config.output_dir else output_dir.name
    run = open_run(state, output_dir, name, flags, data, tokenizer)
    origin = Provenance(run.run_id, config.seed, source.val_fraction, run.lineage)
    vocabulary = {FILE: data.vocabulary.content()}
    checkpoints = Checkpointer(run, state.checkpoint, origin, resumed, vocabulary)
    group.print(data)
    group.print(f"{schedule} on {group.device} in {precision}; writing to {output_dir}")
    unigram, bigram = validation.baselines.values()
    group.print(f"baselines: unigram {unigram:.3f}, bigram {bigram:.3f} bits per token")

    with loop.StopSignals(checkpoints.end_at_once) as stop, run, checkpoints:
        if state.progress.step == 0:
            checkpoints.save()
            evaluate_and_log(state, run, validation)
            state.averages.restart()
        load = partial(load_batches, data, group.device)
        for rows, (prefix, grids) in loop.batches(state, checkpoints, data.train_rows, load):
            done = state.progress.step / schedule.total_steps
            inputs = model_inputs(prefix, grids, model_config, done)
            bits = train_step(loss, inputs, precision, config.accumulate)
            loop.optimizer_step(state, rows, {"bits_per_token": bits}, data.name)
            step = state.progress.step
            if schedule.logs(step):
                log_training(state, run, data.grids[0].numel())
            if schedule.evaluates(step):
                score = evaluate_and_log(state, run, validation)
                # Scores of a model that still learns random orders do not count.
                if random_orders(model_config, step / schedule.total_steps) == 0:
                    loop.keep_best(state, checkpoints, score)
            if loop.end_step(state, checkpoints, stop, evaluated=schedule.evaluates(step)):
                break
        if group.is_main:
            report_best(state, run, validation)
    if group.is_main:
        words = ["transformer_generation.py", "--model_path", output_dir / "best"]
        words += ["--vocabulary_path", output_dir / "best" / FILE, "--run_id", run.run_id]
        words += [] if data.conditions is None else ["--conditions", data.path]
        print(cli.next_command(*words))
    group.shutdown()


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    cli.add_flags(parser, IndicesConfig, "indices", required=False)
    cli.add_flags(parser, TrainingConfig, "training")
    cli.add_flags(parser, GPTConfig, "transformer")
    cli.add_flags(parser, OptimizerConfig, "optimiser")
    parser.add_argument(
        "--flex_attention", action="store_true", help="the window by FlexAttention, on CUDA"
    )
    parser.set_defaults(weight_decay=0.05, patience=5, best_metric="bits_per_token")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser(), torchrun=True)
