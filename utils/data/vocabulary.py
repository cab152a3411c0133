"""vocabulary.json: what the tokens of a GPT mean."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.cli import UserError, first_few
from utils.data.grid_meta import GridMeta
from utils.files import read_json, typed, verify

FILE = "vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a GPT mean.

    Attributes:
        codebook_size: K, the indices of the grid.
        latent_dim: rows and columns (h, w) of the grid.
        class_names: the labels in the order of their prefix tokens 0, 1, ...
        tokenizer_sha256: of the tokenizer's model.safetensors, "" if not known.
        tokenizer_run_id: its MLflow run, "" if not known.
        depth: indices a cell.
        condition: what the grid belongs to that stands before the image's, if one does.
    """

    codebook_size: int
    latent_dim: tuple[int, int]
    class_names: tuple[str, ...] = ()
    tokenizer_sha256: str = ""
    tokenizer_run_id: str = ""
    depth: int = 1
    condition: GridMeta | None = None

    def __post_init__(self) -> None:
        if min(self.codebook_size, self.depth, *self.latent_dim) < 1:
            raise ValueError("codebook_size, depth and latent_dim must be 1 or more")
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
        condition = self.condition
        return {
            "codebook_size": self.codebook_size,
            "depth": self.depth,
            "num_classes": len(self.class_names),
            "latent_dim": self.latent_dim,
            "condition_codebook_size": condition.codebook_size if condition else 0,
            "condition_latent_dim": condition.latent_dim if condition else None,
        }

    def tokens(self, labels: tuple[str, ...] | list[str]) -> list[int]:
        """Prefix tokens of labels; the empty label is "no class".

        Raises:
            UserError: labels that are no class.
        """
        tokens = self.prefix_tokens
        unknown = sorted(set(labels) - tokens.keys() - {""})
        if unknown:
            known = first_few(self.class_names, limit=20) or "none, it was trained without labels"
            raise UserError(
                f"unknown label {first_few(unknown)}; the classes are: {known}; to go without "
                "labels add --unconditional"
            )
        return [tokens.get(label, self.no_class) for label in labels]

    def check_tokenizer(self, sha256: str, where: str | Path, config: Any = None) -> None:
        """Refuse a tokenizer whose indices are not those of the GPT.

        Args:
            sha256: of its model.safetensors, "" if not known.
            where: it lies, or what it made.
            config: of the tokenizer, if it is at hand: tells it apart where no SHA-256 is known.

        Raises:
            UserError: it is another one.
        """
        if self.tokenizer_sha256 != sha256 and "" not in (self.tokenizer_sha256, sha256):
            raise UserError(
                f"the GPT belongs to the tokenizer {self.tokenizer_sha256[:12]} (run "
                f"{self.tokenizer_run_id or 'unknown'}), but that of {where} is {sha256[:12]}; use "
                "indices and models of one tokenizer"
            )
        for name in ("codebook_size", "depth", "latent_dim") if config is not None else ():
            own, theirs = getattr(self, name), getattr(config, name)
            if own != theirs:
                raise UserError(
                    f"the GPT draws indices of {name} {own}, but the tokenizer {where} has {name} "
                    f"{theirs}; use indices and models of one tokenizer"
                )

    def check_model(self, config: Any, folder: Path) -> None:
        """Refuse a GPT (by its config) that this vocabulary is not the one of.

        Raises:
            UserError: they differ.
        """
        for name, own in self.model_values.items():
            theirs = getattr(config, name)
            if own != theirs:
                raise UserError(
                    f"the vocabulary does not belong to the GPT in {folder}: its {name} is {own}, "
                    f"the GPT's {theirs}; give the {FILE} that lies beside the GPT"
                )

    def content(self) -> dict:
        """What vocabulary.json holds."""
        return asdict(self) | {"prefix_tokens": self.prefix_tokens, "no_class": self.no_class}


def find_vocabulary(path: str | Path) -> Path:
    """vocabulary.json: the file, in its folder, or in an output folder with `best` in it.

    Raises:
        UserError: no such file.
    """
    path = Path(path)
    for candidate in (path, path / FILE, path / "best" / FILE):
        if candidate.is_file():
            return candidate
    raise UserError(f"no vocabulary at {path}; it is saved beside the GPT as {FILE}")


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read vocabulary.json, see `find_vocabulary`.

    Raises:
        UserError: no such file, or something else.
    """
    file = find_vocabulary(path)
    verify(file)
    values = read_json(file)
    derived = {name: values.pop(name, None) for name in ("prefix_tokens", "no_class")}
    try:
        words = typed(Vocabulary, values)
    except UserError as error:
        raise UserError(f"{file} is no vocabulary: {error}") from error
    for name, value in derived.items():
        if value not in (None, getattr(words, name)):
            raise UserError(
                f"{file} is no vocabulary: its {name} do not follow from its class_names; take "
                "them out of it"
            )
    return words
