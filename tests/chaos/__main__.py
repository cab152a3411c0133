"""Do to the trainings and to the files what machines and strangers do; print what came of it.

`python -m tests.chaos` runs all rows in full and keeps their results in
benchmarks/results/chaos.json; `--quick` runs a few cases of each, for CI, and keeps nothing. A row
that this machine cannot run counts against a full round alone.
"""

import argparse
import sys

from benchmarks import record
from tests.chaos.harness import print_table, run_row
from tests.chaos.rows import ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases of each row")
    names = tuple(row.name for row in ROWS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these rows alone")
    arguments = parser.parse_args()
    results = {}
    for row in ROWS:
        if row.name in arguments.only:
            print(f"{row.name}: {row.test}", file=sys.stderr, flush=True)
            results[row.name] = run_row(row, quick=arguments.quick)
    print_table(results.values())
    if not arguments.quick:
        record.merge("chaos", results)
    good = (True, None) if arguments.quick else (True,)
    sys.exit(not all(result["held"] in good for result in results.values()))


if __name__ == "__main__":
    main()
