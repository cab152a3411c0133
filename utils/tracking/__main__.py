"""Send MLflow what it missed of a training while it was away, or write the training's report anew.

python -m utils.tracking --replay OUTPUT_DIR
python -m utils.tracking --report OUTPUT_DIR
"""

import argparse
from pathlib import Path

from utils import cli
from utils.tracking import replay, report, store


def main(arguments: argparse.Namespace) -> None:
    if arguments.report:
        home = Path(arguments.report)
        if not (home / report.METRICS).is_file():
            raise cli.UserError(
                f"{home} is no output folder of a training: it has no {report.METRICS}; name one "
                "that train_vqvae.py or train.py wrote"
            )
        print(cli.build(report.write, home))
        return
    sent = replay.replay(store.open_client(), Path(arguments.replay))
    counts = [f"{count:,} {kind}" for kind, count in sent.items() if count]
    print(f"sent: {', '.join(counts) or 'nothing, MLflow has it all'}")


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
