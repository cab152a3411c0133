"""Embeddings: vectors of any encoder in front of the grid, from a file, in every script."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from tests.conftest import TINY_GPT, write_images
from tests.test_conditions import make_tokenizer
from tests.test_tables import write
from tests.test_transformer_generation import call
from transformer import GPT, FineTuningConfig, GPTConfig, SamplingParams, make_prefix
from transformer.fine_tuning import start_from
from transformer.sampling import generate, generate_likeliest
from utils.cli import UserError
from utils.data.index_dataset import VECTORS, IndexDataset, check_finite
from utils.data.indices import IndicesMeta, open_array, read_indices, write_indices
from utils.data.sources import Row
from utils.data.vocabulary import read_vocabulary

CPU = ("--device", "cpu")
CODES, SHAPE = 7, (3, 5)  # indices; vectors of an image, and numbers of each
SAMPLING = ("transformer_generation", *CPU, "--model_path", "gpt", "--num_images")


def make_model(**options: object) -> GPT:
    """A GPT with a class, a condition, embeddings and a caption whose weights are all random."""
    torch.manual_seed(0)
    grids = {"latent_dim": (3, 4), "condition_latent_dim": (1, 2), "condition_codebook_size": 3}
    text = {"caption_vocabulary_size": 5, "caption_length": 4, "embeddings_shape": SHAPE}
    shape = {"num_layers": 2, "num_heads": 2, "dim": 16, "dropout": 0.0}
    model = GPT(GPTConfig(CODES, num_classes=2, **grids, **(text | shape | options)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def some_parts(count: int = 3) -> tuple[Tensor, ...]:
    """Classes, conditions, embeddings and captions."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(2, (count, *x), generator=generator) for x in ((), (1, 2), (4,))]
    vectors = torch.randn(count, *SHAPE, generator=generator).half()
    return tokens[0], tokens[1].to(torch.uint8), vectors, tokens[2]


# --- the model -----------------------------------------------------------------------------------


def test_a_prefix_holds_tokens_and_vectors_exactly() -> None:
    classes, conditions, vectors, captions = some_parts()
    prefix = make_prefix(torch.tensor([0, 1, 2**24]), conditions, vectors, captions)
    assert prefix.dtype == torch.float32
    assert prefix[:, 0].long().tolist() == [0, 1, 2**24]
    parts = {part.name: x for part, x in make_model().config.split_prefix(prefix)}
    assert parts["condition"].long().equal(conditions.flatten(1).long())
    assert parts["embeddings"].half().equal(vectors.flatten(1))
    assert parts["caption"].long().equal(captions)
    assert make_prefix(classes, conditions).dtype == torch.int64


@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "window_size": 1}], ids=str)
def test_every_vector_and_its_position_change_every_logit(options: dict[str, Any]) -> None:
    model, parts = make_model(**options), some_parts()
    grids = torch.randint(CODES, (3, 3, 4))
    before = model.logits(make_prefix(*parts), grids)
    for place in range(SHAPE[0]):
        vectors = parts[2].clone()
        vectors[:, place, -1] += 1
        after = model.logits(make_prefix(*parts[:2], vectors, parts[3]), grids)
        assert (after != before).any(dim=2).all()
    swapped = make_prefix(*parts[:2], parts[2][:, [1, 0, 2]], parts[3])
    assert (model.logits(swapped, grids) - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="prefix must have P = 22, got 21"):
        model.logits(make_prefix(*parts)[:, :-1], grids)


@pytest.mark.parametrize("options", [{}, {"window_size": 2}, {"order_anneal": (1.0, 1.0)}], ids=str)
def test_cached_sampling_is_the_uncached_model_in_batches_of_any_size(options: dict) -> None:
    model, prefix = make_model(**options), make_prefix(*some_parts())
    scores = torch.zeros(3)
    sampled = generate(model, prefix, scores=scores)
    if not options.get("order_anneal"):
        torch.testing.assert_close(scores, -model.loss(prefix, sampled).sum(dim=1))
    assert generate(model, prefix, batch_size=2).equal(sampled)
    best = generate_likeliest(model, prefix[[0, 0, 1]], candidates=2)
    assert best.shape == sampled.shape


