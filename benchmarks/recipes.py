"""Search for recipes: train tokenizer and GPT by the scripts, and measure what users would see.

A recipe is the flags of the five scripts. `--factor train.learning_rate=1e-3,2e-3,4e-3` varies one
flag of one stage around the base recipe of `RECIPES`; several factors are varied one at a time, or
all together with `--grid`. Stages that recipes share are run once, and finished stages are kept in
`--work_dir`, so that a search can be stopped and continued. Each recipe runs with each seed.
`--until gpt` ends with the bits per token, which takes a fraction of the time.
"""

import argparse
import hashlib
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from benchmarks import record
from utils import cli

Flags = dict[str, str]  # value by flag; "" for a switch
Recipe = dict[str, Flags]  # flags by stage

# What runs, in this order, with the flags of the recipe added; {tokenizer} etc. are folders.
COMMANDS = {
    "tokenizer": "train_vqvae.py --path_to_data {train} --seed {seed} --experiment recipes",
    "indices": "quantize_dataset.py --model_dir {tokenizer} --path_to_data {train}",
    "gpt": "train.py --path_to_data {indices} --seed {seed}",
    "samples": "transformer_generation.py --model_path {gpt} --seed {seed}",
    "images": "vqvae/images_from_indexes.py --indexes_path {samples} --model_dir {tokenizer}",
    "reconstructions": "evaluate.py reconstructions --model_dir {tokenizer} --path_to_data {test} "
    "--path_to_train {train} --features classifier",
    "quality": "evaluate.py samples --images {images} --model_dir {tokenizer} "
    "--path_to_data {train} --path_to_test {test}",
}
STAGES = tuple(Path(command.split()[0]).stem for command in COMMANDS.values())
# The commands of the README, by data set; `--seed` and all paths are filled in.
RECIPES: dict[str, str] = {
    "mnist": """
        train_vqvae --codebook_size 512 --learning_rate 4e-3 --max_epochs 6
        quantize_dataset
        train --dim 128 --dropout 0 --optimizer muon --learning_rate 4e-3 --max_epochs 4
        transformer_generation --num_images 10000 --guidance_scale 1.5
    """,
    "cifar10": """
        train_vqvae --codebook_size 512 --learning_rate 4e-3 --horizontal_flip --max_epochs 5
        quantize_dataset --flip
        train --dim 128 --dropout 0 --optimizer muon --learning_rate 4e-3 --max_epochs 4
        transformer_generation --num_images 10000 --guidance_scale 1.5
    """,
    "emoji": """
        train_vqvae --channel_multipliers 1,1 --codebook_size 512 --learning_rate 4e-3 \
            --max_epochs 20 --evaluate_every 470
        quantize_dataset
        train --dim 128 --dropout 0.2 --caption_dropout 0.5 --optimizer muon \
            --learning_rate 4e-3 --max_epochs 15 --evaluate_every 235
        transformer_generation --num_images 4000 --class_frequencies --guidance_scale 1.5
    """,
}
LAST = {"gpt": ("gpt",), "quality": ("reconstructions", "quality")}  # stages, by --until
COLUMNS = (
    *("mse", "codebook_usage", "bits_per_token"),
    # Of training images, of their reconstructions, and of samples, to the test images.
    *("real_fd_classifier", "reconstructed_fd_classifier", "fd_classifier"),
    *("precision", "recall", "label_agreement", "seconds"),
)


@dataclass(frozen=True)
class Stage:
    """One command of a recipe; what it wrote is found again by the digest of all that led to it."""

    command: tuple[str, ...]
    folder: Path
    needs: tuple["Stage", ...] = ()


