"""What grids of indices belong to: a codebook, a size, and a tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from utils.cli import UserError
from utils.provenance import LoadedModel

MOST_CODES = 1 << 32  # what text files and .npy files of uint32 can hold


@dataclass(frozen=True)
class GridMeta:
    """What a grid of indices belongs to.

    Attributes:
        codebook_size: K; every index is below it.
        latent_dim: rows and columns (h, w) of a grid.
        tokenizer_sha256: of the model.safetensors that made the indices or decodes them, "" if not
            known.
        tokenizer_run_id: its MLflow run, "" if not known.
    """

    codebook_size: int
    latent_dim: tuple[int, int]
    tokenizer_sha256: str = ""
    tokenizer_run_id: str = ""

    def __post_init__(self) -> None:
        if not 2 <= self.codebook_size <= MOST_CODES:
            raise ValueError(
                f"codebook_size must be from 2 to {MOST_CODES}, got {self.codebook_size}"
            )
        if min(self.latent_dim) < 1:
            raise ValueError(f"latent_dim must be 1 or more, got {self.latent_dim}")

    def check_tokenizer(self, tokenizer: LoadedModel, path: str | Path) -> None:
        """Refuse a tokenizer that is not the one that the indices at `path` belong to.

        Raises:
            UserError: it is another one.
        """
        if self.tokenizer_sha256 not in ("", tokenizer.sha256):
            raise UserError(
                f"{path} belongs to the tokenizer {self.tokenizer_sha256[:12]} (run "
                f"{self.tokenizer_run_id or 'unknown'}), but {tokenizer.folder} is "
                f"{tokenizer.sha256[:12]}; use indices and models of one tokenizer"
            )

    def check_same(self, other: "GridMeta", names: tuple[str, str]) -> None:
        """Refuse grids of another codebook, size or tokenizer; `names` says whose both are.

        Raises:
            UserError: they differ.
        """
        for what, one, two in (
            ("codebook size", self.codebook_size, other.codebook_size),
            ("grid", self.latent_dim, other.latent_dim),
            ("tokenizer", self.tokenizer_sha256[:12], other.tokenizer_sha256[:12]),
        ):
            if one != two and "" not in (one, two):
                raise UserError(
                    f"{names[0]}: {what} {one}, but {names[1]}: {what} {two}; use indices and "
                    "models of one tokenizer"
                )
