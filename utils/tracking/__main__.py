"""Send MLflow what it missed of a training while it was away."""

import argparse
from pathlib import Path

from utils import cli
from utils.tracking import replay, store


def main(arguments: argparse.Namespace) -> None:
    """Replay, and say what was sent.

    Raises:
        UserError: see `replay.replay`, or MLflow refuses something or goes away meanwhile.
    """
    client = store.open_client()
    try:
        sent = replay.replay(client, Path(arguments.replay))
    except cli.UserError:
        raise
    except Exception as error:  # each kind of store has its own
        raise cli.UserError(
            f"MLflow does not take all of {arguments.replay} ({cli.one_line(error)}); fix that and "
            "run this again: nothing is sent twice"
        ) from error
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
