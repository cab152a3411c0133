"""vocabulary.json: the meaning of a GPT's tokens, and the tokenizer that indices belong to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.cli import Checked, UserError, first_few, user_error
from utils.files import read_json, typed, verify

FILE = "vocabulary.json"
DERIVED = ("prefix_tokens", "no_class")  # in the file for its readers, from class_names
LARGEST_CODEBOOK = 1 << 32  # of text files and .npy files of uint32


@dataclass(frozen=True)
class GridMeta(Checked):
    """The codebook, the size and the tokenizer that a grid of indices belongs to."""

    codebook_size: int = field(metadata={"min": 2, "max": LARGEST_CODEBOOK})  # K, above any index
    latent_dim: tuple[int, int] = field(metadata={"min": 1})  # rows and columns (h, w) of a grid
    tokenizer_sha256: str = ""  # of its model.safetensors; "" if not known, as the next
    tokenizer_run_id: str = ""  # its MLflow run
    depth: int = field(default=1, metadata={"min": 1})  # indices per latent position

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one grid's indices: (h, w), or (h, w, depth) for a depth above 1."""
        return self.latent_dim if self.depth == 1 else (*self.latent_dim, self.depth)

    def check_tokenizer(
        self, sha256: str, where: str | Path, config: Any = None, owner: str | Path = "the GPT"
    ) -> None:
        """A UserError for a tokenizer, or grids, that these grids of `owner` do not belong to.

        `sha256` is that of the tokenizer ("" if not known) and `where` its folder, or the path of
        the grids; `config` is that of the tokenizer, or the `GridMeta` of the grids.
        """
        if self.tokenizer_sha256 != sha256 and "" not in (self.tokenizer_sha256, sha256):
            raise UserError(
                f"{owner} belongs to the tokenizer {self.tokenizer_sha256[:12]} (run "
                f"{self.tokenizer_run_id or 'unknown'}), but that of {where} is {sha256[:12]}; use "
                "indices and models of one tokenizer"
            )
        for name in ("codebook_size", "depth", "latent_dim") if config is not None else ():
            own, theirs = getattr(self, name), getattr(config, name)
            if own != theirs:
                raise UserError(
                    f"{owner} has {name} {own}, but {where} has {name} {theirs}; use indices and "
                    "models of one tokenizer"
                )


@dataclass(frozen=True)
class TextMeta(Checked):
    """The text tokens of captions, see `utils.data.captions`."""

    tokenizer: str  # JSON of the library `tokenizers`
    # Text tokens; the one after them pads, and is "not given".
    vocabulary_size: int = field(metadata={"min": 1})
    length: int = field(metadata={"min": 1})  # text tokens of a caption


@dataclass(frozen=True)
class Vocabulary(GridMeta):
    """The meaning of a GPT's tokens; None for a part that does not stand before the image."""

    class_names: tuple[str, ...] = ()  # the labels in the order of their prefix tokens 0, 1, ...
    class_counts: tuple[int, ...] = ()  # images of each class in the data; () if not known
    condition: GridMeta | None = None  # of the conditioning grid
    embeddings: tuple[int, int] | None = None  # (L, D), vectors and numbers of each
    captions: TextMeta | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names must be distinct")

    @property
    def prefix_tokens(self) -> dict[str, int]:
        """The prefix token of each class."""
        return {name: token for token, name in enumerate(self.class_names)}

    @property
    def no_class(self) -> int:
        """The prefix token of "no class"."""
        return len(self.class_names)

    @property
    def model_values(self) -> dict[str, Any]:
        """The fields of a GPT's config that follow from the vocabulary."""
        condition, captions = self.condition, self.captions
        return {
            "codebook_size": self.codebook_size,
            "depth": self.depth,
            "num_classes": len(self.class_names),
            "latent_dim": self.latent_dim,
            "condition_codebook_size": condition.codebook_size if condition else 0,
            "condition_latent_dim": condition.latent_dim if condition else None,
            "embeddings_shape": self.embeddings,
            "caption_vocabulary_size": captions.vocabulary_size if captions else 0,
            "caption_length": captions.length if captions else 0,
        }

    def tokens(self, labels: Sequence[str]) -> list[int]:
        """Prefix tokens of labels; the empty label is "no class". A UserError for unknown ones."""
        tokens = self.prefix_tokens | {"": self.no_class}
        unknown = sorted(set(labels) - tokens.keys())
        if unknown:
            known = first_few(self.class_names, limit=20) or "none, it was trained without labels"
            raise UserError(
                f"unknown label {first_few(unknown)}; the classes are: {known}; to go without "
                "labels add --unconditional"
            )
        return [tokens[label] for label in labels]

    def check_model(self, config: Any, folder: Path) -> None:
        """A UserError for the config of a GPT that this vocabulary does not belong to."""
        for name, own in self.model_values.items():
            theirs = getattr(config, name)
            if own != theirs:
                raise UserError(
                    f"the vocabulary does not belong to the GPT in {folder}: its {name} is {own}, "
                    f"the GPT's {theirs}; give the {FILE} beside the GPT"
                )

    def check_guide(self, other: "Vocabulary", folder: Path) -> None:
        """A UserError if tokens mean something else to the GPT in a folder, with another one."""
        self.check_tokenizer(other.tokenizer_sha256, folder)
        for name in ("class_names", "captions"):
            if getattr(self, name) != getattr(other, name):
                raise UserError(
                    f"the guide in {folder} has other {name} than the GPT; guide by one that was "
                    "trained on the same data"
                )

    def check_codes(self, data: "Vocabulary", path: Path, folder: Path) -> None:
        """A UserError if the indices of `data` are not of the tokenizers of the GPT in a folder."""
        pairs: Any = (self, data), (self.condition, data.condition)
        for before, now in (pair for pair in pairs if None not in pair):
            same_size = replace(now, latent_dim=before.latent_dim)
            with user_error("%s, or add --reset_embeddings", UserError):
                before.check_tokenizer(now.tokenizer_sha256, path, same_size, folder)

    def content(self) -> dict[str, Any]:
        """The values in vocabulary.json."""
        return asdict(self) | {name: getattr(self, name) for name in DERIVED}


def find_vocabulary(path: str | Path) -> Path:
    """vocabulary.json: the file, in its folder, or in an output folder with `best` in it."""
    path = Path(path)
    for candidate in (path, path / FILE, path / "best" / FILE):
        if candidate.is_file():
            return candidate
    raise UserError(f"no vocabulary at {path}; it is saved beside the GPT as {FILE}")


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read vocabulary.json, see `find_vocabulary`; a UserError if there is none."""
    file = find_vocabulary(path)
    verify(file)
    values = {name: x for name, x in read_json(file).items() if name not in DERIVED}
    with user_error(f"{file} is not a vocabulary: %s", UserError):
        return typed(Vocabulary, values)
