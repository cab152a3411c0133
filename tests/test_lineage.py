"""From anything that the pipeline wrote back to its commands."""

import importlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_script, write_images
from utils import provenance
from utils.cli import UserError
from utils.files import sha256
from utils.tracking import lineage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow uses
Call = Callable[..., str]
CHAIN = ["tokenizer", "indices", "gpt", "samples", "images"]


@pytest.fixture
def done(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which all five scripts ran, as the current one."""
    monkeypatch.chdir(pipeline)
    return pipeline


def test_an_evaluation_finds_the_run_that_generated_the_images(done: Path) -> None:
    lineage, _ = provenance.of_picture(Path("images/00000.png"))
    run_ids = {stage.name: stage.run_id for stage in lineage}
    assert run_ids["samples"] == runs_of(done)["gpt"].info.run_id


def client_of(folder: Path) -> Any:
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def runs_of(folder: Path) -> dict[str, Any]:
    """The runs of a store by stage."""
    client = client_of(folder)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {run.data.tags["stage"]: run for run in runs}


def test_a_picture_leads_back_to_the_data(done: Path) -> None:
    found = lineage.find("images/00003.png")
    assert [stage.name for stage in found] == CHAIN
    (tokenizer,) = done.glob("outputs/tokenizer-*/best/model.safetensors")
    (indices,) = done.glob("outputs/tokenizer-*/indices/data/indices.npy")
    (gpt,) = done.glob("outputs/gpt-*/best/model.safetensors")
    written = [sha256(path) for path in (tokenizer, indices, gpt, Path("samples/indices.npy"))]
    assert [stage.sha256 for stage in found] == [*written, ""]
    assert found[0].inputs == {"data/data.csv": sha256(Path("data/data.csv"))}
    assert set(found[2].inputs.values()) == {written[0], written[1]}
    assert set(found[4].inputs.values()) == {written[0], written[3]}
    assert "--window_size 3" in found[2].command
    assert all(stage.threads > 0 and stage.torch for stage in found)


def test_every_folder_and_every_run_knows_its_part(done: Path, tmp_path: Path) -> None:
    whole = lineage.find("images")
    runs = runs_of(done)
    (tokenizer,) = done.glob("outputs/tokenizer-*")
    # A run has the lineage of the newest stage that logged to it, as other tests of the folder do.
    again = (
        "--indexes_path",
        "samples",
        "--model_dir",
        tokenizer,
        "--output_dir",
        tmp_path / "images",  # so that its run holds no other files than before
    )
    run_script("vqvae/images_from_indexes.py", *again)
    (gpt,) = done.glob("outputs/gpt-*")
    parts = [str(tokenizer), f"{tokenizer}/indices/data", str(gpt), "samples", "images"]
    for number, part in enumerate(parts):
        assert lineage.find(part) == whole[: number + 1]
    for run in runs.values():  # also from the first stage to the last
        assert [s.name for s in lineage.find(run.info.run_id)] == CHAIN
    address = f"runs:/{runs['gpt'].info.run_id}/checkpoints"
    assert lineage.find(address) == whole[:3]


def test_the_runs_link_to_each_other(done: Path) -> None:
    runs = runs_of(done)
    tokenizer, gpt = runs["tokenizer"], runs["gpt"]
    for run, other, way in ((tokenizer, gpt, "Downstream"), (gpt, tokenizer, "Upstream")):
        assert run.data.tags[f"{other.data.tags['stage']}_run_id"] == other.info.run_id
        note = run.data.tags["mlflow.note.content"]
        assert f"{way}: {other.data.tags['stage']}, [{other.info.run_name}]" in note
        assert f"runs/{other.info.run_id})" in note
    # The samples and images of a GPT are in its run: its id was under their names as well.
    assert not {"samples_run_id", "images_run_id"} & tokenizer.data.tags.keys()
    assert "quantize_dataset.py" in tokenizer.data.tags["mlflow.note.content"]
    assert "transformer_generation.py" in gpt.data.tags["mlflow.note.content"]


def test_data_sets_and_models_in_mlflow(done: Path) -> None:
    runs, client = runs_of(done), client_of(done)
    read = {stage: run.inputs.dataset_inputs[0].dataset for stage, run in runs.items()}
    assert read["tokenizer"].name == "data.csv"
    assert read["tokenizer"].digest == sha256(Path("data/data.csv"))[:36]
    (made,) = runs["tokenizer"].outputs.model_outputs
    gpt = client.get_run(runs["gpt"].info.run_id)  # a search does not tell of models
    assert [one.model_id for one in gpt.inputs.model_inputs] == [made.model_id]
    model = client.get_logged_model(made.model_id)
    # An evaluation, which other tests make, adds those of its own data.
    metrics = [metric for metric in model.metrics if metric.key.startswith("val/")]
    assert {x.key for x in metrics} == {"val/best_mse", "val/best_psnr", "val/best_ssim"}
    assert {x.dataset_digest for x in metrics} == {read["tokenizer"].digest}


def picture(path: Path, text: str | None) -> Path:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if text is not None:
        info.add_text(provenance.PNG_KEY, text)
    Image.new("L", (8, 8)).save(path, pnginfo=info)
    return path


def test_what_does_not_lead_back(error_of: Call, own_folder: Path) -> None:
    def say(what: object, *flags: object) -> str:
        return error_of("utils.tracking.lineage", what, *flags)

    assert "nowhere is no file, no folder" in say("nowhere")
    assert f"no MLflow run '{'0' * 32}'" in say("0" * 32)
    assert "has no lineage" in say(picture(own_folder / "none.png", None))
    assert "is damaged" in say(picture(own_folder / "odd.png", '[{"odd": 1}]'))
    assert "inputs must be dict" in say(
        picture(own_folder / "five.png", '[{"name": "gpt", "command": "", "inputs": 5}]')
    )
    assert "is damaged" in say(picture(own_folder / "cut.png", '[{"name": "tok'))
    assert "is not a readable PNG file" in say(write_images(own_folder / "data"))
    assert "is not a model folder" in say(own_folder / "data")


def bomb(path: Path, side: int) -> Path:
    """A PNG file of a few bytes whose header says side x side pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", b"")]
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in chunks:
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))
    return path