@dataclass
class Runner:
    """Runs stages once each, and keeps how many seconds each took."""

    work_dir: Path
    locks: dict[Path, Lock] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def run(self, stage: Stage) -> None:
        """Run a stage and those that it needs, unless they are there already.

        Raises:
            UserError: the command failed; its output is in `log.txt` beside its folder.
        """
        for needed in stage.needs:
            self.run(needed)
        with self.lock:
            own = self.locks.setdefault(stage.folder, Lock())
        with own:
            if seconds_file(stage).exists():
                return
            shutil.rmtree(stage.folder, ignore_errors=True)
            stage.folder.parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            environment = os.environ | {
                "MLFLOW_TRACKING_URI": f"sqlite:///{self.work_dir.resolve()}/mlflow.db"
            }
            log = stage.folder.with_suffix(".log")
            with log.open("w", encoding="utf-8") as file:
                file.write(f"$ {shlex.join(stage.command)}\n")
                file.flush()
                done = subprocess.run(
                    [sys.executable, *stage.command],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    check=False,
                )
            if done.returncode:
                raise cli.UserError(
                    f"{stage.command[0]} failed with exit code {done.returncode}: {log}"
                )
            seconds_file(stage).write_text(str(time.perf_counter() - start))


def seconds_file(stage: Stage) -> Path:
    return stage.folder.with_suffix(".seconds")


def parse_recipe(text: str) -> Recipe:
    """Lines of `stage --flag value ...` -> flags by stage."""
    recipe: Recipe = {}
    for line in text.strip().splitlines():
        stage, *words = shlex.split(line)
        flags: Flags = {}
        name = ""
        for word in words:
            if word.startswith("--"):
                name = word[2:]
                flags[name] = ""
            else:
                flags[name] = f"{flags[name]} {word}".strip()
        recipe[stage] = flags
    return recipe


def vary(base: Recipe, factors: list[str], grid: bool) -> Iterator[tuple[str, Recipe]]:
    """The base recipe and its variants, by the settings in which each differs.

    Args:
        base: what is varied.
        factors: `stage.flag=value,value,...`; commas within a value are written as `;`. The value
            `-` removes the flag.
        grid: all combinations of all values, not one factor at a time.

    Raises:
        UserError: a factor of another form, or of no stage.
    """
    axes: list[list[tuple[str, str, str]]] = []
    for factor in factors:
        name, _, values = factor.partition("=")
        stage, _, flag = name.partition(".")
        if stage not in STAGES or not flag or not values:
            raise cli.UserError(
                f"--factor {factor!r} is not of the form STAGE.FLAG=VALUE,VALUE with a stage of "
                f"{', '.join(STAGES)}"
            )
        axes.append([(stage, flag, value.replace(";", ",")) for value in values.split(",")])
    if grid:
        choices: list[tuple[tuple[str, str, str], ...]] = list(itertools.product(*axes))
    else:
        choices = [(), *((setting,) for axis in axes for setting in axis)]
    seen = set()
    for choice in choices:
        recipe: Recipe = {stage: dict(base.get(stage, {})) for stage in STAGES}
        for stage, flag, value in choice:
            if value == "-":
                recipe[stage].pop(flag, None)
            else:
                recipe[stage][flag] = "" if value == "on" else value
        key = json.dumps(recipe, sort_keys=True)
        if key not in seen:
            seen.add(key)
            name = " ".join(f"{stage}.{flag}={value}" for stage, flag, value in choice)
            yield name or "base", recipe


def plan(recipe: Recipe, seed: int, flags: argparse.Namespace) -> dict[str, Stage]:
    """All stages of a recipe, by name, with the paths between them filled in."""
    stages: dict[str, Stage] = {}
    for name, template in COMMANDS.items():
        script, *options = template.split()
        own = recipe.get(Path(script).stem, {})
        given = " ".join(f"--{flag} {value}".strip() for flag, value in own.items())
        command = f"{script} {' '.join(options)} {given} --device {flags.device}".format(
            train=flags.path_to_train,
            test=flags.path_to_test,
            seed=seed,
            **{known: stage.folder for known, stage in stages.items()},
        )
        digest = hashlib.sha256(command.encode()).hexdigest()
        folder = flags.work_dir / f"{name}-{digest[:12]}"
        needs = tuple(stages[x] for x in stages if f"{{{x}}}" in template)
        stages[name] = Stage((*shlex.split(command), "--output_dir", str(folder)), folder, needs)
    return stages


