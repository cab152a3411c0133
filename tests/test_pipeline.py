"""The five scripts, one after the other, on a dozen RGB images of 24x40 pixels."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import (
    ROOT,
    TINY_GPT,
    TINY_TOKENIZER,
    next_command,
    run_script,
    write_images,
)
from tests.forks import Forked, run_forked
from utils.training.checkpoint import checkpoints_in


def test_indices(pipeline: Path) -> None:
    (folder,) = pipeline.glob("outputs/tokenizer-*/indices/data")
    indices = np.load(folder / "indices.npy")
    assert indices.shape == (12, 6, 10)
    assert indices.dtype == np.uint8
    assert (
        np.loadtxt(folder / "indices.txt", dtype=int).tolist() == indices.reshape(12, -1).tolist()
    )
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_path"] for row in rows] == [f"{n}.png" for n in range(12)]
    assert [row["split"] for row in rows].count("val") == 4
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["latent_dim"] == [6, 10]
    assert meta["codebook_size"] == 16


def test_samples_and_images(pipeline: Path) -> None:
    indices = np.load(pipeline / "samples" / "indices.npy")
    assert indices.shape == (5, 6, 10)
    with (pipeline / "images" / "images.csv").open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["b", "a", "b", "a", "b"]
    for number in range(5):
        with Image.open(pipeline / "images" / f"{number:05}.png") as image:
            assert (image.size, image.mode) == ((40, 24), "RGB")
    assert (pipeline / "images" / "grid.png").is_file()


def test_the_config_says_the_window_and_the_grid(pipeline: Path) -> None:
    (folder,) = pipeline.glob("outputs/gpt-*/best")
    config = json.loads((folder / "config.json").read_text())
    assert (config["window_size"], config["latent_dim"]) == (3, [6, 10])
    words = json.loads((folder / "vocabulary.json").read_text())
    assert words["class_names"] == ["a", "b"]
    assert words["prefix_tokens"] == {"a": 0, "b": 1}


def test_mlflow_has_it_all(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(pipeline)
    client = mlflow.MlflowClient(f"sqlite:///{pipeline / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    stages = {run.data.tags["stage"]: run for run in runs}
    assert set(stages) == {"tokenizer", "gpt"}
    tokenizer, gpt = stages["tokenizer"], stages["gpt"]
    assert all(run.info.status == "FINISHED" and len(run.data.params) <= 5 for run in runs)
    assert gpt.data.tags["tokenizer_run_id"] == tokenizer.info.run_id
    assert gpt.info.experiment_id == tokenizer.info.experiment_id
    named = ("mse", "psnr", "codebook_usage", "perplexity", "codebook_loss", "commitment_loss")
    wanted = {f"{section}/{name}" for section in ("train", "val") for name in named}
    wanted |= {"train/images_per_second", "train/gradient_norm"}
    assert wanted <= set(tokenizer.data.metrics)
    wanted = {"train/bits_per_token", "val/bits_per_token", "val/unigram_bits_per_token"}
    assert wanted <= set(gpt.data.metrics)

    def artifacts(run: object, folder: str | None = None) -> set[str]:
        return {file.path for file in client.list_artifacts(run.info.run_id, folder)}

    assert {"checkpoints", "indices", "images", "tables", "config.json"} <= artifacts(tokenizer)
    assert {"checkpoints", "generated"} <= artifacts(gpt)
    assert artifacts(gpt, "generated") == {"generated/samples", "generated/images"}
    for run in runs:  # MLflow's UI shows no picture of a run that has another file there
        assert all("+step+" in name for name in artifacts(run, "images"))
    assert "-window_size" not in gpt.info.run_name
    assert gpt.info.run_name.endswith("-me4-nh2")  # --max_epochs 4 --num_heads 2
    steps = [point.step for point in client.get_metric_history(tokenizer.info.run_id, "val/mse")]
    assert steps[0] == 0
    assert len(steps) == 4


def test_same_seed_same_images(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pipeline)
    (gpt,) = pipeline.glob("outputs/gpt-*")
    sampling = ("--num_images", 5, "--labels", "b", "a", "--top_k", 9, "--batch_size", 2)
    run_script("transformer_generation.py", "--model_path", gpt, *sampling, "--output_dir", "again")
    expected = np.load(pipeline / "samples" / "indices.npy")
    assert (np.load(pipeline / "again" / "indices.npy") == expected).all()


def test_a_text_file_goes_the_same_way(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices written by hand: train on them, sample from them, decode them, by module name."""
    monkeypatch.chdir(pipeline)
    (text,) = pipeline.glob("outputs/tokenizer-*/indices/data/indices.txt")
    (tokenizer,) = pipeline.glob("outputs/tokenizer-*")
    grid = ("--latent_dim", "6,10")
    tiny = (*TINY_GPT, "--max_epochs", 1, "--val_fraction", 0.34, "--output_dir", "text-gpt")
    run_script("train.py", "--path_to_data", text, *grid, *tiny)
    flags = ("--model_dir", tokenizer, "--output_dir", "text-images")
    call = ("-m", "vqvae.images_from_indexes", "--indexes_path", text, *grid, *flags)
    run_forked(*call, check=True)
    assert len(list(Path("text-images").glob("0*.png"))) == 12


