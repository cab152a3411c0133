"""Fine-tuning: what a GPT takes over from another, what is trained, what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import train
from tests.conftest import run_script
from tests.test_kv_cache import make_model, some_input
from transformer import GPT, FineTuningConfig
from transformer.fine_tuning import config_from, start_from
from utils import cli
from utils.data.indices import IndicesMeta, read_indices, write_indices
from utils.data.sources import Row
from utils.data.vocabulary import read_vocabulary

SMALL = "--dim 16 --num_layers 2 --num_heads 1 --batch_size 8 --device cpu --precision fp32"


def write_data(path: str, labels: str, tokenizer: str = "a" * 64) -> None:
    grids = torch.randint(8, (32, 4, 4), generator=torch.Generator().manual_seed(len(labels)))
    splits = ["val" if number >= 24 else "train" for number in range(32)]
    rows = [Row("", labels[i % len(labels)], split) for i, split in enumerate(splits)]
    write_indices(Path(path), grids, rows, IndicesMeta(8, (4, 4), tokenizer))


def run_train(flags: str) -> None:
    train.main(train.make_parser().parse_args(flags.split()))


@pytest.fixture
def start(store: Any) -> str:
    """A trained GPT of the classes a and b, in `first`; data of b and c, in `data`."""
    write_data("ab", "ab")
    write_data("data", "bc")
    run_train(f"--path_to_data ab {SMALL} --max_steps 2 --output_dir first")
    return "--path_to_data data --batch_size 8 --device cpu --precision fp32 --init_from first"


def weights(folder: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(folder, "model.safetensors"))


def test_weights_and_shared_classes_are_kept_and_new_ones_start_as_those_gone(start: str) -> None:
    run_train(f"{start} --max_steps 1 --learning_rate 1e-12 --weight_decay 0 --output_dir second")
    before, after = weights("first/best"), weights("second/best")
    rows = before.pop("prefix_embedding.weight")[[1, 0, 2]]  # b, a for c, and "no class"
    torch.testing.assert_close(after.pop("prefix_embedding.weight"), rows, rtol=0, atol=1e-9)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    assert read_vocabulary("second").class_names == ("b", "c")


def test_new_classes_beyond_those_gone_start_as_no_class() -> None:
    source = make_model()
    config = replace(source.config, num_classes=5)
    model = GPT(config).double()
    start_from(model, source, [None, 2, None, 0, None], FineTuningConfig(init_from="x"))
    before, after = source.prefix_embedding.weight, model.prefix_embedding.weight
    assert torch.equal(after, before[[1, 2, 3, 0, 3, 3]])


def test_a_resumed_lora_training_is_bitwise_equal_and_leaves_a_plain_model(start: str) -> None:
    flags = f"{start} --lora_rank 2 --learning_rate 0.1 --ema_decay 0.9 --evaluate_every 2"
    run_train(f"{flags} --max_steps 4 --output_dir whole")
    run_train(f"{flags} --max_steps 4 --checkpoint_every 3 --output_dir parts")
    # Step 4 is computed anew from step 3.
    Path("parts/checkpoints/step-00000004/model.safetensors").unlink()
    run_train("--resume parts/checkpoints/step-00000003")
    for name in ("best", "checkpoints/step-00000004"):
        ours, theirs = weights(f"whole/{name}"), weights(f"parts/{name}")
        assert ours.keys() == weights("first/best").keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    before, after = weights("first/best"), weights("whole/checkpoints/step-00000004")
    changed = {key for key in before if before[key].shape != after[key].shape}
    changed |= {key for key in before.keys() - changed if not before[key].equal(after[key])}
    assert "blocks.1.attention.qkv.weight" in changed
    assert changed <= {key for key in before if "blocks." in key or "prefix" in key}
    GPT.from_pretrained("whole/best")


def test_merged_updates_are_the_same_function(tmp_path: Path) -> None:
    source = make_model()
    model = GPT(source.config).double().eval()
    tuning = FineTuningConfig(init_from="x", lora_rank=2)
    start_from(model, source, [0, 1, 2], tuning)
    model.double()
    inputs = some_input(source)
    torch.testing.assert_close(model.logits(*inputs), source.logits(*inputs))
    for name, parameter in model.named_parameters():
        if name.endswith((".up", ".down")):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    merged = GPT.from_pretrained(tmp_path).double()  # of weights in float32
    torch.testing.assert_close(merged.logits(*inputs), model.logits(*inputs), rtol=1e-5, atol=1e-5)
    assert (merged.logits(*inputs) - source.logits(*inputs)).abs().max() > 0.1


def test_frozen_weights_stay(start: str) -> None:
    flags = "--freeze blocks.0,token_embedding --learning_rate 0.1 --max_steps 1"
    run_train(f"{start} {flags} --optimizer muon --output_dir second")
    before, after = weights("first/best"), weights("second/best")
    for key in before.keys() - {"prefix_embedding.weight"}:
        frozen = key.startswith(("blocks.0.", "token_embedding"))
        assert torch.equal(before[key], after[key]) == frozen, key


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dim 32", "dim 32 contradicts first, where it is 16; leave it out"),
        ("--freeze block", "freeze block: this GPT has no weights of that name; names begin with"),
        (
            "--freeze blocks,norm,head,token_embedding,prefix_embedding,position_embedding",
            "leaves nothing to train",
        ),
        ("--lora_rank 2 --optimizer muon", "omit --optimizer muon"),
        ("--init_from nowhere", "no such model folder: nowhere"),
    ],
)
def test_flags_that_cannot_be_followed(start: str, flags: str, message: str) -> None:
    with pytest.raises(cli.UserError, match=message):
        run_train(f"{start} {flags} --max_steps 1 --output_dir second")
    assert not Path("second/checkpoints").exists()


def test_fine_tuning_flags_need_a_start(start: str) -> None:
    with pytest.raises(cli.UserError, match="--lora_rank has no effect without --init_from; "):
        run_train(f"--path_to_data data {SMALL} --lora_rank 2")


def test_indices_of_another_tokenizer_need_new_embeddings(start: str) -> None:
    write_data("data", "bc", tokenizer="c" * 64)
    with pytest.raises(cli.UserError, match=r"first/best belongs to the .*or add --reset_embed"):
        run_train(f"{start} --max_steps 1 --output_dir second")
    run_train(f"{start} --max_steps 1 --learning_rate 1e-9 --reset_embeddings --output_dir second")
    before, after = weights("first/best"), weights("second/best")
    key = "blocks.0.attention.qkv.weight"
    torch.testing.assert_close(before[key], after[key])
    assert not torch.allclose(before["token_embedding.weight"], after["token_embedding.weight"])


def test_other_data_lead_to_a_new_training_from_the_weights(start: str) -> None:
    with pytest.raises(cli.UserError, match="a new training from its weights by --init_from"):
        run_train(f"--resume first --path_to_data data {SMALL} --max_steps 4")


def test_positions_of_another_grid() -> None:
    source = make_model((4, 4))
    data = {"latent_dim": (8, 8), "num_classes": 3}
    rescaled = config_from(source.config, {}, data, FineTuningConfig())
    model = make_model((8, 8), position_scale=rescaled.position_scale)
    ends = model.grid.coordinates(torch.tensor([[0, 0, 0], [7, 7, 0]]))
    assert ends.tolist() == [[0.75, 0.75], [4.25, 4.25]]  # centres between the edges 0.5 and 4.5
    extended = config_from(source.config, {}, data, FineTuningConfig(grid_positions="extrapolate"))
    assert extended.position_scale == (1, 1)


@pytest.mark.parametrize(("before", "now"), [((1, 1), (1, 1)), ((0.5, 0.75), (0, 0))])
def test_the_orders_in_which_a_training_ended_go_on(before: Any, now: Any) -> None:
    source = make_model((4, 4), order_anneal=before)
    data = {"latent_dim": (4, 4), "num_classes": 3}
    assert config_from(source.config, {}, data, FineTuningConfig()).order_anneal == now


@pytest.mark.parametrize("how", ["interpolate", "extrapolate"])
@pytest.mark.parametrize("options", [{}, {"order_anneal": (0.5, 0.8)}], ids=["raster", "random"])
def test_embeddings_of_positions_fit_another_grid(how: str, options: dict[str, Any]) -> None:
    """Blocks of 2x2 positions get means near that of their position, or copies of the border's."""
    source, model = make_model((4, 4), **options), make_model((8, 8), **options)
    start_from(model, source, [0, 1, 2], FineTuningConfig(grid_positions=how))
    prefix = source.prefix_length
    tables = [(source.position_embedding[prefix:], model.position_embedding[prefix:])]
    ends = [x.position_embedding[:prefix] for x in (model, source)]
    torch.testing.assert_close(*ends)
    if options:
        tables.append((source.target_embedding.weight, model.target_embedding.weight))
    for before, after in tables:
        before, after = before.unflatten(0, (4, 4)), after.unflatten(0, (8, 8))
        if how == "extrapolate":
            torch.testing.assert_close(after[:4, :4], before)
            torch.testing.assert_close(after[5, 7], before[3, 3])
        else:
            torch.testing.assert_close(after[0, 0], before[0, 0])
            near = before[1:3, 1:3].mean(dim=(0, 1))
            torch.testing.assert_close(after[3:5, 3:5].mean(dim=(0, 1)), near)


def test_an_early_model_guides_a_gpt_without_classes(
    store: Any, error_of: Callable[..., str]
) -> None:
    write_data("ab", "ab")
    run_train(f"--path_to_data ab --ignore_labels {SMALL} --max_steps 9 --output_dir plain")
    assert read_vocabulary("plain").class_names == ()
    key = "blocks.0.attention.qkv.weight"
    assert not torch.equal(weights("plain/early")[key], weights("plain/best")[key])
    sample = ("transformer_generation", "--model_path", "plain", "--num_images", 2)
    error = error_of(*sample, "--guidance_scale", 2)
    assert "--guidance_scale needs a weaker GPT by --guide_path" in error
    assert "has no effect without --guidance_scale" in error_of(*sample, "--guide_path", "plain")
    guided = ("--guide_path", "plain/early", "--guidance_scale", 2, "--output_dir", "samples")
    run_script("transformer_generation.py", *sample[1:], *guided)
    assert read_indices(Path("samples")).grids.shape == (2, 4, 4)
