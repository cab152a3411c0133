"""Bytes of checkpoints, models, indices, vocabularies and logs, flipped, cut and swapped."""

import os
import pickle
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from tests.chaos.harness import Result
from transformer import GPT, GPTConfig
from utils import provenance
from utils.cli import UserError
from utils.data.indices import IndicesMeta, read_indices, write_indices
from utils.data.sources import Row
from utils.data.vocabulary import FILE, Vocabulary, read_vocabulary
from utils.distributed import Distributed
from utils.files import read_tensors, write_folder
from utils.provenance import LINEAGE, Provenance, Stage, load_model, model_files
from utils.tracking import sync
from utils.training.checkpoint import find_checkpoint
from utils.training.state import CheckpointState, Progress
from vqvae import VQVAE, VQVAEConfig

GRID = (6, 10)
ALONE = Distributed(0, 1, torch.device("cpu"))
LOGS = "logs"
CANARY = Path("canary")
BATCH = 500  # cases a process
Reader = Callable[[], Any]


class Canary:
    """What unpickles to a file that should not be there."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {CANARY}",)


def run(count: int) -> Result:
    """Damage a file, read what it belongs to, mend it; `count` times."""
    torch.manual_seed(0)
    readers = _make_files()
    chance = random.Random(2)
    seen: Counter[str] = Counter()
    problems: list[str] = []
    for start in range(0, count, BATCH):
        cases = [_case(readers, chance) for _ in range(min(BATCH, count - start))]
        outcome, problem = _in_a_process(readers, cases)
        seen.update(outcome)
        problems += problem
    executed = CANARY.exists()
    detail = (
        f"{seen['refused']:,} refused in one line, {seen['fell back']:,} fell back to the "
        f"checkpoint before, {seen['same']:,} read what was written all the same, "
        f"{seen['in part']:,} read what else is in a log, "
        f"{len(problems)} anything else; {int(executed)} canaries executed"
    )
    return Result(count, not problems and not executed, "; ".join([detail, *problems[:3]]))


def _make_files() -> dict[str, Reader]:
    """Folders of every kind, and what reads each."""
    vqvae = VQVAE(
        VQVAEConfig.create(image_size=(24, 40), in_channels=3, channels=8, codebook_size=16)
    )
    write_folder(Path("tokenizer"), model_files(vqvae, Provenance()))
    gpt = GPT(GPTConfig(codebook_size=16, num_classes=2, latent_dim=GRID, dim=16, num_heads=2))
    words = Vocabulary(16, GRID, class_names=("a", "b"))
    write_folder(Path("gpt"), model_files(gpt, Provenance()) | {FILE: words.content()})
    rows = [Row(f"{n}.png", "ab"[n % 2], "val" if n > 8 else "train") for n in range(12)]
    write_indices("indices", torch.randint(0, 16, (12, *GRID)), rows, IndicesMeta(16, GRID))
    for step in (1, 2):
        optimizer = torch.optim.AdamW(gpt.parameters())
        sum(parameter.sum() for parameter in gpt.parameters()).backward()
        optimizer.step()
        state = CheckpointState(ALONE, gpt, {}, Progress(step), optimizer=optimizer)
        files = state.files() | model_files(gpt, Provenance())
        write_folder(Path(f"training/checkpoints/step-{step:08}"), files)

    lineage = (Stage("gpt", "python train.py", {"data.csv": "ab" * 32}, "a"),)
    out = Path(LOGS)
    out.mkdir()
    (out / LINEAGE).write_text(provenance.to_json(lineage))
    for event in (
        sync.Event(1.0, "a", "status", "RUNNING"),
        sync.Event(2.0, "a", "lineage", "a", lineage=lineage),
        sync.Event(3.0, "a", "picture", "a", "pictures/a.png", step=1),
        sync.Event(4.0, "a", "folder", "checkpoints/best", "best"),
        sync.Event(5.0, "a", "model", "", "best", step=1, values={"m": 1.0}),
    ):
        sync.append(out / sync.EVENTS, event)
    for step in range(5):
        line = sync.Event(time.time(), "a", step=step, values={"val/mse": 1 / (step + 1)})
        sync.append(out / sync.METRICS, line)

    def read_model(folder: str, kind: type) -> Any:
        model = load_model(folder, kind).model
        return model.config, {name: x.tolist() for name, x in model.state_dict().items()}

    def read_grids() -> Any:
        indices = read_indices("indices")
        return indices.grids[:].tolist(), [*indices.rows], indices.meta

    def read_checkpoint() -> Any:
        folder = find_checkpoint("training", "")
        return folder.name, {
            name: x.tolist() for name, x in read_tensors(folder / "training.safetensors").items()
        }

    def read_logs() -> Any:
        return sync.read_events(out), sync.read_metrics(out)

    return {
        "tokenizer": lambda: read_model("tokenizer", VQVAE),
        "gpt": lambda: (read_model("gpt", GPT), read_vocabulary("gpt")),
        "indices": read_grids,
        "training": read_checkpoint,
        LOGS: read_logs,
    }


def _case(readers: dict[str, Reader], chance: random.Random) -> tuple[str, Path, bytes]:
    """A folder, one of its files, and what is to stand in it."""
    folder = chance.choice(list(readers))
    files = sorted(path for path in Path().rglob("*") if path.is_file())
    # Of a training the newest checkpoint is hit: the one before is there to fall back to.
    mine = [path for path in files if path.parts[0] == folder and "step-00000001" not in path.parts]
    path = chance.choice(mine)
    content = bytearray(path.read_bytes())
    kind = chance.choice(("flip", "flip", "cut", "swap", "zero", "add", "pickle"))
    if kind == "flip":
        for _ in range(chance.choice((1, 1, 8))):
            # Half of them in the first bytes, where headers are.
            limit = chance.choice((len(content), min(len(content), 200)))
            content[chance.randrange(limit)] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[chance.randrange(len(content)) :]
    elif kind == "swap":
        content = chance.choice(files).read_bytes()
    elif kind == "zero":
        start = chance.randrange(len(content))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    elif kind == "add":
        content += chance.randbytes(chance.randrange(1, 100))
    else:
        content = pickle.dumps(Canary())
    return folder, path, bytes(content)


def _in_a_process(
    readers: dict[str, Reader], cases: list[tuple[str, Path, bytes]]
) -> tuple[Counter[str], list[str]]:
    """Try the cases in a fork of this process, which may die of them."""
    results = Path("results.txt")
    results.write_text("")
    pid = os.fork()
    if pid == 0:
        try:
            expected = {folder: read() for folder, read in readers.items()}
            with results.open("a") as file:
                for folder, path, content in cases:
                    file.write(_try(readers[folder], expected[folder], path, content) + "\n")
                    file.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    lines = results.read_text().splitlines()
    problems = [line for line in lines if line not in ("refused", "fell back", "same", "in part")]
    if code:
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        problems.append(f"{name} after {len(lines)} of {len(cases)} cases")
    return Counter(lines), problems


def _try(read: Reader, expected: Any, path: Path, content: bytes) -> str:
    """What comes of reading with `content` in a file, in one line."""
    good = path.read_bytes()
    path.write_bytes(content)
    said = StringIO()
    try:
        with redirect_stderr(said):
            found = read()
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"{path}: several lines: {error!r:.100}"
    except Exception as error:
        return f"{path}: {type(error).__name__}: {error!s:.100}".replace("\n", " ")
    finally:
        path.write_bytes(good)
    if found == expected:
        return "same"
    if path.parts[0] == LOGS:  # nothing says what was in a line that can still be read
        return "in part"
    return "fell back" if "is damaged or missing" in said.getvalue() else f"{path}: read"
