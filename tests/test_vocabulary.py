"""What the tokens of a GPT mean: labels to prefix tokens and back, and models that do not fit."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from transformer import GPTConfig
from utils.cli import UserError
from utils.data.vocabulary import GridMeta, Vocabulary, read_vocabulary
from utils.files import write_folder

WORDS = Vocabulary(512, (7, 4), "ab" * 32, "run", class_names=("0001", "1", "NA"))


def test_labels_and_tokens() -> None:
    assert WORDS.tokens(["NA", "0001", "", "1", "NA"]) == [2, 0, 3, 1, 2]
    assert WORDS.no_class == 3
    assert Vocabulary(512, (7, 4)).tokens(["", ""]) == [0, 0]


def test_conditions_and_depth_are_kept(tmp_path: Path) -> None:
    words = replace(WORDS, depth=4, condition=GridMeta(16, (2, 3), "cd" * 32, "other"))
    write_folder(tmp_path / "best", {"vocabulary.json": words.content()})
    assert read_vocabulary(tmp_path) == words
    assert words.model_values["condition_latent_dim"] == (2, 3)
    assert WORDS.model_values["condition_latent_dim"] is None


def test_unknown_labels_are_named_with_the_classes() -> None:
    with pytest.raises(UserError, match="unknown label 2, x; the classes are: 0001, 1, NA"):
        WORDS.tokens(["x", "1", "2", "x"])
    with pytest.raises(UserError, match=r"unknown label cat; .* trained without labels"):
        Vocabulary(512, (7, 4)).tokens(["cat"])


def test_labels_that_a_model_has_no_word_for_can_be_left_out() -> None:
    with pytest.raises(UserError, match="add --unconditional"):
        WORDS.tokens(["3"])


def test_another_tokenizer_is_refused() -> None:
    config = SimpleNamespace(codebook_size=512, depth=1, latent_dim=(7, 4))
    WORDS.check_tokenizer("ab" * 32, "here", config)
    WORDS.check_tokenizer("", "here", config)
    with pytest.raises(UserError, match=r"abababababab .*, but that of here is cdcdcdcdcdcd"):
        WORDS.check_tokenizer("cd" * 32, "here")
    unknown = replace(WORDS, tokenizer_sha256="")
    unknown.check_tokenizer("cd" * 32, "here", config)
    for name, value in (("codebook_size", 16), ("depth", 4), ("latent_dim", (4, 7))):
        other = SimpleNamespace(**vars(config) | {name: value})
        with pytest.raises(UserError, match=f"but here has {name} "):
            unknown.check_tokenizer("cd" * 32, "here", other)


@pytest.mark.parametrize("where", ["best/vocabulary.json", "best", ""])
def test_round_trip(tmp_path: Path, where: str) -> None:
    write_folder(tmp_path / "best", {"vocabulary.json": WORDS.content()})
    assert read_vocabulary(tmp_path / where) == WORDS
    content = json.loads((tmp_path / "best" / "vocabulary.json").read_text())
    assert content["prefix_tokens"] == {"0001": 0, "1": 1, "NA": 2}
    assert content["no_class"] == 3


def test_what_is_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no vocabulary at .*none"):
        read_vocabulary(tmp_path / "none")
    with pytest.raises(UserError, match="no vocabulary at"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"codebook_size": 4, "latent_dim": 7}',
        '{"codebook_size": 4, "latent_dim": [7]}',
        '{"codebook_size": 4, "latent_dim": [7, 4], "class_names": ["a", "a"]}',
        '{"codebook_size": 4, "latent_dim": [7, 4], "class_names": "ab"}',
        '{"codebook_size": "4", "latent_dim": [7, 4]}',
        '{"codebook_size": 4, "latent_dim": [7, 4], "colour": 1}',
        '{"codebook_size": 4, "latent_dim": [7, 4], "condition": 7}',
        '{"codebook_size": 4, "latent_dim": [7, 4], "condition": {"codebook_size": 4}}',
        '{"codebook_size": 4, "latent_dim": [7, 4], "class_names": [1]}',
        '{"codebook_size": 4, "latent_dim": [7, 4], "class_names": [["a"]]}',
        '{"codebook_size": 4, "latent_dim": [7, 0]}',
        '{"codebook_size": true, "latent_dim": [7, 4]}',
    ],
)
def test_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(UserError, match=r"vocabulary\.json"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"codebook_size": 64}, "its codebook_size is 512, the GPT's 64"),
        ({"latent_dim": (4, 7)}, r"its latent_dim is \(7, 4\), the GPT's \(4, 7\)"),
        ({"num_classes": 10}, "its num_classes is 3, the GPT's 10"),
        ({"depth": 4}, "its depth is 1, the GPT's 4"),
        ({"condition_codebook_size": 9}, "its condition_codebook_size is 0, the GPT's 9"),
    ],
)
def test_another_gpt_is_refused_with_both_values(change: dict, complaint: str) -> None:
    fitting = asdict(GPTConfig(512, latent_dim=(7, 4), num_classes=3))
    WORDS.check_model(SimpleNamespace(**fitting), Path("best"))
    with pytest.raises(UserError, match=complaint):
        WORDS.check_model(SimpleNamespace(**fitting | change), Path("best"))
