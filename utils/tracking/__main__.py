"""Send MLflow what it missed of a training while it was away, or write the training's report again.

python -m utils.tracking --replay OUTPUT_DIR
python -m utils.tracking --report OUTPUT_DIR
"""

import argparse
from pathlib import Path

from utils import addresses, cli
from utils.tracking import report, sync


def main(arguments: argparse.Namespace) -> None:
    home = Path(arguments.replay or arguments.report)
    if arguments.replay:
        remedy = "fix that and run this again: nothing is sent twice"
        with addresses.store_errors(f"MLflow does not accept all of {home}", lambda _: remedy):
            sent = sync.replay(addresses.open_client(), home)
        print(f"sent: {sync.in_words(sent) or 'nothing, MLflow has it all'}")
    elif (home / sync.METRICS).is_file():
        print(cli.build_or_error(report.write, home))
    else:
        raise cli.UserError(
            f"{home} is no output folder of a training: it has no {sync.METRICS}; name one "
            "that train_vqvae.py or train.py wrote"
        )


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.tracking")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--replay",
        metavar="OUTPUT_DIR",
        help="output folder whose runs MLflow is to have in full; what it has is not sent again",
    )
    what.add_argument(
        "--report", metavar="OUTPUT_DIR", help="output folder whose report.html to write again"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
