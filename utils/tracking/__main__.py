"""Send MLflow what it missed of a training while it was away, or write the training's report anew.

python -m utils.tracking --replay OUTPUT_DIR
python -m utils.tracking --report OUTPUT_DIR
"""

import argparse
from pathlib import Path

from utils import cli
from utils.tracking import gateway, replay, report


def main(arguments: argparse.Namespace) -> None:
    """Replay, or write the report.

    Raises:
        UserError: there is nothing to read, or MLflow refuses something or goes away meanwhile.
    """
    if arguments.report:
        print(write_report(Path(arguments.report)))
    else:
        counts = [f"{count:,} {kind}" for kind, count in send(arguments.replay).items() if count]
        print(f"sent: {', '.join(counts) or 'nothing, MLflow has it all'}")


def write_report(home: Path) -> Path:
    """The report of an output folder, written anew."""
    if not (home / report.METRICS).is_file():
        raise cli.UserError(
            f"{home} is no output folder of a training: it has no {report.METRICS}; name one "
            "that train_vqvae.py or train.py wrote"
        )
    return cli.build(report.write, home)


def send(home: str) -> dict[str, int]:
    """Replay an output folder; how much of what was sent."""
    client = gateway.open_client()
    try:
        return replay.replay(client, Path(home))
    except cli.UserError:
        raise
    except Exception as error:  # each kind of store has its own
        raise cli.UserError(
            f"MLflow does not take all of {home} ({cli.one_line(error)}); fix that and run this "
            "again: nothing is sent twice"
        ) from error


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.tracking")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--replay",
        metavar="OUTPUT_DIR",
        help="output folder whose runs MLflow is to have in full; what it has is not sent again",
    )
    what.add_argument(
        "--report", metavar="OUTPUT_DIR", help="output folder whose report.html to write anew"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