def test_guidance_goes_without_all_parts_or_those_of_choice() -> None:
    model, prefix = make_model(), make_prefix(*some_parts())
    config, plain = model.config, SamplingParams(guidance_scale=0.0)
    null = config.null_prefix(prefix)
    assert null[0].tolist() == [2, 3, 3, *[np.inf] * 15, *[5] * 4]
    assert generate(model, prefix, params=plain).equal(generate(model, null))
    for names, kept in (("embeddings", [0, 1, 3]), ("class,caption", [1, 2])):
        params = SamplingParams(guidance_scale=0.0, guidance_parts=names)
        without = config.null_prefix(prefix, names)
        assert generate(model, prefix, params=params).equal(generate(model, without))
        pieces = [[x for _, x in config.split_prefix(one)] for one in (prefix, null, without)]
        for number, (given, dropped, found) in enumerate(zip(*pieces, strict=True)):
            assert found.equal(given if number in kept else dropped)
    with pytest.raises(ValueError, match="embeddings, caption, but no part text"):
        generate(model, prefix, params=SamplingParams(guidance_scale=2, guidance_parts="text"))


def test_embeddings_are_dropped_as_a_whole_and_the_learned_vectors_replace_them() -> None:
    model = make_model(embeddings_dropout=0.4)
    prefix = make_prefix(*some_parts(1)).repeat(20_000, 1)
    dropped = model.config.drop_conditioning(prefix)[:, 3:18].isinf()
    assert dropped.any(dim=1).equal(dropped.all(dim=1))
    assert dropped[:, 0].float().mean() == pytest.approx(0.4, abs=0.01)
    model.train()
    grids = torch.randint(CODES, (4, 3, 4))
    null = model.config.null_prefix(prefix[:4], "embeddings")
    mixed = torch.cat([prefix[:2], null[2:]])
    model.loss(mixed, grids).mean().backward()
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)
    layer = model.embeddings_projection
    assert layer.null.grad.abs().sum(dim=1).all()
    vectors = layer.null.detach().expand(4, -1, -1)
    given = make_prefix(null[:, 0].long(), null[:, 1:3].long(), vectors, null[:, 18:].long())
    torch.testing.assert_close(model.loss(given, grids), model.loss(null, grids))


def test_compiled_and_in_bfloat16() -> None:
    model, prefix = make_model(), make_prefix(*some_parts())
    grids = torch.randint(CODES, (3, 3, 4))
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(prefix, grids), model.loss(prefix, grids))
    half = make_model().to(torch.bfloat16)
    torch.testing.assert_close(
        half.loss(prefix, grids), model.loss(prefix, grids), atol=0.3, rtol=0
    )


def test_a_model_folder_and_a_fine_tuning_that_adds_embeddings(tmp_path: Path) -> None:
    model, prefix = make_model(), make_prefix(*some_parts())
    model.save_pretrained(tmp_path)
    assert generate(GPT.from_pretrained(tmp_path), prefix).equal(generate(model, prefix))
    plain = make_model(embeddings_shape=None)
    start_from(model, plain, [0, 1], FineTuningConfig(init_from="x", lora_rank=2))
    assert model.blocks[0].attention.qkv.weight.equal(plain.blocks[0].attention.qkv.weight)
    assert model.embeddings_projection.hidden.weight.requires_grad
    assert not model.head.weight.requires_grad
    old = {"model": "GPT", "codebook_size": CODES, "latent_dim": [3, 4]}
    assert GPTConfig.from_json(old).embeddings_shape is None
    with pytest.raises(ValueError, match=r"embeddings_shape \(3, 4\), but the model has"):
        make_model().config.check_guide(make_model(embeddings_shape=(3, 4)).config)


# --- the scripts ---------------------------------------------------------------------------------


def write_data(count: int = 48) -> Tensor:
    """Indices with a label and a caption; the vectors in vectors.npy determine each grid."""
    generator = np.random.default_rng(0)
    kinds = generator.integers(4, size=count)
    patterns = torch.from_numpy(generator.integers(CODES, size=(4, 2, 3)))
    directions = generator.normal(size=(4, *SHAPE))
    vectors = directions[kinds] + 0.1 * generator.normal(size=(count, *SHAPE))
    rows = [Row(f"{n}.png", "ab"[n % 2], "", caption=f"picture {n % 3}") for n in range(count)]
    write_indices("indices", patterns[kinds], rows, IndicesMeta(CODES, (2, 3)))
    np.save("vectors.npy", vectors.astype(np.float16))
    return patterns[kinds]


