"""Stage 3: fit a GPT to the codebook indices of a data set."""

from utils.cli import start_script

if __name__ == "__main__":
    start_script()

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from transformer import GPT, FineTuningConfig, FlexAttention, GPTConfig, make_prefix
from utils import addresses, cli, distributed, tracking
from utils.data.index_dataset import IndexDataset, IndicesConfig
from utils.data.indices import digest, lineage_of
from utils.data.vocabulary import FILE, Vocabulary, read_vocabulary
from utils.distributed import Distributed
from utils.provenance import LoadedModel, joined, load_model
from utils.training import loop
from utils.training.checkpoint import continue_training
from utils.training.config import TrainingConfig, sign_of
from utils.training.loop import Schedule, TrainState
from utils.training.optim import OptimizerConfig, make_optimizer
from utils.training.start import dry_run, evaluation_rows, open_run, pictures_are_due
from utils.training.state import StopSignals, fingerprint

BEST_METRICS = {"bits_per_token": 1, "fd_classifier": 1, "label_agreement": -1}  # and their signs
EARLY = 8  # after this part of the steps, a model is kept to guide the last one by
SAMPLES = 64  # images generated at each evaluation


class Start(NamedTuple):
    """What a training starts from: another GPT, if any, and which of its classes are ours."""

    tuning: FineTuningConfig
    gpt: LoadedModel | None = None
    classes: Sequence[int | None] = ()  # of the other GPT, for each of ours; None: new


class Validation(NamedTuple):
    """What evaluations need: data, tokenizer for pictures, baselines in bits per token."""

    data: IndexDataset
    tokenizer: LoadedModel | None
    evaluator: Any  # `SampleEvaluator` with --fd_samples, else None
    unigram: float
    bigram: float


def make_validation(
    data: IndexDataset, tokenizer: LoadedModel | None, flags: cli.Flags, group: Distributed
) -> Validation:
    """Compute the baselines and, for --fd_samples, prepare the comparison with real images."""
    from utils.evaluation.metrics import MAX_TOKENS, baselines

    evaluator = None
    if count := flags.fd_samples:
        from utils.evaluation.samples import SampleEvaluator  # only where samples are compared

        evaluator = SampleEvaluator(data, tokenizer, count, flags.seed, group)
    most = MAX_TOKENS // data.grids[0].numel() + 1  # that they use
    splits = data.grids[data.train_rows[:most]], data.grids[data.val_rows[:most]]
    sizes = data.vocabulary.codebook_size, data.vocabulary.depth
    unigram, bigram = baselines(*splits, *sizes)
    group.print(f"baselines: unigram {unigram:.3f}, bigram {bigram:.3f} bits per token")
    return Validation(data, tokenizer, evaluator, unigram, bigram)


def load_tokenizer(address: str, device: torch.device) -> LoadedModel | None:
    """The tokenizer that decodes samples; None without one, when its package is not imported."""
    if not address:
        return None
    from vqvae import VQVAE

    return load_model(address, VQVAE, device)


def read_start(flags: cli.Flags, data: IndexDataset) -> Start:
    """The GPT of --init_from; a UserError if its indices are not of the tokenizer of the data."""
    tuning = cli.read_flags(FineTuningConfig, flags)
    cli.reject_unused_flags(tuning, flags)
    if not tuning.init_from:
        return Start(tuning)
    if tuning.lora_rank and flags.optimizer == "muon":
        raise cli.UserError("--lora_rank trains no whole matrices; omit --optimizer muon")
    gpt = load_model(tuning.init_from, GPT)
    vocabulary = read_vocabulary(gpt.folder)
    vocabulary.check_model(gpt.model.config, gpt.folder)
    data.read_captions(flags.caption_length, vocabulary.captions)
    if not tuning.reset_embeddings:
        vocabulary.check_codes(data.vocabulary, data.path, gpt.folder)
    return Start(tuning, gpt, [*map(vocabulary.prefix_tokens.get, data.vocabulary.class_names)])


def read_model_config(flags: cli.Flags, data: Vocabulary, start: Start) -> GPTConfig:
    """The config of the GPT to train; a UserError if flags contradict --init_from."""
    if start.gpt is None:
        return cli.read_flags(GPTConfig, flags, **data.model_values)
    from transformer.fine_tuning import config_from

    names = {field.name for field in fields(GPTConfig)} & (flags.given | flags.stored)
    given = {name: getattr(flags, name) for name in names}
    inputs = start.gpt.model.config, given, data.model_values, start.tuning
    return cli.build_or_error(config_from, *inputs)