def results(stages: dict[str, Stage]) -> dict[str, float]:
    """All metrics of the stages of a recipe that have run, and their seconds."""
    values: dict[str, float] = {}
    for name, file in (("reconstructions", "reconstructions.json"), ("quality", "samples.json")):
        if seconds_file(stages[name]).exists():
            found = json.loads((stages[name].folder / file).read_text())
            values |= {key: one["value"] for key, one in found["metrics"].items()}
    for name in ("tokenizer", "gpt"):
        lines = (stages[name].folder / "metrics.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            values |= {
                key.rpartition("/")[2]: value
                for key, value in line.items()
                if key in ("val/codebook_usage", "val/best_bits_per_token")
            }
    if "best_bits_per_token" in values:
        values["bits_per_token"] = values.pop("best_bits_per_token")
    for name in ("tokenizer", "indices", "gpt", "samples", "images"):
        if seconds_file(stages[name]).exists():
            values[f"seconds_{name}"] = float(seconds_file(stages[name]).read_text())
    values["seconds"] = sum(x for key, x in values.items() if key.startswith("seconds_"))
    return values


def mean_and_range(found: list[float]) -> str:
    """`1.23 (1.20 to 1.26)` of several seeds, `1.23` of one, `-` of none."""
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.4g}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.4g} to {max(found):.4g})"


def main(flags: argparse.Namespace) -> None:
    flags.work_dir.mkdir(parents=True, exist_ok=True)
    base = parse_recipe(flags.recipe or RECIPES[flags.data])
    recipes = dict(vary(base, flags.factor, flags.grid))
    runner = Runner(flags.work_dir)
    jobs = [
        (name, seed, plan(recipes[name], seed, flags)) for name in recipes for seed in flags.seeds
    ]

    def run(job: tuple[str, int, dict[str, Stage]]) -> tuple[str, int, dict[str, float] | str]:
        name, seed, stages = job
        try:
            for last in LAST[flags.until]:
                runner.run(stages[last])
        except cli.UserError as error:
            return name, seed, str(error)
        return name, seed, results(stages)

    found: dict[str, dict[int, dict[str, float]]] = {}
    with ThreadPoolExecutor(flags.jobs) as pool:
        for name, seed, values in pool.map(run, jobs):
            if isinstance(values, str):
                print(f"{name}, seed {seed}: {values}", file=sys.stderr)
                continue
            found.setdefault(name, {})[seed] = values
            print(f"done: {name}, seed {seed}", file=sys.stderr, flush=True)
    print(f"| recipe | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, by_seed in found.items():
        columns = [
            mean_and_range([values[key] for values in by_seed.values() if key in values])
            for key in COLUMNS
        ]
        print(f"| {name} | {' | '.join(columns)} |")
    rows = {
        f"{flags.data}: {name}": {
            "recipe": recipes[name],
            "seeds": {str(seed): values for seed, values in by_seed.items()},
        }
        for name, by_seed in found.items()
    }
    print(f"\nwritten: {record.merge('recipes', rows)}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.recipes")
    parser.add_argument("--data", default="mnist", help="name of the base recipe, and of the rows")
    parser.add_argument("--recipe", default="", help="another base: lines of STAGE --FLAG VALUE")
    parser.add_argument("--path_to_train", required=True, type=Path, metavar="CSV")
    parser.add_argument("--path_to_test", required=True, type=Path, metavar="CSV")
    parser.add_argument(
        "--factor", nargs="+", default=[], metavar="STAGE.FLAG=VALUE,...", help="what is varied"
    )
    parser.add_argument("--grid", action="store_true", help="all combinations of the factors")
    parser.add_argument("--until", choices=tuple(LAST), default="quality", help="what is measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=cli.positive, default=1, help="recipes run at once")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/recipes"))
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