def train(output: str, *flags: object) -> None:
    data = ("--path_to_data", "indices", "--embeddings", "vectors.npy", "--output_dir", output)
    call("train", *TINY_GPT, *CPU, *data, *flags)


def test_a_gpt_learns_to_follow_its_embeddings(own_folder: Path, capsys: Any) -> None:
    grids = write_data()
    flags = ("--dropout", 0, "--learning_rate", 1e-2, "--batch_size", 16)
    train("gpt", *flags, "--max_steps", 120, "--embeddings_dropout", 0.2)
    assert "--embeddings vectors.npy" in capsys.readouterr().out
    vocabulary, model = read_vocabulary("gpt"), GPT.from_pretrained("gpt/best")
    assert vocabulary.embeddings == model.config.embeddings_shape == SHAPE
    data = IndexDataset(
        Path("indices"), None, latent_dim=None, val_fraction=0.1, seed=0, embeddings="vectors.npy"
    )
    classes, given, captions = data.prefix_inputs(torch.arange(48))
    swapped = given.roll(1, dims=0)
    none = torch.full_like(given, torch.inf)
    with torch.inference_mode():
        right, wrong, without = (
            model.loss(make_prefix(classes, x, captions), grids).mean().item()
            for x in (given, swapped, none)
        )
    assert right < 0.5 * without
    assert without < wrong

    greedy = ("--embeddings", "vectors.npy", "--temperature", 0)
    # In turn, with no class and no caption beside them; a prompt and a class on demand.
    call(*SAMPLING, 50, *greedy, "--output_dir", "samples")
    samples = read_indices("samples")
    assert (samples.grids[:].long() == grids[[*range(48), 0, 1]]).float().mean() > 0.9
    assert {(row.label, row.caption) for row in samples.rows} == {("", "")}
    words = ("--labels", "b", "--prompt", "picture 1", *greedy)
    guided = ("--guidance_scale", 2, "--guidance_parts", "embeddings", "--output_dir", "guided")
    call(*SAMPLING, 4, *words, *guided)
    assert read_indices("guided").rows[3][1::3] == ("b", "picture 1")
    assert (read_indices("guided").grids[:].long() == grids[:4]).float().mean() > 0.9
    complete = ("--complete", "indices", "--variations", 2, *greedy)
    call(*SAMPLING, 3, *complete, "--mask", "top:0.5", "--output_dir", "completed")
    completed = read_indices("completed").grids[:].long()
    assert (completed == grids[[0, 0, 1, 1, 2, 2]]).float().mean() > 0.9


def test_a_resumed_training_with_embeddings_is_bitwise_the_same(own_folder: Path) -> None:
    write_data()
    train("whole", "--max_steps", 3)
    train("stopped", "--max_steps", 3, "--max_minutes", 1e-6)
    call("train", "--resume", "stopped", "--max_minutes", 9)
    name = "checkpoints/step-00000003/model.safetensors"
    files = [Path(folder, name).read_bytes() for folder in ("whole", "stopped")]
    assert files[0] == files[1]


