"""The whole pipeline on scikit-learn's digits, step by step as the README shows it."""

import argparse
import multiprocessing
import os
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from utils import cli

DATA = Path("data/digits")
OUTPUT = Path("outputs/demo")
NUM_IMAGES = 500
# What takes seconds to import: once, in a process that those of the steps are forked from.
PRELOADED = (
    *("torch", "torch._dynamo", "torchvision", "sklearn.datasets", "sklearn.svm"),
    *("mlflow", "mlflow.store.tracking.sqlalchemy_store"),
)
STEPS = (
    f"-m utils.data.download digits --output_dir {DATA}",
    f"train_vqvae.py --path_to_data {DATA}/digits.csv --patch_size 2 --codebook_size 32 "
    f"--learning_rate 4e-3 --max_epochs 12 --evaluate_every 90 --experiment demo "
    f"--register digits-tokenizer --output_dir {OUTPUT}/tokenizer",
    f"quantize_dataset.py --model_dir {OUTPUT}/tokenizer --path_to_data {DATA}/digits.csv "
    f"--output_dir {OUTPUT}/indices",
    f"train.py --path_to_data {OUTPUT}/indices --model_dir {OUTPUT}/tokenizer --dim 96 "
    f"--class_dropout 0.02 --optimizer muon --learning_rate 4e-3 --max_epochs 10 "
    f"--evaluate_every 55 --register digits-gpt --output_dir {OUTPUT}/gpt",
    f"transformer_generation.py --model_path {OUTPUT}/gpt --num_images {NUM_IMAGES} "
    f"--temperature 0.8 --top_p 0.9 --output_dir {OUTPUT}/samples",
    f"vqvae/images_from_indexes.py --indexes_path {OUTPUT}/samples "
    f"--model_dir {OUTPUT}/tokenizer --output_dir {OUTPUT}/images",
)


def classify() -> None:
    """Print how often a classifier of the real digits agrees with the samples' labels."""
    from sklearn.svm import SVC

    from utils.data.images import ImageDataset
    from utils.data.sources import column_of, split_rows

    real, samples = map(ImageDataset, (DATA / "digits.csv", OUTPUT / "images" / "images.csv"))
    pixels, found = (x.pixels.flatten(1).numpy() * (16 / 255) for x in (real, samples))
    labels, wanted = (np.array(column_of(x.rows, "label")) for x in (real, samples))
    train, val = split_rows(real.rows, val_fraction=0, seed=0)
    classifier = SVC(gamma=0.001).fit(pixels[train], labels[train])  # on scikit-learn's scale
    accuracy = classifier.score(pixels[val], labels[val])
    agreement = classifier.score(found, wanted)
    print(
        f"an SVC trained on the real digits: {accuracy:.1%} right on {len(val)} held-out "
        f"digits, agrees with {agreement:.1%} of {len(samples)} samples"
    )


def run_script(words: list[str]) -> None:
    """Run a script, or with -m a module, in this process, as Python does with these arguments."""
    multiprocessing.set_start_method(None, force=True)  # its workers start in the usual way
    sys.argv = words[words[0] == "-m" :]
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def run_steps(run: Callable[[list[str]], None]) -> None:
    """Run every step, and then `classify`, in a process of its own; a UserError if one fails."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    jobs: dict[str, Callable[[], None]]
    jobs = {f"\n$ python {step}": partial(run, shlex.split(step)) for step in STEPS}
    for title, job in (jobs | {"": classify}).items():
        print(title, flush=True)
        process = context.Process(target=job)
        process.start()
        process.join()
        if process.exitcode:
            raise cli.UserError(f"the step above failed with exit code {process.exitcode}")


def main(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    run_steps(run_script)
    print(f"the pipeline took {time.perf_counter() - start:.0f} s on {os.cpu_count()} cores")
    print(f"\nlook at the samples:\n  {OUTPUT / 'images' / 'grid.png'}")
    models = f"--model_path {OUTPUT}/gpt --model_dir {OUTPUT}/tokenizer"
    print(f"try the models, after pip install gradio:\n  python playground.py {models}")
    print(f"browse every step:\n  {Path(sys.executable).parent / 'mlflow'} ui")
    print("  http://127.0.0.1:5000/#/experiments?workflowType=machine_learning")


if __name__ == "__main__":
    cli.run(main, cli.make_parser(__doc__, prog="python -m utils.demo"))
