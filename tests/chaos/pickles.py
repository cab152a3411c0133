"""Pickles that run code, in place of every file that is ever read: none may run."""

import contextlib
import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.chaos.harness import Result
from tests.conftest import parsed
from transformer import GPT, GPTConfig
from utils import cli, distributed, foreign
from utils.data import images, indices, sources, vocabulary
from utils.files import CHECKSUMS, read_tensors, write_folder
from utils.provenance import Provenance, load_model, model_files
from utils.training.state import CheckpointState, Progress
from vqvae import VQVAE, VQVAEConfig, losses

CANARY = Path("canary")
GRID = (2, 2)


class Runs:
    """Unpickled, it calls something that leaves a mark."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


def _payloads() -> Iterator[tuple[str, object]]:
    """Objects whose unpickling makes the canary, in several ways."""
    code = f"open({str(CANARY.absolute())!r}, 'w').close()"
    yield "exec", Runs(exec, code)
    yield "eval", Runs(eval, code)
    yield "system", Runs(os.system, f"touch {CANARY.absolute()}")
    yield "path", Runs(Path.touch, CANARY.absolute())
    yield "in a state dict", {"state_dict": {"weight": Runs(exec, code)}, "model": Runs(exec, code)}
    yield "as a key", {"model": {"a": torch.zeros(1), "b": (Runs(exec, code),)}}


def _disguises(payload: object) -> Iterator[tuple[str, bytes]]:
    """The payload as files of many kinds."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        raw = pickle.dumps(payload, protocol)
        yield f"pickle {protocol}", raw
    yield "a safetensors header", len(raw).to_bytes(8, "little") + raw
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save(payload, stream, _use_new_zipfile_serialization=zipped)
        yield f"torch.save {'zip' if zipped else 'legacy'}", stream.getvalue()
    array = np.empty(1, object)
    array[0] = payload
    for save in (np.save, np.savez):
        stream = io.BytesIO()
        save(stream, array, allow_pickle=True)
        yield save.__name__, stream.getvalue()
    for name in ("data.pkl", "archive/data.pkl", "constants.pkl", "indices.npy"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(name, raw)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
        yield f"zip of {name}", stream.getvalue()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    yield "tar of old torch", stream.getvalue()


def _readers() -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Everything that reads a file: which one, and how."""
    config = VQVAEConfig.create(
        image_size=(8, 8), in_channels=3, channels=8, codebook_size=16, codebook_dim=4
    )
    words = vocabulary.Vocabulary(16, GRID)
    model = VQVAE(config)
    gpt_config = GPTConfig(codebook_size=16, latent_dim=GRID, dim=16, num_heads=2, num_layers=1)
    gpt = GPT(gpt_config)
    optimizer = torch.optim.AdamW(model.parameters())
    files = model_files(model, Provenance())
    group = distributed.init_distributed("cpu", seed=0)
    state = CheckpointState(group, model, {}, progress=Progress(), optimizer=optimizer)
    files |= state.files()
    write_folder(Path("model"), files)
    files = model_files(gpt, Provenance())
    write_folder(Path("gpt"), files | {vocabulary.FILE: words.content()})
    rows = [sources.Row("a.png", "", "train")] * 3
    grids = torch.zeros(3, *GRID, dtype=torch.long)
    meta = indices.IndicesMeta(16, GRID)
    with indices.new_folder(Path("indices"), rows, meta, text=True) as staging:
        indices.save_grids(staging / "indices.npy", grids, meta.codebook_size)
    for folder in ("model", "gpt", "indices"):
        (Path(folder) / CHECKSUMS).unlink()  # which would stop all of them at once
    Image.new("RGB", (8, 8)).save("a.png")
    Path("data.csv").write_text("image_path\na.png\n")
    found: dict[str, tuple[Path, Callable[[], Any]]] = {}
    for name in ("config.json", "model.safetensors", "provenance.json", "sha256.json"):
        read = lambda: load_model("model", VQVAE)  # noqa: E731
        found[f"model {name}"] = Path("model", name), read
        read = lambda: load_model("gpt", GPT)  # noqa: E731
        found[f"gpt {name}"] = Path("gpt", name), read
    for name in ("training.safetensors", "training.json", "model.safetensors"):
        found[f"resume {name}"] = Path("model", name), lambda: state.restore(Path("model"))
    for name in ("meta.json", "manifest.csv", "indices.npy", "sha256.json"):
        found[f"indices {name}"] = Path("indices", name), lambda: indices.read_indices("indices")
    text = Path("indices", "indices.txt")
    found["text indices"] = text, lambda: indices.read_indices(text)
    found["vocabulary"] = Path("gpt", "vocabulary.json"), lambda: vocabulary.read_vocabulary("gpt")
    found["CSV"] = Path("data.csv"), lambda: sources.read_rows("data.csv")
    found["image"] = Path("a.png"), lambda: images.ImageDataset("data.csv")
    for name in ("a.ckpt", "a.pt", "a.pth", "a.bin"):
        found[f"foreign {name}"] = Path(name), lambda name=name: foreign.read_state_dict(name, "a")
    found["foreign safetensors"] = (
        Path("b.safetensors"),
        lambda: read_tensors(Path("b.safetensors")),
    )
    found["LPIPS weights"] = Path("lpips.pth"), _read_backbone
    return found


def _read_backbone() -> Any:
    return cli.build_or_error(losses.PerceptualLoss, "alex", "lpips.pth")


def run(count: int) -> Result:
    """Every payload (`count` of them) in every disguise for every reader."""
    readers = _readers()
    outcomes: Counter[str] = Counter()
    unclear: list[str] = []
    for name, payload in list(_payloads())[:count]:
        for disguise, content in _disguises(payload):
            for reader, (path, read) in readers.items():
                before = path.read_bytes() if path.exists() else None
                path.write_bytes(content)
                outcome = _attempt(read)
                outcomes[outcome] += 1
                if outcome not in ("refused", "read"):
                    unclear.append(f"{reader} from {disguise} of {name}: {outcome}")
                if CANARY.exists():
                    outcomes["executed"] += 1
                    unclear.append(f"{reader} from {disguise} of {name}: executed")
                    CANARY.unlink()
                path.unlink()
                if before is not None:
                    path.write_bytes(before)
    worked = all(_explodes(payload) for _, payload in _payloads())
    shutil.rmtree("model")
    detail = f"{outcomes['executed']} executions; {outcomes['refused']:,} refused in a line"
    if outcomes["read"]:
        detail += f", {outcomes['read']:,} read as what they look like"
    detail += "" if worked else "; but not all payloads work at all"
    detail += "".join(f"; {text}" for text in unclear[:3])
    return Result(outcomes.total(), worked and not unclear, detail)


def _attempt(read: Callable[[], Any]) -> str:
    """How a reader takes a file, as the user of a script would see it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cli.run(lambda _: read(), parsed(debug=False))
    except SystemExit as stop:
        lines = said.getvalue().splitlines()
        return "refused" if stop.code == 2 and len(lines) == 1 else f"said {lines!r:.200}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.100}"
    return "read"


def _explodes(payload: object) -> bool:
    """Whether a payload does what it is for, read by the one function that may."""
    pickle.loads(pickle.dumps(payload))
    there = CANARY.exists()
    CANARY.unlink(missing_ok=True)
    return there