def test_vectors_are_read_by_memory_map_and_change_the_fingerprint(own_folder: Path) -> None:
    write_data()
    options: dict = {"latent_dim": None, "val_fraction": 0.1, "seed": 0}
    data = IndexDataset(Path("indices"), None, **options, embeddings="vectors.npy")
    assert isinstance(data.embeddings, np.memmap)
    assert "embeddings 3x5, captions " in str(data)
    plain = IndexDataset(Path("indices"), None, **options)
    assert len([*data.arrays]) == len([*plain.arrays]) + 1
    for rows in ([3, 1], [3]):
        assert data.prefix_inputs(torch.tensor(rows))[1].shape == (len(rows), *SHAPE)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((47, 3, 5)), r"float64 \(47, 3, 5\), but it must be .*float64 \(48, L, D\)"),
        (np.zeros((48, 3, 5), int), "int64 .* must be float16 or float32 or float64"),
        (np.zeros((48, 3, 5), ">f4"), ">f4 .* must be float16"),
        (np.zeros((47, 5)), r"float64 \(47, 1, 5\), but it must be .* \(48, L, D\)"),
        (np.zeros((48, 1, 3, 5)), r"float64 \(48, 1, 3, 5\), but it must be .* \(48, L, D\)"),
        (np.zeros((0, 3, 5)), "bad.npy"),
        (np.array([{"a": 1}] * 48), "bad.npy is damaged: .*Python objects"),
        (np.full((48, 3, 5), np.nan), "bad.npy has NaN or infinity in row 1"),
        ("text", "bad.npy is damaged"),
    ],
)
def test_bad_embeddings_are_one_line(
    own_folder: Path, array: Any, message: str, error_of: Callable[..., str]
) -> None:
    write_data()
    if isinstance(array, str):
        Path("bad.npy").write_text(array)
    else:
        np.save("bad.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        check_finite(open_array(Path("bad.npy"), (48, "L", "D"), VECTORS), "bad.npy")


COLUMNS = {
    "one vector": ([[1.0, 2.0], [3.0, 4.0]], [[[1, 2]], [[3, 4]]]),
    "lists": ([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]], [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]),
    "fixed size": (pa.FixedSizeListArray.from_arrays([1.0, 2, 3, 4], 2), [[[1, 2]], [[3, 4]]]),
}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS.keys())
def test_vectors_of_a_table(own_folder: Path, column: Any, suffix: str) -> None:
    """A column `embedding` beside the images, a vector or a list of vectors in each row."""
    values, expected = column
    file = write(own_folder / f"t{suffix}", image_path=["a", "b"], embedding=values)
    vectors = open_array(file, (2, "L", "D"), VECTORS)
    np.testing.assert_array_equal(vectors, np.array(expected, np.float32))


def test_one_vector_for_each_image(own_folder: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(48, 5))
    np.save("flat.npy", vectors)
    found = open_array(Path("flat.npy"), (48, "L", "D"), VECTORS)
    np.testing.assert_array_equal(found, vectors[:, None])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, 't.parquet is damaged: .*"embedding" does not exist'),
        ([[1.0], [1.0, 2.0]], "t.parquet is damaged: "),
        (["a", "b"], "t.parquet is damaged: could not convert string to float"),
        ([None, [1.0]], "t.parquet is damaged: "),
        (
            [[1.0], [2.0], [3.0]],
            r"t.parquet holds float32 \(3, 1, 1\), but it must be .*\(2, L, D\)",
        ),
    ],
)
def test_bad_columns_are_one_line(own_folder: Path, values: Any, message: str) -> None:
    file = write(
        own_folder / "t.parquet", **({"x": [1]} if values is None else {"embedding": values})
    )
    with pytest.raises(UserError, match=message):
        open_array(file, (2, "L", "D"), VECTORS)


def test_one_row_that_is_not_finite_is_named(own_folder: Path) -> None:
    vectors = np.zeros((300, 2, 4), np.float32)
    vectors[200, 1, 3] = np.inf
    with pytest.raises(UserError, match="has NaN or infinity in row 201"):
        check_finite(vectors, "bad.npy")


def test_what_samples_cannot_be_conditioned_on(
    own_folder: Path, error_of: Callable[..., str], capsys: Any
) -> None:
    write_data()
    train("gpt", "--max_steps", 1)
    np.save("other.npy", np.zeros((4, 3, 6), np.float32))
    given = ("--output_dir", "no", "--embeddings")
    error = error_of(*SAMPLING, 4, *given, "other.npy")
    assert "float32 (4, 3, 6), but it must be float16 or float32 or float64 (N, 3, 5)" in error
    assert "--embeddings cannot" in error_of(*SAMPLING, 4, *given, "vectors.npy", "--unconditional")
    guided = ("--output_dir", "no", "--guidance_parts", "text")
    assert "--guidance_parts needs --guid" in error_of(*SAMPLING, 4, *guided)
    assert "but no part text" in error_of(*SAMPLING, 4, *guided, "--guidance_scale", 2)
    call("train", *TINY_GPT, *CPU, "--path_to_data", "indices", "--max_steps", 1,
         "--output_dir", "plain")  # fmt: skip
    error = error_of(*SAMPLING, 4, "--model_path", "plain", *given, "vectors.npy")
    assert "the GPT in plain takes no embeddings; omit --emb" in error
    assert not Path("no").exists()