def build_model(
    config: GPTConfig,
    start: Start,
    tokenizer: LoadedModel | None,
    group: Distributed,
    flags: cli.Flags,
    precision: str,
) -> GPT:
    """The GPT, with the weights that it starts from, and the codes of the tokenizer if needed.

    Whole on the device of this process, or its shard of it (--parallel fsdp).
    """
    options: Any = {}
    if flags.flex_attention:
        if group.device.type != "cuda":
            raise cli.UserError(f"--flex_attention needs CUDA, not {group.device}; omit it")
        shape: Any = {"grid": config.latent_dim, "depth": config.depth}
        shape |= {"window": config.window_size, "prefix": config.prefix_length}
        options["attend"] = FlexAttention(group.device, **shape)
    model = GPT(config, **options)
    if start.gpt is not None:
        from transformer.fine_tuning import start_from

        cli.build_or_error(start_from, model, start.gpt.model, start.classes, start.tuning)
    if config.needs_codebook:
        if tokenizer is None:
            raise cli.UserError("--start_from_codebook, --label_smoothing need --model_dir; add it")
        with torch.no_grad():
            indices = torch.arange(config.codebook_size, device=group.device)[:, None, None]
            model.use_codebook(tokenizer.model.embed(indices).flatten(1).cpu())
    if flags.parallel == "ddp":
        return model.to(group.device)
    if config.tie_embeddings:
        raise cli.UserError("--tie_embeddings cannot be combined with --parallel fsdp; omit one")
    group.fully_shard(model, model.blocks, precision)
    return model


def compile_loss(model: GPT, parallel: str) -> Callable[..., Tensor]:
    """`model.loss`, compiled; in shards block by block, because FSDP gathers between them."""
    if parallel == "ddp":
        return torch.compile(model.loss)
    modules: Any = (*model.blocks, model.head)
    for module in modules:
        module.forward = torch.compile(module.forward)
    return model.loss


