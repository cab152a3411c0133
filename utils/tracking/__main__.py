"""Send MLflow what it missed of a training while it was away."""

import argparse
from pathlib import Path

from utils import cli
from utils.tracking import replay, store


def main(arguments: argparse.Namespace) -> None:
    sent = replay.replay(store.open_client(), Path(arguments.replay))
    counts = [f"{count:,} {kind}" for kind, count in sent.items() if count]
    print(f"sent: {', '.join(counts) or 'nothing, MLflow has it all'}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--replay",
        required=True,
        metavar="OUTPUT_DIR",
        help="output folder whose runs MLflow is to have in full; what it has is not sent again",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
