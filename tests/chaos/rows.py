"""The rows of the table, in its order; each is a module with `run(count) -> Result`."""

from tests.chaos import damage, disk, images, kill, pickles, servers, signals, tables
from tests.chaos.harness import Row

ROWS: tuple[Row, ...] = (
    Row(
        "kill",
        "kill -9 at random moments of `train_vqvae.py` and `train.py`, resumed until the end",
        kill.run,
        full=200,
        quick=4,
    ),
    Row(
        "signals",
        "SIGTERM, SIGINT, SIGUSR1, a fifth of them under torchrun with 2 gloo processes",
        signals.run,
        full=50,
        quick=3,
    ),
    Row(
        "damage",
        "bytes of checkpoints, models, vocabularies, indices and logs flipped, cut, swapped",
        damage.run,
        full=10_000,
        quick=1_000,
    ),
    Row("disk", "a disk that is full, every 64 KiB of its size", disk.run, full=99, quick=2),
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
        "MLflow: 8 runs x 1,000 calls, 20 first starts at once; locked, slow, killed, silent, "
        "full, 500 MB over 20 MB/s",
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