def load_batches(
    data: IndexDataset, device: torch.device, rows: Sequence[Tensor], epoch: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Prefix and grids of each batch of rows, on the device; of crops in an `epoch`."""
    for parts, grids in data.batches(rows, epoch):
        yield make_prefix(*parts).to(device), grids.to(device)


def train_step(
    loss: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    precision: str,
    accumulate: int,
    scale: float = 1.0,
) -> Tensor:
    """Accumulate gradients of `GPT.loss`, times `scale`, in micro-batches; the bits per token."""
    bits = torch.zeros((), device=inputs[0].device)
    for micro_batch in zip(*(x.chunk(accumulate) for x in inputs), strict=True):
        with distributed.autocast(bits.device, precision):
            nats = loss(*micro_batch).mean()
        (nats / accumulate * scale).backward()
        bits += nats.detach() / accumulate / math.log(2)
    return bits


@torch.inference_mode()
def evaluate(
    model: GPT, data: IndexDataset, rows: Tensor, state: TrainState, group: Distributed
) -> Tensor:
    """Bits per token of these rows at each latent position (h, w), by all of `group`."""
    model.eval()
    height, width, depth = *model.config.latent_dim, model.config.depth
    total = torch.zeros(height * width * depth + 1, dtype=torch.float64)  # nats by token, images
    rows = group.shard(rows)  # none, where there are fewer rows than processes
    parts = rows.split(state.config.batch_size) if len(rows) else ()
    for prefix, indices in load_batches(data, group.device, parts):
        with distributed.autocast(group.device, state.settings["precision"]):
            nats = model.loss(prefix, indices)
        total[:-1] += nats.sum(dim=0).cpu()
        total[-1] += len(indices)
    model.train()
    total = group.all_reduce_sum(total.to(group.device, torch.float32)).cpu()
    return (total[:-1] / total[-1] / math.log(2)).view(height, width, -1).mean(dim=2)


def sample_grid(model: GPT, data: IndexDataset, tokenizer: LoadedModel | None) -> Image.Image:
    """A picture of samples of seed 0, of all classes or of the prefixes of validation images."""
    from transformer.sampling import generate  # only where something is sampled

    training_mode, model = model.training, model.eval()
    prefix = torch.arange(SAMPLES) % max(1, len(data.vocabulary.class_names))
    if len(model.config.prefix_parts) > 1:
        prefix = make_prefix(*data.prefix_inputs(data.val_rows[:SAMPLES]))
    indices = generate(model, prefix, seed=0)
    model.train(training_mode)
    return picture_of(indices, data, tokenizer, model.head.weight.device)


def picture_of(
    indices: Tensor, data: IndexDataset, tokenizer: LoadedModel | None, device: torch.device
) -> Image.Image:
    """A grid of decoded images; without a tokenizer the (first) indices as shades of grey."""
    from utils import figures  # only where pictures are made

    if tokenizer is None:
        first = indices if data.vocabulary.depth == 1 else indices[..., 0]
        return figures.grid(first[:, None] / (data.vocabulary.codebook_size - 1) * 2 - 1)
    with torch.inference_mode():
        return figures.grid(tokenizer.model.decode(indices.long().to(device)))


def about_run(
    state: TrainState, data: IndexDataset, tokenizer: LoadedModel | None, start: LoadedModel | None
) -> dict[str, Any]:
    """What MLflow shows of this training, and what it was made from; see `tracking.Run`."""
    settings = state.settings
    params = {name: settings[name] for name in ("window_size", "learning_rate")}
    params["shape"] = f"{settings['num_layers']} x {settings['dim']}"
    inputs, lineage = {settings["path_to_data"]: digest(data.path)}, lineage_of(data.path)
    for name, model in (("model_dir", tokenizer), ("init_from", start)):
        if model is not None:
            inputs[settings[name]] = model.sha256
            lineage = joined(lineage, model.lineage)
    about = {"stage": "gpt", "params": params, "inputs": inputs, "upstream": lineage}
    return {**about, "tags": {"tokenizer_run_id": data.vocabulary.tokenizer_run_id}}


def evaluate_and_log(state: TrainState, run: tracking.Run, validation: Validation) -> float:
    """Log metrics and samples of the present model; the score, of which lower is better."""
    from utils import figures

    data, group, evaluator = validation.data, state.group, validation.evaluator
    step, values = state.progress.step, {}
    with distributed.whole(state.ema.model) as model:
        if evaluator is not None:
            from transformer.sampling import generate

            inputs = make_prefix(*data.prefix_inputs(evaluator.rows))
            values = group.on_main(lambda: evaluator.metrics(generate(model.eval(), inputs)))
        by_position = evaluate(model, data, evaluation_rows(data.val_rows, state), state, group)
        if group.is_main and pictures_are_due(state, data.grids[0].numel()):
            run.picture("pictures/bits_by_position", figures.heat(by_position), step)
            run.picture("pictures/samples", sample_grid(model, data, validation.tokenizer), step)
    values["bits_per_token"] = float(by_position.mean())
    values["unigram_bits_per_token"] = validation.unigram
    values["bigram_bits_per_token"] = validation.bigram
    run.metrics("val", values, step)
    group.print(f"step {step:>6,}  val {values['bits_per_token']:.3f} bits per token")
    return state.sign * values[state.config.best_metric]


def report_best(state: TrainState, run: tracking.Run, validation: Validation) -> None:
    """Log the best GPT, samples, and its score on all validation data; by one process."""
    data, config, unigram = validation.data, state.config, validation.unigram
    folder, name = run.output_dir / "best", config.best_metric
    best = load_model(folder, GPT, state.group.device).model
    run.picture("pictures/best_samples", sample_grid(best, data, validation.tokenizer), 0)
    alone = replace(state.group, world_size=1)
    bits = float(evaluate(best, data, data.val_rows, state, alone).mean())
    value = bits if name == "bits_per_token" else state.sign * state.progress.best
    scores, step, register = {f"val/best_{name}": value}, state.progress.step, config.register
    run.model(folder, scores, step, register=register, lower_is_better=state.sign > 0)
    print(f"best: val {name} {value:.3f}")
    print(f"bits per token: {bits:.3f}, unigram {unigram:.3f}, bigram {validation.bigram:.3f}")
    if not bits < unigram:
        print(
            f"warning: {bits:.3f} bits per token are no better than the unigram baseline of "
            f"{unigram:.3f}, which ignores the order of the indices, so that samples will be "
            "noise; train longer, on more images, or with a tokenizer of a smaller --codebook_size"
        )
    print(run.ui_hint)


def main(arguments: cli.Flags) -> None:
    resumed = continue_training(arguments)
    config = cli.read_flags(TrainingConfig, arguments)
    optimizer_config = cli.read_flags(OptimizerConfig, arguments)
    source = cli.read_flags(IndicesConfig, arguments)
    measured = BEST_METRICS if source.fd_samples else {"bits_per_token": 1}
    sign = sign_of(config.best_metric, measured)
    group = distributed.init_distributed(config.device, config.seed)
    precision = distributed.pick_precision(config.precision, group.device, on_cpu="bf16")

    tokenizer = load_tokenizer(source.model_dir, group.device)
    names = "latent_dim", "val_fraction", "seed", "ignore_labels", "embeddings", "caption_length"
    options: Any = {name: getattr(arguments, name) for name in names}
    data = IndexDataset(addresses.fetch(source.path_to_data), tokenizer, **options)
    schedule = Schedule(config, len(data.train_rows), len(data.val_rows), group.world_size)
    start = read_start(arguments, data)
    validation = make_validation(data, tokenizer, arguments, group)
    model_config = read_model_config(arguments, data.vocabulary, start)
    cli.reject_unused_flags(model_config, arguments)
    model = build_model(model_config, start, tokenizer, group, arguments, precision)
    for_muon = model.linear_maps() if optimizer_config.optimizer == "muon" else None
    settings = {**asdict(optimizer_config), **asdict(source), **asdict(start.tuning)}
    settings |= asdict(model_config) | {"precision": precision}
    settings["data_sha256"] = fingerprint((row[:4] for row in data.rows), *data.arrays)
    # Checkpoints hold the blocks once more where low-rank updates are merged in the model folder.
    parts = {"blocks": model.blocks} if start.tuning.lora_rank else {}
    optimizers = {"optimizer": make_optimizer(model, config, (0.9, 0.95), for_muon)}
    load = partial(load_batches, data, group.device)
    starts = getattr(data.grids, "starts", ()) if config.shuffle == "shards" else ()
    state = TrainState(config, schedule, group, model, optimizers, settings, sign, parts, starts)
    state.checkpoint.restore(resumed)
    loss = compile_loss(model, optimizer_config.parallel) if config.compile else model.loss
    loss = partial(loss, forward=group.wrap(model))

    group.print(data)

    def step_on(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs = model.training_inputs(*batch, state.progress.step / schedule.total_steps)
        options = precision, config.accumulate, state.loss_scale
        return {"bits_per_token": train_step(loss, inputs, *options)}

    if config.dry_run:
        shown = picture_of(data.grids[data.val_rows[:SAMPLES]], data, tokenizer, group.device)
        dry_run(state, data.train_rows, load, step_on, shown)
        return
    name = f"gpt-{model_config.num_layers}x{model_config.dim}-w{model_config.window_size}"
    name, files = tracking.name_of(arguments, name), {FILE: data.vocabulary.content()}
    about = about_run(state, data, tokenizer, start.gpt)
    run, checkpoints = open_run(state, tracking.Run, name, resumed, files, flags=arguments, **about)

    with StopSignals(checkpoints.end_at_once) as stop, run, checkpoints:
        if state.progress.step == 0:
            checkpoints.save()
            evaluate_and_log(state, run, validation)
            state.averages.restart()
        tokens_per_step = config.batch_size * data.grids[0].numel()
        for rows, batch in loop.batches(state, checkpoints, data.train_rows, load):
            loop.optimizer_step(state, rows, step_on(batch), data.name)
            step, evaluates = state.progress.step, loop.evaluation_is_due(state)
            if step == -(-schedule.total_steps // EARLY):
                checkpoints.save_model(state.ema.model, "early")
            if schedule.logs(step) or evaluates:  # the means of the steps since the last log
                values = state.averages.take()
                values["tokens_per_second"] = values.pop("steps_per_second") * tokens_per_step
                run.metrics("train", values, step)
            if evaluates:
                score = evaluate_and_log(state, run, validation)
                if state.time_is_up or model_config.orders_are_final(step / schedule.total_steps):
                    loop.keep_best(state, checkpoints, score)
            if loop.end_step(state, checkpoints, stop, evaluated=evaluates):
                break
        if group.is_main:
            report_best(state, run, validation)
    best = run.output_dir / "best"
    words = ["--model_path", best, "--vocabulary_path", best / FILE, "--run_id", run.run_id]
    words += [] if data.conditions is None else ["--conditions", data.path]
    words += [] if data.embeddings is None else ["--embeddings", source.embeddings]
    words += [] if data.captions is None else ["--prompt", data.rows[-1].caption]
    group.print(cli.next_command("transformer_generation.py", *words))
    group.shutdown()


def make_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    cli.add_flags(parser, IndicesConfig, "indices")
    cli.add_flags(parser, TrainingConfig, "training")
    cli.add_flags(parser, GPTConfig, "transformer")
    cli.add_flags(parser, FineTuningConfig, "fine-tuning")
    cli.add_flags(parser, OptimizerConfig, "optimiser")
    parser.add_argument("--flex_attention", action="store_true", help="window by FlexAttention")
    parser.set_defaults(weight_decay=0.05, patience=5, best_metric="bits_per_token")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser(), distributed.is_first_to_fail)
