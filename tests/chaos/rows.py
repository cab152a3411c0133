"""The rows of the table, in its order; each is a module with `run(count) -> Result`."""

from tests.chaos import images, pickles, servers, tables
from tests.chaos.harness import Row

ROWS: tuple[Row, ...] = (
    Row(
        "images",
        "images: 7 formats mutated, each as often; the catalogue of odd ones",
        images.run,
        full=10_000,
        quick=300,
    ),
    Row(
        "tables",
        "CSV files and text indices made up by hypothesis",
        tables.run,
        full=10_000,
        quick=400,
    ),
    Row(
        "mlflow",
        "MLflow: 8 runs x 1,000 calls and 20 first starts at once; server killed; black hole",
        servers.run,
        full=1_000,
        quick=25,
    ),
    Row(
        "pickles",
        "malicious pickles in place of any input file",
        pickles.run,
        full=6,
        quick=2,
    ),
)
