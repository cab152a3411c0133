"""Benchmarks: the one of a GPU at a tiny size, on a CPU; searches that stop and go on."""

import json
import signal
import sys
from pathlib import Path

import pytest

from benchmarks import cpu, gpu, learning, recipes, scaling, sources
from transformer import GPTConfig
from utils.plan import flops_per_token


@pytest.mark.parametrize("part", gpu.PARTS)
def test_the_gpu_benchmark_runs(part: str, own_folder: Path) -> None:
    pytest.importorskip("transformers")
    fast = ["--rounds", "1", "--warm_up", "1", "--no-compile", "--size", "tiny", "--tiny"]
    gpu.run_part(part, gpu.make_parser().parse_args([*fast, "--device", "cpu"]))
    results = json.loads((own_folder / "benchmarks/results/gpu.json").read_text())
    for row, values in results.items():
        assert row.startswith(part)
        assert all(value > 0 for value in values.values() if isinstance(value, float))


@pytest.mark.parametrize("part", ["tokenizer", "loading", "quantization"])
def test_the_cpu_benchmark_runs(part: str, own_folder: Path) -> None:
    """Which first compares the results of the ways that it times."""
    if part == "tokenizer":
        pytest.importorskip("diffusers")
    words = "--rounds 1 --images 2 --side 16 --matrix 64 --files 8 --file_side 16 --large 2"
    handler = signal.getsignal(signal.SIGCHLD)  # which a stock DataLoader replaces for good
    rows = list(cpu.PARTS[part](cpu.make_parser().parse_args(words.split())))
    signal.signal(signal.SIGCHLD, handler)
    assert rows
    assert all(row.ratio > 0 for row in rows)


def test_every_source_is_measured_beside_a_stock_reader(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--count", "20", "--side", "16", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/sources.py"])
    sources.main(sources.make_parser().parse_args(words))
    results = json.loads((own_folder / "benchmarks/results/sources.json").read_text())["results"]
    assert set(results.pop("tar at a URL")) == {"stock", "cold", "warm"}
    assert set(results) == set(sources.STOCK)
    for speeds in results.values():
        assert set(speeds) == {"stock", "in order", "random"}


def test_the_costs_of_an_image_are_measured(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/scaling.py"])
    words = ["--rows", "100", "--side", "16", "--rounds", "1"]
    scaling.main(scaling.make_parser().parse_args(words))
    results = json.loads((own_folder / "benchmarks/results/scaling.json").read_text())["results"]
    assert results["rows"] == 100
    assert all(value > 0 for value in results.values())


def test_arithmetic_of_a_token() -> None:
    """Six a weight that multiplies; the embedding and the prefix are looked up."""
    config = GPTConfig(32, latent_dim=(1, 1), num_layers=1, num_heads=1, dim=16, hidden_dim=24)
    weights = 4 * 16 * 16 + 3 * 16 * 24 + 16 * 32 + 2 * 16 + 2 * 16  # and gains
    assert flops_per_token(config) == 6 * weights + 12 * 16


def test_finished_trainings_are_not_repeated(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def train(job: learning.Job, flags: object) -> learning.Curve:
        done.append(job)
        return {"bits_per_token": [float(len(done))], "parameters": [1]}

    monkeypatch.setitem(learning.PARTS, "gpt", (learning.GPTS, train, "bits_per_token"))
    words = ["--path_to_data", "none.csv", "--work_dir", str(own_folder)]
    flags, more = (learning.make_parser().parse_args([*words, *x]) for x in ([], ["--steps", "7"]))
    job = learning.Job("gpt", "Llama (transformers)", 1e-3, 0)
    assert learning.run(job, flags) == learning.run(job, flags)
    assert learning.run(job, more)["bits_per_token"] == [2.0]
    assert done == [job, job]


def test_a_search_can_end_with_the_gpt(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ran = []

    def run(runner: recipes.Runner, stage: recipes.Stage) -> None:
        for needed in stage.needs:
            runner.run(needed)
        if not stage.folder.exists():
            ran.append(stage.command[0])
            stage.folder.mkdir()
            line = json.dumps({"val/best_bits_per_token": float(len(ran)), "step": 1})
            (stage.folder / "metrics.jsonl").write_text(line + "\n")
            recipes.seconds_file(stage).write_text("2")

    monkeypatch.setattr(recipes.Runner, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks/recipes.py"])
    words = ["--path_to_train", "a.csv", "--path_to_test", "b.csv", "--until", "gpt"]
    words += ["--seeds", "0", "--work_dir", "work", "--factor", "train.rope_base=100"]
    recipes.main(recipes.make_parser().parse_args(words))
    assert ran == ["train_vqvae.py", "quantize_dataset.py", "train.py", "train.py"]
    header, _, *rows = (
        [value.strip() for value in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    )
    found = dict(zip(header, rows[-1], strict=True))
    measured = {"recipe": "train.rope_base=100", "bits_per_token": "4", "seconds": "6"}
    assert found == dict.fromkeys(header, "-") | measured
