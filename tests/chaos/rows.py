"""The rows of the table, in its order; each is a module with `run(count) -> Result`."""

from tests.chaos.harness import Row

ROWS: tuple[Row, ...] = ()
