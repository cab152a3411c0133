"""The rows of the table, in its order; each is a module with `run(count) -> Result`."""

from tests.chaos import damage, disk, kill, signals
from tests.chaos.harness import Row

ROWS: tuple[Row, ...] = (
    Row(
        "kill",
        "kill -9 at random moments of `train_vqvae.py` and `train.py`, resumed until the end",
        kill.run,
        full=200,
        quick=20,
    ),
    Row(
        "signals",
        "SIGTERM, SIGINT, SIGUSR1, a fifth of them under torchrun with 2 gloo processes",
        signals.run,
        full=50,
        quick=4,
    ),
    Row(
        "damage",
        "bytes of checkpoints, model folders, vocabularies and indices flipped, cut, swapped",
        damage.run,
        full=10_000,
        quick=1_000,
    ),
    Row("disk", "a disk that is full, every 64 KiB of its size", disk.run, full=40, quick=4),
)