def test_the_likelihood_is_that_with_the_embeddings(
    own_folder: Path, error_of: Callable[..., str]
) -> None:
    data = write_images(own_folder / "data")
    make_tokenizer(own_folder / "tokenizer", (24, 40), 3)
    models = (*CPU, "--model_dir", "tokenizer")
    call("quantize_dataset", *models, "--path_to_data", data, "--output_dir", "indices")
    np.save("vectors.npy", np.random.default_rng(0).normal(size=(12, 1, 4)))
    train("gpt", "--max_steps", 2, "--learning_rate", 0.1)
    score = ("evaluate", "likelihood", *models, "--model_path", "gpt", "--path_to_data", data)
    bits = []
    for flags in ((), ("--embeddings", "vectors.npy")):
        call(*score, *flags, "--output_dir", "score")
        found = json.loads(Path("score/likelihood.json").read_text())["metrics"]
        bits.append(found["bits_per_token"]["value"])
    assert bits[0] != bits[1]
    np.save("vectors.npy", np.zeros((11, 1, 4)))
    assert "(12, 1, 4)" in error_of(*score, "--embeddings", "vectors.npy", "--output_dir", "no")


# --- the script that makes them ------------------------------------------------------------------


@pytest.fixture
def encoders(own_folder: Path) -> None:
    """Text encoders of random weights: CLIP's and T5's, with a tokenizer of words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: n for n, word in enumerate(("<pad>", "<unk>", "picture", "0", "1", "2"))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special: dict[str, Any] = {"pad_token": "<pad>", "unk_token": "<unk>"}
    special["model_input_names"] = ["input_ids", "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5Model(transformers.T5Config(**sizes))
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    text = small | {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 5}
    vision = small | {"image_size": 8, "patch_size": 8}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    for name, network in (("t5", t5), ("clip", clip)):
        network.save_pretrained(name)
        tokenizer.save_pretrained(name)


@pytest.mark.parametrize(("encoder", "dim"), [("t5", 16), ("clip", 8)])
def test_the_script_encodes_captions_and_prompts(encoders: None, encoder: str, dim: int) -> None:
    write_data()
    make = ("utils.embeddings", *CPU, "--encoder", encoder, "--length", 3, "--output_file")
    call(*make, "captions.npy", "--path_to_data", "indices", "--batch_size", 7)
    vectors = np.load("captions.npy")
    assert vectors.shape == (48, 3, dim)
    assert vectors.dtype == np.float16
    assert (vectors[:, 2] == 0).all()  # of two tokens each
    assert np.allclose(vectors[:3], vectors[45:], atol=1e-3)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-2)
    call(*make, "prompts.npy", "--prompt", "picture 1", "--prompt", "picture 1 2 0")
    assert np.allclose(np.load("prompts.npy")[0], vectors[1], atol=1e-3)
    assert not Path("prompts.tmp").exists()


def test_without_the_package_or_the_encoder_one_line_says_so(
    own_folder: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = ("utils.embeddings", *CPU, "--prompt", "x", "--output_file", "x.npy", "--encoder", "no")
    stub: Any = types.ModuleType("transformers")

    def offline(name: str) -> None:
        raise OSError(f"We couldn't connect to 'https://huggingface.co'\nto load {name}")

    stub.AutoTokenizer = stub.AutoModel = types.SimpleNamespace(from_pretrained=offline)
    monkeypatch.setitem(sys.modules, "transformers", stub)
    assert "cannot load the text encoder no: We couldn't connect to" in error_of(*make)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in error_of(*make)
    Path("data.csv").write_text("image_path\na.png\n")
    make = (*make[:3], "--path_to_data", "data.csv", *make[5:])
    assert "data.csv has no captions; add some" in error_of(*make)
