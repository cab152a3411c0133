"""Inception and DINOv2: the published networks, here with weights that nobody trained."""

from pathlib import Path

import pytest
import torch

from utils.cli import UserError
from utils.evaluation.distances import key
from utils.evaluation.inputs import open_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of torch-fidelity's Inception, as it would be downloaded."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(
            fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None
        )
        network = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_sees_what_that_of_torchmetrics_sees(inception: Path) -> None:
    """From the images on, with its own resizing; the distance itself is in test_distances.py."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 20, 24), dtype=torch.uint8, generator=generator)
    reference = FrechetInceptionDistance(feature_extractor_weights_path=str(inception))
    network = open_network("inception", str(inception), CPU)
    with torch.inference_mode():
        features, logits = network.network(images / 127.5 - 1)
        assert torch.allclose(features, reference.inception(images), atol=1e-6)
        assert logits.shape == (4, 1008)
        assert network.network(torch.zeros(2, 1, 8, 8))[0].shape == (2, 2048)  # grey images
    assert key("fd", network.name) == "fid"


def test_weights_of_another_network(inception: Path) -> None:
    torch.save({"layer.weight": torch.zeros(3)}, "other.pth")
    with pytest.raises(UserError, match=r"inception cannot use other\.pth"):
        open_network("inception", "other.pth", CPU)
    torch.save([1, 2], "list.pth")
    with pytest.raises(UserError, match=r"inception cannot use list\.pth"):
        open_network("inception", "list.pth", CPU)


def test_files_that_are_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("words.pth").write_text("words")
    with pytest.raises(UserError, match=r"words\.pth .* give the \.pth of github\.com/toshas/"):
        open_network("inception", "words.pth", CPU)

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"no route to host.* --feature_weights"):
        open_network("inception", "", CPU)


def test_a_pickle_that_runs_code_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (Path("sprung"),)

    torch.save({"fc.weight": Trap()}, "trap.pth", pickle_module=pickle)
    with pytest.raises(UserError, match=r"cannot use trap\.pth"):
        open_network("inception", "trap.pth", CPU)
    assert not Path("sprung").exists()


def test_dinov2_from_a_folder() -> None:
    from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    Dinov2Model(Dinov2Config(**small, image_size=28)).save_pretrained("dino")
    network = open_network("dinov2", "dino", CPU)
    with torch.inference_mode():
        features, logits = network.network(torch.rand(3, 1, 9, 12) * 2 - 1)
    assert features.shape == (3, 8)
    assert logits is None
    assert key("fd", network.name) == "fd_dinov2"
    assert network.protocol == open_network("dinov2", "dino", CPU).protocol
    BertModel(BertConfig(**small, intermediate_size=8, vocab_size=9)).save_pretrained("bert")
    with pytest.raises(UserError, match="dinov2 cannot use bert"):
        open_network("dinov2", "bert", CPU)
    Path("tokenizer").mkdir()
    Path("tokenizer/config.json").write_text('{"model": "VQVAE"}')
    for wrong in ("tokenizer", "."):
        with pytest.raises(UserError, match=f"dinov2 cannot use {wrong}"):
            open_network("dinov2", wrong, CPU)
    with pytest.raises(UserError, match=r"no folder nowhere.*huggingface\.co/facebook/dinov2"):
        open_network("dinov2", "nowhere", CPU)


def test_weights_without_their_network() -> None:
    assert open_network("classifier", "", CPU) is None
    assert open_network(None, "", CPU) is None
    with pytest.raises(UserError, match="--feature_weights needs"):
        open_network("classifier", "weights.pth", CPU)
