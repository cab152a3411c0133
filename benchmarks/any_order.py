"""A GPT of any order beside one of raster order: inpainting, and parallel decoding by steps.

Both are trained by train.py on the same indices for as many steps, one with --order_anneal 1,1:

    python -m benchmarks.any_order --any_order GPT --row_order GPT --path_to_data INDICES \\
        --model_dir TOKENIZER

Inpainting: the middle of validation images is sampled, with and without their labels; a classifier
of decoded training images says how many no longer have the label of their image. Steps: the Fréchet
distance of samples, in the features of that classifier, to decoded validation images.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from transformer import GPT, SamplingParams, make_prefix
from transformer.sampling import complete, generate
from utils import addresses, cli, distributed
from utils.data.index_dataset import IndexDataset
from utils.data.masks import region_mask
from utils.evaluation import features
from utils.evaluation.features import DecodedImages, Features, ImageSet, Settings
from utils.evaluation.metrics import WIDTH, frechet_distance, resample
from utils.provenance import load_model
from vqvae import VQVAE

REPLICATES = 10
CLASSIFIER_IMAGES = 10_000  # decoded, to train the classifier


class Bench:
    """The data, the classifier, and the features of real images."""

    def __init__(self, flags: argparse.Namespace) -> None:
        device = distributed.pick_device(flags.device)
        self.tokenizer = load_model(flags.model_dir, VQVAE, device)
        path = addresses.fetch(flags.path_to_data)
        options: dict[str, Any] = {"latent_dim": None, "val_fraction": 0.1, "seed": 0}
        self.data = IndexDataset(path, self.tokenizer, **options)
        self.rows = self.data.val_rows[: flags.count]
        self.settings, images = Settings(device, 256, flags.seed), self.decoded(self.data.grids)
        training = ImageSet(images, self.data.train_rows).split(CLASSIFIER_IMAGES, flags.seed)[0]
        self.network = features.train_classifier(training, "--path_to_data", self.settings)
        self.real = self.features(self.data.grids[self.rows])
        rows = [self.data.rows[row] for row in self.rows.tolist()]
        self.targets = features.class_targets(self.network, rows, "--path_to_data")

    def decoded(self, grids: Tensor) -> DecodedImages:
        return DecodedImages(grids, self.data.rows, self.tokenizer.model)

    def features(self, grids: Tensor) -> Features:
        part = ImageSet.whole(self.decoded(grids))
        return features.extract_features(self.network, part, self.settings, "features")

    def prefix(self, model: GPT, labelled: bool) -> Tensor:
        """Of the images of `rows`, or "no class"; with their conditions, if any."""
        prefix = make_prefix(*self.data.prefix_inputs(self.rows))
        if not labelled:
            prefix.view(len(prefix), -1)[:, 0] = model.config.num_classes
        return prefix

    def changed(self, grids: Tensor) -> float:
        """The share of the grids whose images have another label than the original."""
        weights = resample(len(grids), 0, 2)
        return 1 - features.label_agreement(self.features(grids), self.targets, weights).value

    def distances(self, found: Tensor) -> Tensor:
        """Fréchet distances of features (N, D) to the real ones, then of resamples, (1 + R,).

        The resamples are the same for all sets of N samples, so that their differences are paired.
        """
        weights = resample(len(self.rows), 0, REPLICATES), resample(len(found), 1, REPLICATES)
        # Each three times, as one value has no standard deviation.
        thrice = (rows.repeat_interleave(3, dim=0).split(3) for rows in weights)
        pairs = zip(*thrice, strict=True)
        values = [frechet_distance(self.real.features, found, pair).value for pair in pairs]
        return torch.tensor(values)


def inpaint(bench: Bench, models: dict[str, GPT], flags: argparse.Namespace) -> dict[str, Any]:
    """The share of changed labels, by the mask, the model and the number of candidates."""
    known = bench.data.grids[bench.rows].long()
    results: dict[str, Any] = {"decoded originals": {"changed": bench.changed(known)}}
    ways = itertools.product(flags.masks, (False, True), models, flags.candidates)
    for mask, labelled, name, count in ways:
        start = time.perf_counter()
        options: dict[str, Any] = {"candidates": count, "seed": flags.seed, "batch_size": 250}
        size = known.shape[1], known.shape[2]
        parts = [region_mask(part, size) for part in mask.split("+")]
        options["known_mask"] = torch.stack(parts).any(dim=0)
        prefix = bench.prefix(models[name], labelled)
        grids = complete(models[name], prefix, known, **options)
        title = f"{mask}, {name}, {count} candidates, {'' if labelled else 'no '}labels"
        seconds = time.perf_counter() - start
        results[title] = {"changed": bench.changed(grids), "seconds": seconds}
        print(f"{title}: {results[title]['changed']:.1%} changed, {seconds:.0f} s", flush=True)
    return results


def count_steps(
    bench: Bench, models: dict[str, GPT], steps: Sequence[int], scale: float, samples: int
) -> dict[str, Any]:
    """Fréchet distance of so many samples for each image, by the number of steps.

    Beside it, the difference to one token a step, paired: of the same resamples and seeds.
    """
    results: dict[str, Any] = {}
    jobs = [(name, 0) for name in models] + [("any order", count) for count in steps]
    one_by_one = torch.empty(0)
    for name, count in jobs:
        start, model = time.perf_counter(), models[name]
        params = SamplingParams(steps=count, guidance_scale=scale)
        prefix = bench.prefix(model, labelled=True)
        prefix = prefix.repeat(samples, *[1] * (prefix.dim() - 1))
        grids = generate(model, prefix, seed=bench.settings.seed, params=params, batch_size=250)
        seconds = time.perf_counter() - start
        distances = bench.distances(bench.features(grids).features)
        if (name, count) == ("any order", 0):
            one_by_one = distances
        title = f"{name}, {f'{count} steps' if count else 'one by one'}"
        results[title] = {"samples": len(grids), "seconds": seconds}
        for key, values in {"fd": distances, "difference": distances - one_by_one}.items():
            error = WIDTH * float(values[1:].std())
            results[title][key] = {"value": float(values[0]), "+-": error}
            print(f"{title}: {key} {values[0]:.3f} +- {error:.3f}, {seconds:.0f} s", flush=True)
    return results


def main(flags: argparse.Namespace) -> None:
    bench = Bench(flags)
    names = {"any order": flags.any_order, "row order": flags.row_order}
    device = bench.settings.device
    models = {name: load_model(path, GPT, device).model for name, path in names.items() if path}
    results = {}
    if "inpainting" in flags.parts:
        results["inpainting"] = inpaint(bench, models, flags)
    if "steps" in flags.parts:
        results["steps"] = count_steps(
            bench, models, flags.steps, flags.guidance_scale, flags.samples
        )
    name = Path(flags.path_to_data).name
    print(record.merge("any_order", {f"{name}, {part}": x for part, x in results.items()}))


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--any_order", required=True, metavar="GPT", help="trained with --order_anneal 1,1")
    add("--row_order", metavar="GPT", help="trained in raster order")
    add("--path_to_data", required=True, metavar="INDICES", help="what both were trained on")
    add("--model_dir", required=True, help="tokenizer of the indices")
    add("--parts", nargs="+", default=["inpainting", "steps"], choices=("inpainting", "steps"))
    add("--count", type=cli.positive, default=5000, help="validation images (default: 5000)")
    masks = ["border:0.5", "border:0.6", "left:0.3+right:0.3", "top:0.3+bottom:0.3"]
    add("--masks", nargs="+", default=masks, help="known parts, joined by +, in inpainting")
    add("--candidates", type=int, nargs="+", default=[1, 8], help="of inpainting")
    add("--steps", type=int, nargs="+", default=[49, 24, 16, 12, 8], help="of parallel decoding")
    add("--samples", type=cli.positive, default=1, help="of each image, by steps (default: 1)")
    add("--guidance_scale", type=float, default=1.0, help="of the samples (default: 1)")
    add("--seed", type=int, default=0, help="of the samples and the classifier (default: 0)")
    add("--device", default="auto", help="where to compute")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