def test_a_picture_that_would_fill_the_memory(error_of: Call, own_folder: Path) -> None:
    """Its pixels are not decoded, however many there are."""
    error = error_of("utils.tracking.lineage", bomb(own_folder / "bomb.png", 30_000))
    assert "bomb.png has no lineage" in error


def test_a_picture_says_how_its_training_split_the_data(done: Path, own_folder: Path) -> None:
    _, found = provenance.of_picture(done / "images" / "grid.png")
    assert found == provenance.Split(val_fraction=0.34, seed=0)
    old = picture(own_folder / "old.png", None)
    assert provenance.of_picture(old) == ((), None)
    for text in ("[0.1, 0]", '{"seed": 0}', '{"seed": 0.5, "val_fraction": 0.1}', "{"):
        info = provenance.PngInfo()
        info.add_text(provenance.SPLIT_KEY, text)
        Image.new("L", (8, 8)).save(old, pnginfo=info)
        with pytest.raises(UserError, match=r"the split of the data in .* is damaged"):
            provenance.of_picture(old)


def test_programs_say_how_they_are_called(capsys: pytest.CaptureFixture) -> None:
    """They called themselves lineage.py and __main__.py, which start nothing."""
    for name in ("tracking", "tracking.lineage", "data.download"):
        path = f"utils.{name}" + ".__main__" * (name == "tracking")
        usage = importlib.import_module(path).make_parser().format_usage()
        assert f"usage: python -m utils.{name} " in usage


def test_a_run_of_another_stage_is_refused(done: Path, error_of: Call) -> None:
    runs = runs_of(done)
    (tokenizer,) = done.glob("outputs/tokenizer-*")
    flags = ("--model_dir", tokenizer, "--path_to_data", "data/data.csv", "--output_dir", "never")
    error = error_of("quantize_dataset", *flags, "--run_id", runs["gpt"].info.run_id)
    assert "is that of a gpt, but this belongs to the run of a tokenizer" in error
    assert not Path("never").exists()


def test_pictures_are_as_they_were(done: Path) -> None:
    """What a picture carries does not change it."""
    with Image.open("images/00000.png") as first:
        assert np.asarray(first).shape == (24, 40, 3)