def test_the_next_command_names_the_address_that_was_given(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It named a file of MLflow's own store."""
    monkeypatch.chdir(pipeline)
    (tokenizer,) = pipeline.glob("outputs/tokenizer-*")
    run_id = json.loads((tokenizer / "status.json").read_text())["run_id"]
    address = f"runs:/{run_id}/checkpoints"
    flags = ("--path_to_data", "data/data.csv", "--output_dir", "again/indices")
    done = run_script("quantize_dataset.py", "--model_dir", address, *flags)
    assert next_command(done.stdout)[-2:] == ["--model_dir", address]
    assert (pipeline / "again" / "indices.mlflow.jsonl").is_file()


def test_the_next_command_reads_the_data_as_the_training_did(own_folder: Path) -> None:
    """It was refused: without their flags, the files were outside the folder, and one was bad."""
    rows = write_images(own_folder / "other", count=8, size=(8, 8)).read_text().splitlines()[1:]
    (own_folder / "data").mkdir()
    data = own_folder / "data" / "data.csv"
    lines = ["image_path,label", *(f"../other/{row}" for row in rows), "bad.png,a", ""]
    data.write_text("\n".join(lines))
    (own_folder / "data" / "bad.png").write_text("hello")
    flags = ("--allow_outside_paths", "--skip_bad_images", 1, "--max_steps", 1)
    done = run_script("train_vqvae.py", "--path_to_data", data, *TINY_TOKENIZER, *flags)
    done = run_script(*next_command(done.stdout))
    assert "8 grids of 2x2" in done.stdout


def test_evaluate_agrees_with_the_training(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation error that the training saw, computed anew from the files."""
    monkeypatch.chdir(pipeline)
    (tokenizer,) = pipeline.glob("outputs/tokenizer-*")
    with (tokenizer / "indices" / "data" / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    lines = ["image_path,label", *(f"{row['image_path']},{row['label']}" for row in rows)]
    Path("data/val.csv").write_text("\n".join(lines))
    common = ("--model_dir", tokenizer, "--output_dir", "evaluation")
    run_script("evaluate.py", "reconstructions", "--path_to_data", "data/val.csv", *common)
    seen = [json.loads(line) for line in (tokenizer / "metrics.jsonl").read_text().splitlines()]
    (expected,) = (line["val/best_mse"] for line in seen if "val/best_mse" in line)
    result = json.loads(Path("evaluation/reconstructions.json").read_text())
    assert result["metrics"]["mse"]["value"] == pytest.approx(expected, rel=1e-4)


def weights(folder: Path) -> bytes:
    return (checkpoints_in(folder)[-1] / "model.safetensors").read_bytes()


def test_stopped_by_a_signal_and_resumed_it_ends_the_same(own_folder: Path) -> None:
    """SIGTERM leaves a checkpoint and exits with 143; resumed, the weights end bit-equal."""
    data = write_images(own_folder / "data")
    flags = ("--path_to_data", data, *TINY_TOKENIZER, "--max_epochs", 60, "--evaluate_every", 20)
    flags = (*flags, "--horizontal_flip", "--random_crop")
    run_script("train_vqvae.py", *flags, "--output_dir", "whole")
    process = Forked(ROOT / "train_vqvae.py", *flags, "--output_dir", "parts")
    deadline = time.monotonic() + 300
    while "step     20" not in process.stdout.readline():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    status = json.loads(Path("parts/status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("KILLED", 143)
    assert 20 <= status["step"] < 120
    assert Path(status["checkpoint"]) == checkpoints_in(Path("parts"))[-1]
    assert weights(Path("parts")) != weights(Path("whole"))
    shutil.rmtree("parts")  # with its machine; what it takes to go on is in MLflow
    run_script("train_vqvae.py", *flags, "--resume", status["run_id"])
    assert weights(Path("outputs") / status["run_id"]) == weights(Path("whole"))


def test_two_processes_train_one_model(store: Any, own_folder: Path) -> None:
    """torchrun: half of each batch for each process, one output folder, one run; an adversary."""
    data = write_images(own_folder / "data")
    done = run_forked(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("--start-method", "fork", "--run-path"),  # torchrun starts them as its forks
        *(ROOT / "train_vqvae.py", "--path_to_data", data),
        *(*TINY_TOKENIZER, "--max_epochs", "2", "--device", "cpu", "--output_dir", "two"),
        *("--disc_weight", "0.8", "--disc_channels", "4", "--disc_start", "0.25"),
        *("--disc_warmup", "0.25", "--lecam_weight", "0.01"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert done.stdout.count("best: val mse") == 1
    assert (own_folder / "two" / "best" / "model.safetensors").is_file()
    logged = (own_folder / "two" / "metrics.jsonl").read_text()
    assert "train/adaptive_weight" in logged
