"""What grids of indices belong to: a codebook, a size, and a tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoint import LoadedModel
from utils.cli import UserError


@dataclass(frozen=True)
class GridMeta:
    """Attributes:
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
        if not isinstance(self.codebook_size, int) or self.codebook_size < 2:
            raise ValueError(f"codebook_size must be 2 or more, got {self.codebook_size}")
        grid = tuple(self.latent_dim)
        if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
            raise ValueError(f"latent_dim must be rows and columns, got {self.latent_dim}")
        object.__setattr__(self, "latent_dim", grid)

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


def grid_meta(value: Any) -> GridMeta | None:
    """What a JSON file holds for a `GridMeta`: an object, or null.

    Raises:
        ValueError: something else.
    """
    if value is None or isinstance(value, GridMeta):
        return value
    try:
        return GridMeta(**value)
    except TypeError as error:
        raise ValueError(f"expected what a grid belongs to, got {value!r}") from error
